// The two ways kernels are started: typed, checked, and the same in the tests' emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#ifdef TOME_EMULATION
#include "emulator.h"
#else
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#endif

namespace tome::device {

// What choices of tile and launch depend on.
struct Chip {
    int multiprocessors = 0;
    int shared_per_block = 0;  // bytes, the most a block may ask for
    int capability = 0;        // compute capability times 10: 90 is Hopper
};

inline cudaError_t ask_chip(int device, Chip& out) {
    int major = 0, minor = 0;
    const auto ask = [&](int& to, cudaDeviceAttr what) {
        return cudaDeviceGetAttribute(&to, what, device);
    };
    cudaError_t error = ask(out.multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error == cudaSuccess) {
        error = ask(out.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    }
    if (error == cudaSuccess) error = ask(major, cudaDevAttrComputeCapabilityMajor);
    if (error == cudaSuccess) error = ask(minor, cudaDevAttrComputeCapabilityMinor);
    out.capability = 10 * major + minor;
    return error;
}

#ifdef TOME_EMULATION

inline cudaError_t current_chip(Chip& out) { return ask_chip(0, out); }

#else

// Compiled for at least this architecture, wait_for_earlier_kernels of device.h waits.
inline constexpr int kWaitsFrom = 90;

// Drivers before CUDA 12.3 cannot capture an overlapping launch into a graph.
inline constexpr int kOldestDriver = 12030;

// Whether launches may overlap at all: TOME_OVERLAP=0 in the environment says no, which tells a
// fault of overlapping from one of arithmetic. Read once.
inline bool overlap_is_on() {
    static const bool on = [] {
        const char* asked = std::getenv("TOME_OVERLAP");
        return asked == nullptr || std::strcmp(asked, "0") != 0;
    }();
    return on;
}

// What is asked of the driver once for each kernel and device; and, with no kernel, for a device.
struct Known {
    const void* kernel;
    int device;
    const Known* next;  // of the same bucket
    bool overlaps;      // the kernel, as this device runs it, waits for earlier kernels
    int max_threads;    // of a block, as the kernel was compiled for this device
    Chip chip;
};

// Readers take no lock: a bucket is a list that only grows at its head, of entries that never
// change and are never freed (other threads may start kernels until the very end).
class KnownKernels {
  public:
    // Null until the first call for this kernel and device has succeeded.
    cudaError_t find(const void* kernel, const Known*& found) {
        int device = 0;
        const cudaError_t error = cudaGetDevice(&device);
        if (error != cudaSuccess) return error;
        found = look(kernel, device);
        return found != nullptr ? cudaSuccess : add(kernel, device, found);
    }

  private:
    static constexpr size_t kBuckets = 1024;

    // Consecutive kernels are entry points some 16 bytes apart.
    std::atomic<const Known*>& bucket(const void* kernel, int device) {
        const auto address = reinterpret_cast<uintptr_t>(kernel);
        return buckets_[(address / 16 + static_cast<size_t>(device) * 131) % kBuckets];
    }

    const Known* look(const void* kernel, int device) {
        const Known* at = bucket(kernel, device).load(std::memory_order_acquire);
        while (at != nullptr && (at->kernel != kernel || at->device != device)) at = at->next;
        return at;
    }

    // One thread asks; the others wait, so that none launches before the kernel's limit is raised.
    cudaError_t add(const void* kernel, int device, const Known*& found) {
        const std::lock_guard<std::mutex> lock(mutex_);
        found = look(kernel, device);
        if (found != nullptr) return cudaSuccess;
        Known known{kernel, device, nullptr, false, 0, {}};
        cudaError_t error = ask_chip(device, known.chip);
        if (error == cudaSuccess && kernel != nullptr) error = prepare(known);
        if (error != cudaSuccess) {
            cudaGetLastError();  // or torch would take it for that of its next launch
            return error;
        }
        std::atomic<const Known*>& head = bucket(kernel, device);
        known.next = head.load(std::memory_order_relaxed);
        found = new Known(known);
        head.store(found, std::memory_order_release);
        return cudaSuccess;
    }

    // Allows the kernel all shared memory that the device has for a block: the limit holds for
    // every thread and stream, so one that followed the launches could refuse another thread's.
    static cudaError_t prepare(Known& known) {
        cudaFuncAttributes attributes{};
        cudaError_t error = cudaFuncGetAttributes(&attributes, known.kernel);
        if (error != cudaSuccess) return error;
        known.max_threads = attributes.maxThreadsPerBlock;
        error = cudaFuncSetAttribute(
            known.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
            known.chip.shared_per_block - static_cast<int>(attributes.sharedSizeBytes));
        if (error != cudaSuccess || !overlap_is_on()) return error;
        int driver = 0;
        error = cudaDriverGetVersion(&driver);
        // What it was compiled for decides, not the chip: a new chip also runs code for an old
        // one, which has no such instruction. ptxVersion is the virtual architecture, the one that
        // __CUDA_ARCH__ named; binaryVersion would be the chip's even for PTX of an old one.
        known.overlaps = attributes.ptxVersion >= kWaitsFrom && driver >= kOldestDriver;
        return error;
    }

    std::atomic<const Known*> buckets_[kBuckets] = {};
    std::mutex mutex_;
};

inline cudaError_t find_known(const void* kernel, const Known*& found) {
    static auto& known = *new KnownKernels;
    return known.find(kernel, found);
}

inline cudaError_t current_chip(Chip& out) {
    const Known* known = nullptr;
    const cudaError_t error = find_known(nullptr, known);
    if (error == cudaSuccess) out = known->chip;
    return error;
}

inline cudaError_t start(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, const void* params, bool may_overlap) {
    const Known* known = nullptr;
    const cudaError_t error = find_known(kernel, known);
    if (error != cudaSuccess) return error;
    void* arguments[] = {const_cast<void*>(params)};
    // Unlike <<<>>>, these return the launch's own error and leave no earlier one to be mistaken.
    if (!may_overlap || !known->overlaps) {
        return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
    }
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
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

#endif

// Whether this build has `kernel` for the current device in the form that takes blocks of so many
// threads. One whose instructions are a single chip's (device_hopper.h) has no body elsewhere, and
// is compiled for fewer.
template <class Params>
bool takes_blocks_of(void (*kernel)(Params), int threads) {
#ifdef TOME_EMULATION
    return kernel != nullptr && threads > 0;
#else
    const Known* known = nullptr;
    return find_known(reinterpret_cast<const void*>(kernel), known) == cudaSuccess &&
           known->max_threads >= threads;
#endif
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
    return start(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, &params,
                 false);
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
    return start(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, &params,
                 true);
#endif
}

}  // namespace tome::device
