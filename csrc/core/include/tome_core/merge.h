// Merging tokens into rows, its adjoint, and copying rows back to tokens.
#pragma once

#include <cstdint>

#include "tome_core/types.h"

namespace tome {

enum class Reduce : int32_t { kMean, kSum, kAmax };

// Strides are in elements. The last dimension of x is contiguous, as are all other arrays.
struct MergeParams {
    const void* x;  // (batch, tokens, channels)
    DType dtype;
    int64_t batch, tokens, rows, channels;
    int64_t stride_batch, stride_token;
    const float* size;       // (batch, tokens), or nullptr for ones
    const int32_t* members;  // (batch, tokens)
    const int32_t* offsets;  // (batch, rows + 1)
    Reduce reduce;
    void* out;        // (batch, rows, channels) out
    float* out_size;  // (batch, rows) out
};

// Each of these functions checks the plan first and writes nothing if it is refused.
Status merge(const MergeParams& params, const Threads& threads);

// A residual sum, its merge by weighted mean, and the LayerNorm of that, in one pass:
//   sum = x + scale * branch, out = merge(sum, kMean), normed = norm(out) * weight + bias
// Sums and statistics are float32 (float64 for float64). `out` is rounded to dtype once, and
// `normed` is the norm of what was stored there. With keep_norms, a row of several tokens is
// stretched before that, to the weighted mean of their lengths; not where the factor isn't finite.
struct MergeAddNormParams {
    const void* x;       // (batch, tokens, channels)
    const void* branch;  // (batch, tokens, channels)
    DType dtype;         // of every array that is not said to be float or int32_t
    int64_t batch, tokens, rows, channels;
    int64_t x_stride_batch, x_stride_token;
    int64_t branch_stride_batch, branch_stride_token;
    const void* scale;       // (channels), or nullptr for ones
    const void* weight;      // (channels), or nullptr for ones
    const void* bias;        // (channels), or nullptr for zeros
    double eps;              // added to the variance
    bool keep_norms;         // whether rows are as long as their tokens
    const float* size;       // (batch, tokens), or nullptr for ones
    const int32_t* members;  // (batch, tokens)
    const int32_t* offsets;  // (batch, rows + 1)
    void* out;               // (batch, rows, channels) out
    void* normed;            // (batch, rows, channels) out
    float* out_size;         // (batch, rows) out
};

Status merge_add_norm(const MergeAddNormParams& params, const Threads& threads);

// The adjoint of merge in x, for kMean and kSum: gradients of rows to gradients of tokens.
struct MergeBackwardParams {
    const void* grad;  // (batch, rows, channels)
    DType dtype;
    int64_t batch, tokens, rows, channels;
    int64_t stride_batch, stride_row;
    const float* size;       // (batch, tokens), or nullptr for ones
    const int32_t* members;  // (batch, tokens)
    const int32_t* offsets;  // (batch, rows + 1)
    Reduce reduce;
    void* out;  // (batch, tokens, channels) out
};

Status merge_backward(const MergeBackwardParams& params, const Threads& threads);

struct UnmergeParams {
    const void* x;  // (batch, rows, channels)
    DType dtype;
    int64_t batch, tokens, rows, channels;
    int64_t stride_batch, stride_row;
    const int32_t* assign;  // (batch, tokens), -1 for a dropped token
    void* out;              // (batch, tokens, channels) out: dropped tokens get 0
};

Status unmerge(const UnmergeParams& params, const Threads& threads);

}  // namespace tome
