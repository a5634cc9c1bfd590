// The kernels that attention_backward.cu chooses from.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "tome_core/attention.h"

namespace tome::attention_backward_detail {

// float16 and bfloat16 on Hopper's warpgroups. Takes what hopper_takes says it does.
//   delta (batch, heads, queries) workspace
bool hopper_takes(const AttentionBackwardParams& p, const device::Chip& chip);
cudaError_t launch_attention_backward_hopper(const AttentionBackwardParams& p, float* delta,
                                             const device::Chip& chip, cudaStream_t stream);

}  // namespace tome::attention_backward_detail
