// Whether a GPU can run what this library was built for.
#pragma once

#include <cuda_runtime_api.h>

namespace tome::torch_layer {

// Whether the current device, of this number, cannot run the kernels, and why: cudaSuccess where it
// is only told not to (TOME_CUDA_KERNELS=0). Asked once for each device. An error that need not
// last is no obstacle: the launch will say what it is.
bool find_obstacle(int device, cudaError_t& obstacle);

}  // namespace tome::torch_layer
