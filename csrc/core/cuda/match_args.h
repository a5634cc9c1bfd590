// What match's kernels share: their arguments and the packed scores.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpu/kernels.h"
#include "device.h"
#include "match_tiles.h"
#include "tome_core/match.h"

namespace tome::match_cuda_detail {

using Packed = unsigned long long;  // what 64-bit atomics take

// Whether the sets are not simply every second token, or images merge different numbers of them;
// there are kernels for both of these.
inline bool needs_listed_rows(const MatchParams& p) {
    return p.weight != nullptr || p.targets != nullptr || has_threshold(p);
}

struct MatchArgs {
    MatchParams p;
    Sets sets;
    int64_t r;  // cut
    match_tiles::Tiles tiles;
    match_tiles::Layout layout;
    int blocks_per_image;
    int tiles_b;             // of tiles.rows_b
    int steps;               // of 16 channels
    int groups_a, groups_b;  // of 16 rows
    float unit;              // length of the rows that scores are of: kUnit, or 1
    bool by_vectors;         // Form::kSingle: 16 bytes can be copied wherever 8 channels begin
    uint4* rows;             // (batch, groups of A, groups of B, slots) staged rows: Form::kStaged
    Packed* best;            // (batch, num_a): see pack_score; for float64 ordered scores alone
    int32_t* columns;        // (batch, num_a): nearest B token, float64 only
    uint32_t* tickets;  // (batch): blocks done, 0 at the start; unused with one block per image

    bool listed() const { return needs_listed_rows(p); }
};

// The tokens of one image's set from its row `begin` on. First where every second token is of the
// set, and takes part; then for the kernels that serve what MatchArgs::listed says.
struct Rows {
    int64_t first_token;

    __device__ __forceinline__ Rows(const MatchArgs& m, int64_t /*image*/, bool of_a, int64_t begin)
        : first_token((of_a ? m.sets.first_a : m.sets.first_b) + 2 * begin) {}
    __device__ __forceinline__ int64_t token(int64_t i) const { return first_token + 2 * i; }
    __device__ __forceinline__ bool takes_part(int64_t /*i*/) const { return true; }
};

struct ListedRows {
    const MatchParams& p;
    const float* weight;  // (tokens) of the image, or null
    Rows every_second;
    int64_t begin;
    bool of_a;

    __device__ __forceinline__ ListedRows(const MatchArgs& m, int64_t image, bool of_a_,
                                          int64_t begin_)
        : p(m.p),
          weight(m.p.weight == nullptr ? nullptr : m.p.weight + image * m.p.tokens),
          every_second(m, image, of_a_, begin_),
          begin(begin_),
          of_a(of_a_) {}

    // Always a token of the image, whatever the targets are. If they are what they should be, set A
    // is all others behind the prefix.
    __device__ __forceinline__ int64_t token(int64_t i) const {
        if (p.targets == nullptr) return every_second.token(i);
        const int64_t row = begin + i;
        if (!of_a) return is_token(p.targets[row]) ? p.targets[row] : 0;
        // How many targets lie before it: the first of them that `row` others precede does not.
        int64_t before = 0, past = p.num_targets;
        while (before < past) {
            const int64_t middle = (before + past) / 2;
            if (p.targets[middle] - p.num_prefix_tokens - middle > row) {
                past = middle;
            } else {
                before = middle + 1;
            }
        }
        return p.num_prefix_tokens + row + before;
    }
    __device__ __forceinline__ bool takes_part(int64_t i) const {
        if (p.targets != nullptr && !of_a && !is_token(p.targets[begin + i])) return false;
        return weight == nullptr || weight[token(i)] != 0;
    }
    __device__ __forceinline__ bool is_token(int32_t target) const {
        return target >= p.num_prefix_tokens && target < p.tokens;
    }
};

template <bool kListed>
using RowsOf = std::conditional_t<kListed, ListedRows, Rows>;

// Where a group holds a lane's fragment of a step: the record at the lane's own place, so that a
// warp loads 512 bytes in a row; but every other step swaps neighbouring runs of 64 bytes. Then the
// eight lanes that stage a row, four steps at two places, also meet no bank of shared memory twice.
//   half  A: 0 high parts, 1 low parts. B: 0 rows 0-7, 1 rows 8-15
__device__ __forceinline__ int slot(int step, int half, int lane) {
    return (2 * step + half) * 32 + (lane ^ step % 2 * 4);
}

// Length that a staged row is given: far from where float16 loses bits, and products far from
// overflow.
constexpr float kUnit = 16384.0f;

// Scores as integers of the same order, from 1: 0 stands for -inf, "nothing may be chosen".
__device__ __forceinline__ Packed ordered(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes 0: they are equal
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ Packed ordered(double score) {
    const double positive_zero = score + 0.0;
    Packed bits;
    memcpy(&bits, &positive_zero, sizeof(bits));
    return bits >> 63 ? ~bits : bits | Packed{1} << 63;
}

// The maximum of packed scores is the highest score, and of its equals the lowest column: whatever
// the order in which blocks and lanes contribute.
//
//   63            32 31             0
//   | ordered score | ~column       |
__device__ __forceinline__ Packed pack_score(float score, int32_t column) {
    return ordered(score) << 32 | ~static_cast<uint32_t>(column);
}

// The score that `ordered` made an integer of.
__device__ __forceinline__ float score_from(uint32_t bits) {
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}
__device__ __forceinline__ double score_from(Packed bits) {
    bits = bits >> 63 ? bits ^ Packed { 1 } << 63 : ~bits;
    double score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

// A power of two that brings `largest`, finite and not negative, near 1: what is scaled by it has
// squares that neither overflow nor vanish.
__device__ __forceinline__ float scale_for(float largest) {
    const int exponent = 254 - static_cast<int>(__float_as_uint(largest) >> 23);
    const int kept = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    return __uint_as_float(static_cast<uint32_t>(kept) << 23);
}
__device__ __forceinline__ double scale_for(double largest) {
    Packed bits;
    memcpy(&bits, &largest, sizeof(bits));
    const int exponent = 2046 - static_cast<int>(bits >> 52);
    bits = static_cast<Packed>(exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

__device__ __forceinline__ Packed larger(Packed x, Packed y) { return x < y ? y : x; }

// The best of a row of which four neighbouring lanes have met columns; -inf is "none".
__device__ __forceinline__ Packed best_of_lanes(float score, int32_t column) {
    Packed best = score == -INFINITY ? 0 : pack_score(score, column);
    best = larger(best, __shfl_xor_sync(device::kFullMask, best, 1));
    return larger(best, __shfl_xor_sync(device::kFullMask, best, 2));
}

}  // namespace tome::match_cuda_detail
