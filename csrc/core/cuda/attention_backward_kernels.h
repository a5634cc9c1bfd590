// The kernels that attention_backward.cu chooses from.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "tome_core/attention.h"

namespace tome::attention_backward_detail {

// Two tensors of the same tokens, (batch, heads, count, dim) strided.
struct Pair {
    const void *first, *second;
    HeadStrides first_strides, second_strides;
    int count;
};

// float16 and bfloat16 on Hopper's warpgroups. Takes what hopper_takes says it does.
//   delta (batch, heads, queries) workspace
bool hopper_takes(const AttentionBackwardParams& p, const device::Chip& chip);
cudaError_t launch_attention_backward_hopper(const AttentionBackwardParams& p, float* delta,
                                             const device::Chip& chip, cudaStream_t stream);

}  // namespace tome::attention_backward_detail
