// The end of match: the last block of an image ranks its A tokens and writes its plan.
#pragma once

#include "match_args.h"
#include "plan.cuh"

namespace tome::match_cuda_detail {

using match_tiles::kCountingRank;
using match_tiles::kThreads;

// Shared memory at this point: what the tiles used is free.
struct FinishShared {
    union {
        Packed keys[kCountingRank];  // cut_by_counting
        int histogram[256];          // cut_by_radix
        struct {                     // finish_small_image
            uint32_t scores[kCountingRank];
            int32_t nearest[kCountingRank];
            uint32_t list[kCountingRank];
        } small;
    };
    uint32_t merged[kCountingRank / 32];  // a bit per A token
    Packed cut_score;
    uint32_t cut_index;
    uint32_t bin, left, is_last;
    int scratch[device::kWarp + 1];
};
static_assert(sizeof(FinishShared) <= match_tiles::kFinishBytes);

// Whether this block is the last of its image; then it sees what all of them wrote to m.best.
// Every thread of the block gets the same answer.
__device__ __forceinline__ bool last_block_of_image(const MatchArgs& m, int64_t image,
                                                    unsigned char* shared) {
    __syncthreads();
    if (m.blocks_per_image == 1) return true;
    auto& state = *reinterpret_cast<FinishShared*>(shared);
    if (threadIdx.x == 0) {
        __threadfence();  // this block's maxima before its ticket
        const uint32_t ticket = atomicAdd(&m.tickets[image], 1u);
        state.is_last = ticket == static_cast<uint32_t>(m.blocks_per_image - 1);
        __threadfence();  // the others' tickets before their maxima
    }
    __syncthreads();
    const bool is_last = state.is_last != 0;
    __syncthreads();
    return is_last;
}

// The last of the r most similar A tokens, in the order of ranks: score down, then index up.
struct Cut {
    Packed score;
    uint32_t index;

