// Attention in which a key token weighs as much as the tokens it stands for (ToMe, arXiv
// 2210.09461, section 3), its gradient, and the attention of the class token alone.
#pragma once

#include <cstdint>

#include "tome_core/types.h"

namespace tome {

// Strides are in elements. The last dimension of every tensor is contiguous.
struct HeadStrides {
    int64_t batch, head, token;
};

// What attention and its gradient read: softmax(scale * q k^T + log(size)) v, a row at a time.
struct AttentionInputs {
    const void* q;  // (batch, heads, queries, dim)
    const void* k;  // (batch, heads, keys, dim)
    const void* v;  // (batch, heads, keys, dim)
    DType dtype;
    int64_t batch, heads, queries, keys, dim;
    HeadStrides q_strides, k_strides, v_strides;
    // (batch, keys) >= 0, or nullptr for ones. 0 hides a key: what it and its value hold, NaN and
    // infinity too, changes nothing on the CPU; on CUDA its weight is 0, and 0 times NaN is NaN.
    const float* size;
    double scale;
};

// Logits, log(size), sums and the weighted mean of v are float32 (float64 for float64).
struct AttentionParams : AttentionInputs {
    void* out;  // (batch, queries, heads, dim) out: 0 in rows whose keys are all hidden
    // (batch, heads, queries) out, float32 (float64 for float64): the natural logarithm of the sum
    // of exp(logits); 0 in rows whose keys are all hidden.
    void* lse;
};

void attention(const AttentionParams& params, const Threads& threads);

// Gradients in q, k and v, from what attention wrote.
struct AttentionBackwardParams : AttentionInputs {
    const void* grad;  // (batch, heads, queries, dim)
    HeadStrides grad_strides;
    const void* out;  // (batch, queries, heads, dim)
    const void* lse;  // (batch, heads, queries)
    void* grad_q;     // (batch, queries, heads, dim) out
    void* grad_k;     // (batch, keys, heads, dim) out
    void* grad_v;     // (batch, keys, heads, dim) out
};

void attention_backward(const AttentionBackwardParams& params, const Threads& threads);

// out = mean over heads of softmax(scale * q k^T + log(size)), for one query token.
struct ClsAttentionParams {
    const void* q;  // (batch, heads, dim)
    const void* k;  // (batch, heads, keys, dim)
    DType dtype;
    int64_t batch, heads, keys, dim;
    int64_t q_stride_batch, q_stride_head;
    HeadStrides k_strides;
    const float* size;  // as in AttentionParams
    double scale;
    void* out;  // (batch, keys) out, float32 (float64 for float64): 0 where all keys are hidden
};

void cls_attention(const ClsAttentionParams& params, const Threads& threads);

}  // namespace tome
