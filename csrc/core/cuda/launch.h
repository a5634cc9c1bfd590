// The one way kernels are started: typed, checked, and the same in the tests' emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#ifdef TOME_EMULATION
#include "emulator.h"
#endif

namespace tome::device {

// More than this needs the kernel's consent.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

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
    if (shared_bytes > kDefaultSharedBytes) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<Params*>(&params)};
    // Unlike <<<>>>, this returns the launch's own error and leaves no earlier one to be mistaken.
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                            shared_bytes, stream);
#endif
}

}  // namespace tome::device
