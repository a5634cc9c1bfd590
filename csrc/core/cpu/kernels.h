// The kernels that exist once per instruction set, behind one table.
//
//   attention.cpp, ...        entry points: check, split over threads       (compiled once)
//   attention.inl, ...        the arithmetic, on vectors of simd.inl        (compiled per set)
//   kernels_<set>.cpp         names a set and includes the .inl files
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#include "tome_core/attention.h"
#include "tome_core/isa.h"
#include "tome_core/match.h"
#include "tome_core/merge.h"

namespace tome {

// Tokens of an image: those of a list, or every second one.
struct TokenSet {
    int64_t first, count;
    const int32_t* list = nullptr;

    int64_t operator[](int64_t i) const { return list == nullptr ? first + 2 * i : list[i]; }
};

struct Kernels {
    // The nearest token of b of every token of a, of one image, and how similar it is.
    //   nearest    (a.count) out: index within b, 0 if nothing may be chosen
    //   similarity (a.count) out: double for float64 metrics, else float
    void (*nearest)(const MatchParams& params, const TokenSet& a, const TokenSet& b, int64_t image,
                    const Threads& threads, int32_t* nearest, void* similarity);

    // Output rows [begin, end) of the flattened (batch, rows).
    void (*merge_rows)(const MergeParams& params, int64_t begin, int64_t end);
    void (*merge_backward_rows)(const MergeBackwardParams& params, int64_t begin, int64_t end);
    void (*merge_add_norm_rows)(const MergeAddNormParams& params, int64_t begin, int64_t end);

    // Parts [begin, end) of the flattened (batch, heads, parts): the queries of each head are split
    // into `parts`.
    void (*attention_parts)(const AttentionParams& params, int64_t parts, int64_t begin,
                            int64_t end);
    // Heads [begin, end) of the flattened (batch, heads).
    void (*attention_backward_heads)(const AttentionBackwardParams& params, int64_t begin,
                                     int64_t end);
    // The softmax row of one image and head.
    //   weights (keys) out: double for float64, else float
    void (*cls_attention_head)(const ClsAttentionParams& params, int64_t image, int64_t head,
                               void* weights);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define TOME_HAS_X86_KERNELS 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxBf16Kernels;
// Of bfloat16 only.
namespace avx512_bf16 {
void attention_parts(const AttentionParams& params, int64_t parts, int64_t begin, int64_t end);
}
namespace amx_bf16 {
void attention_parts(const AttentionParams& params, int64_t parts, int64_t begin, int64_t end);
void attention_backward_heads(const AttentionBackwardParams& params, int64_t begin, int64_t end);
void cls_attention_head(const ClsAttentionParams& params, int64_t image, int64_t head,
                        float* weights);
}  // namespace amx_bf16
#endif

// Those of active_isa().
const Kernels& active_kernels();

// For tests: `kernels` in their place, which may be of no set that this machine has; nullptr ends
// it.
void use_kernels(const Kernels* kernels);

// Whether a set that a machine has is faster than those before it, by the processor's vendor. On
// two cores of a Sapphire Rapids attention of bfloat16 took twice as long in avx512_bf16 as in
// avx512 (B=8 H=12 N=197: 8.9 ms, where float16, widened too, took 4.6); on Zen 4 it takes 0.5 to
// 0.7 of the time.
bool serves(Isa isa, std::string_view vendor);

// Where the two sets lie: set A holds the even positions behind the prefix, set B the odd ones.
struct Sets {
    int64_t first_a, first_b;  // tokens first_a, first_a + 2, ... and first_b, first_b + 2, ...
    int64_t num_a, num_b;
};

constexpr Sets split_sets(int64_t tokens, int64_t prefix) {
    if (prefix > tokens) prefix = tokens;  // or the next positions might overflow
    const int64_t first_a = prefix + prefix % 2;
    const int64_t first_b = prefix + 1 - prefix % 2;
    return {first_a, first_b, tokens > first_a ? (tokens - first_a + 1) / 2 : 0,
            tokens > first_b ? (tokens - first_b + 1) / 2 : 0};
}

#if defined(__CUDACC__)
#define TOME_ALSO_ON_DEVICE __host__ __device__
#else
#define TOME_ALSO_ON_DEVICE
#endif

// As many as r of an image may be at most.
TOME_ALSO_ON_DEVICE constexpr int64_t most_r(int64_t visible_a, int64_t visible_b,
                                             bool has_targets) {
    return visible_b == 0 ? 0 : has_targets || visible_a < visible_b ? visible_a : visible_b;
}

// How many tokens an image merges of which some are hidden: r, already cut by cut_r, cut to visible
// sets in the same way. Its visible rows fit the rows of all images: a set that r is cut to was as
// large as the uncut r, so that at least the difference of its tokens are hidden. Only where all
// targets are hidden may too many sources be left; then as many merge as must, and one target
// stands.
TOME_ALSO_ON_DEVICE constexpr int64_t visible_r(int64_t r, int64_t visible_a, int64_t visible_b,
                                                int64_t hidden, bool has_targets) {
    if (has_targets && visible_b == 0) return r > hidden ? r - hidden + 1 : 0;
    const int64_t most = most_r(visible_a, visible_b, has_targets);
    return r < most ? r : most;
}

TOME_ALSO_ON_DEVICE constexpr bool ranks_by_cost(const MatchParams& p) {
    return p.size != nullptr || p.importance != nullptr;
}

// What merging a pair costs, by Ward's criterion: what the sum of squared distances of all tokens
// to their rows grows by is |a - b|^2 size_a size_b / (size_a + size_b), and two rows of length 1
// are |a - b|^2 = 2 (1 - similarity) apart; times the importance of the token that is merged.
// Finite and not negative whatever comes.
template <class T>
TOME_ALSO_ON_DEVICE constexpr T merge_cost(T similarity, float size_a, float size_b,
                                           float importance) {
    const T both = static_cast<T>(size_a) + static_cast<T>(size_b);
    const T least = static_cast<T>(size_a) / both * static_cast<T>(size_b);
    const T cost = (T(1) - similarity) * (least * static_cast<T>(importance));
    constexpr T kMost = static_cast<T>(3.4028234663852886e38);
    return cost > 0 ? cost < kMost ? cost : kMost : T(0);  // NaN, too, is 0
}

TOME_ALSO_ON_DEVICE constexpr bool has_threshold(const MatchParams& p) {
    return p.threshold <= 1.7976931348623157e308;
}

// What a pair ranks by, as merge_cost or similarity, if it is just at MatchParams::threshold.
template <class T>
TOME_ALSO_ON_DEVICE constexpr T rank_at_threshold(const MatchParams& p) {
    // Far outside of what similarities and costs can be, and inside of what a float can.
    const double most = 1e30;
    const auto similarity = static_cast<T>(p.threshold < -most  ? -most
                                           : p.threshold > most ? most
                                                                : p.threshold);
    return ranks_by_cost(p) ? -(T(1) - similarity) / T(2) : similarity;
}

// Rows of no bytes may come with null pointers, which memcpy and memset must not be given.
inline void copy_row(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}
inline void clear_row(void* row, int64_t bytes) {
    if (bytes > 0) std::memset(row, 0, static_cast<size_t>(bytes));
}

// The plan of one image; see PlanParams. `assign` has been checked.
void plan_image(const int32_t* assign, int64_t tokens, int64_t rows, int32_t* members,
                int32_t* offsets);

}  // namespace tome