    __device__ bool includes(Packed other, int64_t i) const {
        return other > score || (other == score && i <= static_cast<int64_t>(index));
    }
};

// The ordered score in an entry of m.best.
template <class T>
__device__ __forceinline__ Packed score_of(Packed best) {
    return sizeof(T) == 8 ? best : best >> 32;
}

// What an entry of m.best ranks by: the score itself, or what merging the pair costs.
//   best     not 0, which is "nothing may be chosen"
//   a, b     the pair's tokens
//   returns  an entry of the same B token
template <class T>
__device__ __forceinline__ Packed ranked(const MatchArgs& m, int64_t image, Packed best, int64_t a,
                                         int64_t b) {
    const MatchParams& p = m.p;
    const auto of = [&](const float* table, int64_t token) {
        return table == nullptr ? 1.0f : table[image * p.tokens + token];
    };
    const float size_a = of(p.size, a), size_b = of(p.size, b);
    const float importance = of(p.importance, a);
    if constexpr (sizeof(T) == 8) {
        return ordered(-merge_cost(score_from(best), size_a, size_b, importance));
    } else {
        const float similarity = score_from(static_cast<uint32_t>(best >> 32)) / (m.unit * m.unit);
        return ordered(-merge_cost(similarity, size_a, size_b, importance)) << 32 |
               static_cast<uint32_t>(best);
    }
}

// What an entry of m.best ranks by if it is just at the threshold.
template <class T>
__device__ __forceinline__ Packed score_at_threshold(const MatchArgs& m) {
    const T rank = rank_at_threshold<T>(m.p);
    return ordered(ranks_by_cost(m.p) ? rank : rank * T(m.unit * m.unit));
}

// The B token in an entry of m.best that is not 0.
//   columns (num_a): one image, float64 only
template <class T>
__device__ __forceinline__ int64_t nearest_of(Packed best, const int32_t* columns, int64_t i) {
    return sizeof(T) == 8 ? int64_t{columns[i]} : int64_t{~static_cast<uint32_t>(best)};
}

// Each thread counts who ranks before its tokens: num_a^2 / kThreads steps, without waiting.
//   best (num_a): one image
template <class T>
__device__ __forceinline__ Cut cut_by_counting(const Packed* best, int64_t num_a, int64_t r,
                                               FinishShared& state) {
    const int64_t thread = threadIdx.x;
    const bool fits = num_a <= kCountingRank;
    for (int64_t i = thread; fits && i < num_a; i += kThreads) {
        state.keys[i] = score_of<T>(best[i]);
    }
    __syncthreads();
    for (int64_t i = thread; i < num_a; i += kThreads) {
        const Packed mine = fits ? state.keys[i] : score_of<T>(best[i]);
        int64_t before = 0;
        for (int64_t j = 0; j < num_a; ++j) {
            const Packed other = fits ? state.keys[j] : score_of<T>(best[j]);
            before += other > mine || (other == mine && j < i);
        }
        if (before == r - 1) {
            state.cut_score = mine;
            state.cut_index = static_cast<uint32_t>(i);
        }
    }
    __syncthreads();
    return {state.cut_score, state.cut_index};
}

// Finds the r-th of (score, ~index) from the top, eight bits at a time: each round counts the
// entries that share the bits found so far by their next eight, and takes the bin in which the r-th
// lies. Usually the score's four bytes decide; the index's follow where scores are equal.
//   best (num_a): one image
__device__ __forceinline__ Cut cut_by_radix(const Packed* best, int64_t num_a, int64_t r,
                                            FinishShared& state) {
    static_assert(kThreads == 256, "a thread per bin");
    const int thread = static_cast<int>(threadIdx.x);
    Packed found = 0;
    int64_t left = r;
    for (int shift = 56; shift >= 0; shift -= 8) {
        state.histogram[thread] = 0;
        __syncthreads();
        for (int64_t i = thread; i < num_a; i += kThreads) {
            const Packed key = best[i] >> 32 << 32 | ~static_cast<uint32_t>(i);
            if (shift == 56 || (key ^ found) >> (shift + 8) == 0) {
                atomicAdd(&state.histogram[key >> shift & 255], 1);
            }
        }
        __syncthreads();
        const int bin = 255 - thread;  // from the top
        const int count = state.histogram[bin];
        int total = 0;
        const int above = device::block_exclusive_sum(count, &total, state.scratch);
        if (above < left && left <= above + count) {
            state.bin = static_cast<uint32_t>(bin);
            state.left = static_cast<uint32_t>(left - above);
            state.is_last = left - above == count;  // the whole bin is in: no need to look closer
        }
        __syncthreads();
        found |= Packed{state.bin} << shift;
        left = state.left;
        if (state.is_last != 0) break;
    }
    __syncthreads();
    return {found >> 32, ~static_cast<uint32_t>(found)};
}

// Output rows: prefix | A tokens that stay | B tokens.
//   best    (num_a): one image
//   columns (num_a): one image, float64 only
//   assign  (tokens) out
template <class T>
__device__ __forceinline__ void write_assign(const MatchArgs& m, const Packed* best,
                                             const int32_t* columns, const Cut& cut, int* scratch,
                                             int32_t* assign) {
    const int64_t thread = threadIdx.x, prefix = m.p.num_prefix_tokens;
    const int64_t first_b_row = prefix + m.sets.num_a - m.r;
    for (int64_t n = thread; n < prefix; n += kThreads) assign[n] = static_cast<int32_t>(n);
    for (int64_t j = thread; j < m.sets.num_b; j += kThreads) {
        assign[m.sets.first_b + 2 * j] = static_cast<int32_t>(first_b_row + j);
    }
    int64_t row = prefix;
    for (int64_t base = 0; base < m.sets.num_a; base += kThreads) {
        const int64_t i = base + thread;
        const bool exists = i < m.sets.num_a;
        const Packed mine = exists ? best[i] : 0;
        const bool merges = exists && cut.includes(score_of<T>(mine), i);
        int stay = 0;
        const int before = device::block_exclusive_sum(exists && !merges, &stay, scratch);
        if (exists) {
            // 0 is "nothing may be chosen", and then the first of B.
            const int64_t nearest = mine == 0 ? 0 : nearest_of<T>(mine, columns, i);
            assign[m.sets.first_a + 2 * i] =
                static_cast<int32_t>(merges ? first_b_row + nearest : row + before);
        }
        row += stay;
    }
}

// count += value > limit, in two instructions; the compiler takes three, each waiting for the last.
__device__ __forceinline__ void count_above(uint32_t value, uint32_t limit, int& count) {
#ifdef TOME_EMULATION
    count += value > limit;
#else
    asm("{\n"
        ".reg .pred above;\n"
        "setp.gt.u32 above, %1, %2;\n"
        "@above add.s32 %0, %0, 1;\n"
        "}"
        : "+r"(count)
        : "r"(value), "r"(limit));
#endif
}

// Up to kCountingRank A tokens: the whole plan by counting, in three steps with a barrier between,
// and nothing that one thread does for all.
//
//   rank   how many A tokens come before mine; merged if fewer than r do
//   list   merged ones in order of their index, as nearest << 16 | index: a key for their place.
//          All rows before those of B have one member, whose place is the row
//   place  of a token of a B row: how many keys, and how many tokens of B, come before mine
//
//   best_of (index) -> packed best of that A token; called by thread index % kThreads
template <class Best>
__device__ __forceinline__ void finish_small_image(const MatchArgs& m, int64_t image,
                                                   unsigned char* shared, const Best& best_of) {
    auto& state = *reinterpret_cast<FinishShared*>(shared);
    auto& small = state.small;
    const int thread = static_cast<int>(threadIdx.x);
    const int num_a = static_cast<int>(m.sets.num_a), num_b = static_cast<int>(m.sets.num_b);
    const int r = static_cast<int>(m.r);
    const auto prefix = static_cast<int>(m.p.num_prefix_tokens);
    const auto first_a = static_cast<int>(m.sets.first_a);
    const auto first_b = static_cast<int>(m.sets.first_b);
    const int first_b_row = prefix + num_a - r;
    int32_t* assign = m.p.assign + image * m.p.tokens;
    int32_t* members = m.p.members + image * m.p.tokens;
    int32_t* offsets = m.p.offsets + image * (m.p.tokens - m.r + 1);

    const auto whole = [](int count) { return (count + 3) / 4 * 4; };  // vectors of four
    for (int i = thread; i < whole(num_a); i += kThreads) {
        Packed best = i < num_a ? best_of(i) : 0;
        if (best != 0 && ranks_by_cost(m.p)) {
            best = ranked<float>(m, image, best, first_a + 2 * i,
                                 first_b + 2 * nearest_of<float>(best, nullptr, i));
        }
        small.scores[i] = static_cast<uint32_t>(best >> 32) + 1;  // from 1: one below exists
        // 0 is "nothing may be chosen", and then the first of B.
        small.nearest[i] = best == 0 ? 0 : static_cast<int32_t>(~static_cast<uint32_t>(best));
    }
    if (thread < kCountingRank / 32) state.merged[thread] = 0;
    for (int n = thread; n < prefix; n += kThreads) assign[n] = members[n] = offsets[n] = n;
    __syncthreads();

    // Eight lanes share out the scores, and each compares what it loads for four tokens: else a
    // loop of loads, each waited for, takes as long as all the rest of match.
    constexpr int kLanes = 8, kAtOnce = 4;
    const auto* scores = reinterpret_cast<const uint4*>(small.scores);
    for (int base = 0; base < num_a; base += kAtOnce * (kThreads / kLanes)) {
        int token[kAtOnce], before[kAtOnce] = {};
        uint32_t mine[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            token[k] = base + k * (kThreads / kLanes) + thread / kLanes;
            mine[k] = small.scores[token[k] < num_a ? token[k] : 0];
        }
#pragma unroll 2
        for (int four = thread % kLanes; four < whole(num_a) / 4; four += kLanes) {
            const uint4 others = scores[four];
            const uint32_t other[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                // Of vectors before the token's own, equal scores too.
                const uint32_t limit = mine[k] - (four < token[k] / 4 ? 1 : 0);
#pragma unroll
                for (int j = 0; j < 4; ++j) count_above(other[j], limit, before[k]);
            }
        }
        for (int by = kLanes / 2; by > 0; by /= 2) {
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                before[k] += __shfl_xor_sync(device::kFullMask, before[k], by);
            }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int i = token[k];
            if (i >= num_a || thread % kLanes != k) continue;  // a lane for each
            const uint4 own = scores[i / 4];
            before[k] += (i % 4 > 0 && own.x == mine[k]) + (i % 4 > 1 && own.y == mine[k]) +
                         (i % 4 > 2 && own.z == mine[k]);
            if (before[k] < r) atomicOr(&state.merged[i / 32], 1u << (i % 32));
        }
    }
    __syncthreads();

