// Bipartite soft matching (ToMe, arXiv 2210.09461, section 3) and the merge plan it writes.
#pragma once

#include <cstdint>
#include <limits>

#include "tome_core/types.h"

namespace tome {

// Strides are in elements. The last dimension of `metric` is contiguous.
//
// With `weight`, tokens behind the prefix are hidden where it is 0. A hidden token is neither
// merged nor merged into, and no row is its own: it is dropped, and what it holds changes nothing.
// Each image removes as many of its visible tokens as r and its visible sets allow (see cut_r); its
// visible rows come first, and those that are left stay empty, so that all images have as many. But
// where nothing may_merge, the plan is the identity, and nothing is hidden.
//
// With `targets`, these are the tokens that others merge into, and all others behind the prefix are
// what may merge. Where every target of an image is hidden and its other visible tokens are more
// than the rows, as many of them as must, the first ones, merge into the first target.
//
// With `size` or `importance`, pairs rank by what merging them costs, least first, in place of
// similarity: see merge_cost. Who is a token's most similar one stays as it is.
//
// With `threshold`, each image also merges all further pairs at least so similar, as far as r could
// be; where pairs rank by cost, those that cost no more than a pair of that similarity whose sizes
// and importance are 1. The rows of an image that merges more than others stay empty at its end.
struct MatchParams {
    const void* metric;  // (batch, heads, tokens, dim): averaged over heads
    DType dtype;
    int64_t batch, heads, tokens, dim;
    int64_t stride_batch, stride_head, stride_token;
    int64_t r;                  // tokens to remove; see cut_r
    int64_t num_prefix_tokens;  // leading tokens that never merge
    int32_t* assign;            // (batch, tokens) out
    int32_t* members;           // (batch, tokens) out
    int32_t* offsets;           // (batch, tokens - cut_r + 1) out

    const float* weight = nullptr;     // (batch, tokens), or null: nothing is hidden
    const int32_t* targets = nullptr;  // (num_targets) ascending, or null: the odd positions
    int64_t num_targets = 0;
    const float* size = nullptr;        // (batch, tokens), not negative, or null: all are 1
    const float* importance = nullptr;  // (batch, tokens), not negative, or null: all are 1
    double threshold = std::numeric_limits<double>::infinity();  // no pair is so similar
};

// How many tokens a match really removes: r cut to half the tokens behind the prefix, at least 0.
constexpr int64_t cut_r(int64_t tokens, int64_t r, int64_t num_prefix_tokens) {
    const int64_t free = tokens > num_prefix_tokens ? tokens - num_prefix_tokens : 0;
    return r <= 0 ? 0 : r < free / 2 ? r : free / 2;
}

// The same with targets: cut to the tokens that are none.
constexpr int64_t cut_r(const MatchParams& p) {
    if (p.targets == nullptr) return cut_r(p.tokens, p.r, p.num_prefix_tokens);
    const int64_t behind = p.tokens > p.num_prefix_tokens ? p.tokens - p.num_prefix_tokens : 0;
    const int64_t free = behind - p.num_targets;
    return p.r <= 0 || p.num_targets == 0 || free <= 0 ? 0 : p.r < free ? p.r : free;
}

// Whether any image may have a plan that is not the identity.
constexpr bool may_merge(MatchParams p) {
    if (p.threshold < std::numeric_limits<double>::infinity()) {
        p.r = std::numeric_limits<int64_t>::max();
    }
    return cut_r(p) > 0;
}

// Checks `targets` first and writes nothing if one is out of range or order.
Status match(const MatchParams& params, const Threads& threads);

// Groups tokens by output row: a stable counting sort of `assign`.
struct PlanParams {
    const int32_t* assign;  // (batch, tokens), -1 for a dropped token
    int64_t batch, tokens, rows;
    int32_t* members;  // (batch, tokens) out: by row, ascending within a row, dropped ones last
    int32_t* offsets;  // (batch, rows + 1) out
};

// Checks `assign` first and writes nothing if an entry is out of range.
Status plan(const PlanParams& params, const Threads& threads);

}  // namespace tome
