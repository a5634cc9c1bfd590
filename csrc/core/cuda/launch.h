// The two ways kernels are started: typed, checked, and the same in the tests' emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#ifdef TOME_EMULATION
#include "emulator.h"
#else
#include <map>
#include <mutex>
#include <utility>
#endif

namespace tome::device {

#ifndef TOME_EMULATION

// More than this needs the kernel's consent.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
    if (bytes <= kDefaultSharedBytes) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

// Compiled for at least this architecture, wait_for_earlier_kernels of device.h waits.
inline constexpr int kWaitsFrom = 90;

// Drivers before CUDA 12.3 cannot capture an overlapping launch into a graph.
inline constexpr int kOldestDriver = 12030;

// Whether `kernel`, as the current device runs it, waits for earlier kernels. What it was compiled
// for decides, not the chip: a new chip also runs code for an old one, which has no such
// instruction. Asked once for each kernel and device.
inline cudaError_t can_overlap(const void* kernel, bool& answer) {
    static std::mutex mutex;
    // Never destroyed: other threads may start kernels until the very end.
    static auto& known = *new std::map<std::pair<const void*, int>, bool>;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({kernel, device});
    if (found != known.end()) {
        answer = found->second;
        return cudaSuccess;
    }
    int driver = 0;
    cudaFuncAttributes attributes{};
    error = cudaDriverGetVersion(&driver);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    // ptxVersion is the virtual architecture, the one that __CUDA_ARCH__ named; binaryVersion would
    // be the chip's even for PTX of an old one.
    answer = attributes.ptxVersion >= kWaitsFrom && driver >= kOldestDriver;
    known[{kernel, device}] = answer;
    return cudaSuccess;
}

#endif

// What choices of tile and launch depend on.
struct Chip {
    int multiprocessors = 0;
    int shared_per_block = 0;  // bytes, the most a block may ask for
    int capability = 0;        // compute capability times 10: 90 is Hopper
};

inline cudaError_t current_chip(Chip& out) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error =
            cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&out.shared_per_block,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    int major = 0, minor = 0;
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    out.capability = 10 * major + minor;
    return error;
}

// Starts `kernel`, which takes one params struct (as const __grid_constant__), on `stream`. An
// empty grid is no error. Never synchronises, and may be captured into a graph.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Params& params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef TOME_EMULATION
    (void)stream;
    return tome_emulation::launch(kernel, grid, block, shared_bytes, params);
#else
    const auto* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared_bytes(function, shared_bytes);
    if (error != cudaSuccess) return error;
    void* arguments[] = {const_cast<Params*>(&params)};
    // Unlike <<<>>>, this returns the launch's own error and leaves no earlier one to be mistaken.
    return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream);
#endif
}

// The same, but where the chip can, `kernel` may begin while the kernel before it on the stream
// still runs (programmatic dependent launch). All its threads call wait_for_earlier_kernels first.
template <class Params>
cudaError_t launch_overlapping(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, const Params& params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef TOME_EMULATION
    (void)stream;
    return tome_emulation::launch(kernel, grid, block, shared_bytes, params, true);
#else
    const auto* function = reinterpret_cast<const void*>(kernel);
    bool overlaps = false;
    cudaError_t error = can_overlap(function, overlaps);
    if (error != cudaSuccess) return error;
    if (!overlaps) return launch(kernel, grid, block, shared_bytes, stream, params);
    error = allow_shared_bytes(function, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    void* arguments[] = {const_cast<Params*>(&params)};
    return cudaLaunchKernelExC(&config, function, arguments);
#endif
}

}  // namespace tome::device