    for (int i = thread; i < num_a; i += kThreads) {
        int merged_before = 0;
        for (int word = 0; word < i / 32; ++word) merged_before += __popc(state.merged[word]);
        const uint32_t word = state.merged[i / 32], bit = 1u << (i % 32);
        merged_before += __popc(word & (bit - 1));
        if ((word & bit) != 0) {
            small.list[merged_before] = static_cast<uint32_t>(small.nearest[i]) << 16 | i;
        } else {
            const int row = prefix + i - merged_before, token = first_a + 2 * i;
            assign[token] = row;
            members[row] = token;
            offsets[row] = row;
        }
    }
    if (r + thread < whole(r)) small.list[r + thread] = 0xffffffffu;
    __syncthreads();

    const uint32_t b_later = first_b > first_a ? 1 : 0;  // than the A token of the same index
    const auto* list = reinterpret_cast<const uint4*>(small.list);
    for (int item = thread; item < num_b + r; item += kThreads) {
        const bool is_b = item < num_b;
        const uint32_t key = is_b ? static_cast<uint32_t>(item) << 16 : small.list[item - num_b];
        const uint32_t own = is_b ? key + static_cast<uint32_t>(item) + b_later : key;
        int row_begin = 0, before = 0;  // keys below the row's, below the token's
        for (int four = 0; four < whole(r) / 4; ++four) {
            const uint4 others = list[four];
            const uint32_t other[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                count_above(key, other[j], row_begin);
                count_above(own, other[j], before);
            }
        }
        const int nearest = static_cast<int>(key >> 16), index = static_cast<int>(key & 0xffff);
        const int row = first_b_row + nearest;
        if (is_b) {
            const int token = first_b + 2 * item;
            assign[token] = row;
            members[row + before] = token;
            offsets[row] = row + row_begin;
        } else {
            const int token = first_a + 2 * index;
            const int b_before = first_b + 2 * nearest < token ? 1 : 0;
            assign[token] = row;
            members[row + before + b_before] = token;
        }
    }
    if (thread == 0) offsets[m.p.tokens - m.r] = static_cast<int32_t>(m.p.tokens);
}

