// The kernels that attention_backward.cu chooses from.
#pragma once

#include <cuda_runtime.h>

#include "attention_tiles.h"
#include "launch.h"
#include "tome_core/attention.h"

namespace tome::attention_backward_detail {

// Two tensors of the same tokens, (batch, heads, count, dim) strided.
struct Pair {
    const void *first, *second;
    HeadStrides first_strides, second_strides;
    int count;
};

// Whether every row of every tensor begins at a multiple of 16 bytes, and so long is every row.
inline bool vectors_fit(const AttentionBackwardParams& p) {
    const auto fit = [&](const void* data, const HeadStrides& s) {
        return attention_tiles::vectors_fit(reinterpret_cast<uintptr_t>(data), s.batch, s.head,
                                            s.token, p.dim, element_size(p.dtype));
    };
    const HeadStrides of_heads{0, p.dim, p.heads * p.dim};  // out and the gradients
    return fit(p.q, p.q_strides) && fit(p.k, p.k_strides) && fit(p.v, p.v_strides) &&
           fit(p.grad, p.grad_strides) && fit(p.out, of_heads) && fit(p.grad_q, of_heads) &&
           fit(p.grad_k, of_heads) && fit(p.grad_v, of_heads);
}

// float16 and bfloat16 on Hopper's warpgroups. Takes what hopper_takes says it does.
//   delta (batch, heads, queries) workspace
bool hopper_takes(const AttentionBackwardParams& p, const device::Chip& chip);
cudaError_t launch_attention_backward_hopper(const AttentionBackwardParams& p, float* delta,
                                             cudaStream_t stream);

}  // namespace tome::attention_backward_detail
