// Keeping the tokens of the highest scores, and the merge plan it writes: Top-K, and EViT (arXiv
// 2202.07800), which fuses the others.
#pragma once

#include <cstdint>

#include "tome_core/types.h"

namespace tome {

// Scores descend, ties go to the lower index, and NaN comes last, below -infinity. The plan's rows:
// the prefix, the tokens kept in their order, and with `fuse` one row of all others, which are
// dropped without it.
struct SelectParams {
    const void* scores;  // (batch, tokens), of which those of prefix tokens are not looked at
    DType dtype;         // kFloat32 or kFloat64
    int64_t batch, tokens;
    int64_t stride_batch;       // in elements
    int64_t keep;               // tokens to keep behind the prefix; see cut_keep
    int64_t num_prefix_tokens;  // leading tokens, which are always kept
    bool fuse;
    int32_t* assign;   // (batch, tokens) out
    int32_t* members;  // (batch, tokens) out
    int32_t* offsets;  // (batch, select_rows + 1) out
};

// How many tokens a selection really keeps, prefix included.
constexpr int64_t cut_keep(int64_t tokens, int64_t keep, int64_t num_prefix_tokens) {
    if (num_prefix_tokens >= tokens) return tokens;
    const int64_t patches = tokens - num_prefix_tokens;
    return num_prefix_tokens + (keep < 0 ? 0 : keep < patches ? keep : patches);
}

// How many rows its plan has.
constexpr int64_t select_rows(int64_t tokens, int64_t keep, int64_t num_prefix_tokens, bool fuse) {
    const int64_t kept = cut_keep(tokens, keep, num_prefix_tokens);
    return kept + (fuse && kept < tokens ? 1 : 0);
}

void select(const SelectParams& params, const Threads& threads);

}  // namespace tome