// Groups the tokens of an image whose assign is written.
__device__ __forceinline__ void group_tokens(const MatchArgs& m, int64_t image,
                                             unsigned char* shared) {
    auto& state = *reinterpret_cast<FinishShared*>(shared);
    const int64_t tokens = m.p.tokens, rows = tokens - m.r;
    const int32_t* assign = m.p.assign + image * tokens;
    int32_t* members = m.p.members + image * tokens;
    int32_t* offsets = m.p.offsets + image * (rows + 1);
    unsigned char* free = shared + sizeof(FinishShared);
    const int64_t bytes = m.tiles.shared_bytes - int64_t{sizeof(FinishShared)};
    const int warps = device::warps_that_place(tokens, rows, kThreads / device::kWarp, bytes);
    if (warps > 1) {
        device::plan_image_by_warps(assign, tokens, rows, members, offsets, warps,
                                    reinterpret_cast<uint16_t*>(free), state.scratch);
    } else {
        int32_t* cursor = rows * 4 <= bytes ? reinterpret_cast<int32_t*>(free) : offsets + 1;
        device::plan_image(assign, tokens, rows, members, offsets, cursor, state.scratch);
    }
}

// How many rows of a set take part. Every thread of the block gets the same answer.
template <class Set>
__device__ __forceinline__ int64_t count_visible(const Set& set, int64_t count, int* scratch) {
    int mine = 0, total = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += set.takes_part(i);
    device::block_exclusive_sum(mine, &total, scratch);
    return total;
}

// As finish_image, for listed sets: ranks, rows and the cut of r are of what is visible, and the
// rows left at the end stay empty. See MatchParams.
template <class T>
__device__ __forceinline__ void finish_listed_image(const MatchArgs& m, int64_t image,
                                                    unsigned char* shared) {
    auto& state = *reinterpret_cast<FinishShared*>(shared);
    const int64_t thread = threadIdx.x, prefix = m.p.num_prefix_tokens, tokens = m.p.tokens;
    const int64_t num_a = m.sets.num_a, num_b = m.sets.num_b;
    const ListedRows a(m, image, true, 0), b(m, image, false, 0);
    Packed* best = m.best + image * num_a;
    int32_t* columns = sizeof(T) == 8 ? m.columns + image * num_a : nullptr;
    int32_t* assign = m.p.assign + image * tokens;

    const int64_t visible_a = count_visible(a, num_a, state.scratch);
    const int64_t visible_b = count_visible(b, num_b, state.scratch);
    const int64_t hidden = num_a + num_b - visible_a - visible_b;
    int64_t r = visible_r(m.r, visible_a, visible_b, hidden, m.p.targets != nullptr);
    const bool first_stands = visible_b == 0 && r > 0;

    // A visible token for which nothing may be chosen has the first visible one of B, or the one
    // that stands in, and a score below all others: 1, where hidden ones keep 0.
    if (thread == 0) state.bin = first_stands ? 0u : 0xffffffffu;
    __syncthreads();
    for (int64_t j = thread; j < num_b; j += kThreads) {
        if (!b.takes_part(j)) continue;
        atomicMin(&state.bin, static_cast<uint32_t>(j));
        break;
    }
    for (int64_t n = thread; n < tokens; n += kThreads) {
        assign[n] = n < prefix ? static_cast<int32_t>(n) : -1;
    }
    __syncthreads();
    const uint32_t first_b = state.bin;
    for (int64_t i = thread; i < num_a; i += kThreads) {
        if (best[i] != 0 && ranks_by_cost(m.p)) {
            best[i] = ranked<T>(m, image, best[i], a.token(i),
                                b.token(nearest_of<T>(best[i], columns, i)));
        }
        if (best[i] != 0 || !a.takes_part(i)) continue;
        if constexpr (sizeof(T) == 8) {
            best[i] = 1;
            columns[i] = static_cast<int32_t>(first_b);
        } else {
            best[i] = Packed{1} << 32 | ~first_b;
        }
    }
    __syncthreads();
    if (has_threshold(m.p)) {
        const Packed least = score_at_threshold<T>(m);
        int mine = 0, near = 0;
        for (int64_t i = thread; i < num_a; i += kThreads) mine += score_of<T>(best[i]) >= least;
        device::block_exclusive_sum(mine, &near, state.scratch);
        const int64_t most = most_r(visible_a, visible_b, m.p.targets != nullptr);
        const int64_t allowed = near < most ? near : most;
        r = r > allowed ? r : allowed;
    }
    Cut cut{~Packed{0}, 0};  // includes none
    if (r > 0) {
        cut = sizeof(T) == 8 ? cut_by_counting<T>(best, num_a, r, state)
                             : cut_by_radix(best, num_a, r, state);
    }

    // Output rows: prefix | visible A tokens that stay | visible B tokens | empty ones.
    int64_t row = prefix;
    const auto give_rows = [&](const ListedRows& set, int64_t count, const auto& stays) {
        for (int64_t base = 0; base < count; base += kThreads) {
            const int64_t i = base + thread;
            const bool mine = i < count && stays(i);
            int total = 0;
            const int before = device::block_exclusive_sum(mine, &total, state.scratch);
            if (mine) assign[set.token(i)] = static_cast<int32_t>(row + before);
            row += total;
        }
    };
    give_rows(a, num_a,
              [&](int64_t i) { return a.takes_part(i) && !cut.includes(score_of<T>(best[i]), i); });
    give_rows(b, num_b, [&](int64_t j) { return b.takes_part(j) || (first_stands && j == 0); });
    __syncthreads();  // rows of B before they are looked up
    for (int64_t i = thread; i < num_a; i += kThreads) {
        if (!cut.includes(score_of<T>(best[i]), i)) continue;
        assign[a.token(i)] = assign[b.token(nearest_of<T>(best[i], columns, i))];
    }
    __syncthreads();
    group_tokens(m, image, shared);
}

// One block, after last_block_of_image said so.
template <class T>
__device__ __forceinline__ void finish_image(const MatchArgs& m, int64_t image,
                                             unsigned char* shared) {
    auto& state = *reinterpret_cast<FinishShared*>(shared);
    const int64_t num_a = m.sets.num_a;
    Packed* best = m.best + image * num_a;
    if (sizeof(T) == 4 && num_a <= kCountingRank) {
        finish_small_image(m, image, shared, [&](int64_t i) { return best[i]; });
        return;
    }
    if (ranks_by_cost(m.p)) {
        for (int64_t i = threadIdx.x; i < num_a; i += kThreads) {
            if (best[i] == 0) continue;
            const int64_t j = nearest_of<T>(best[i], m.columns + image * num_a, i);
            best[i] = ranked<T>(m, image, best[i], m.sets.first_a + 2 * i, m.sets.first_b + 2 * j);
        }
        __syncthreads();
    }
    const Cut cut = sizeof(T) == 8 ? cut_by_counting<T>(best, num_a, m.r, state)
                                   : cut_by_radix(best, num_a, m.r, state);
    write_assign<T>(m, best, m.columns + image * num_a, cut, state.scratch,
                    m.p.assign + image * m.p.tokens);
    __syncthreads();
    group_tokens(m, image, shared);
}

}  // namespace tome::match_cuda_detail
