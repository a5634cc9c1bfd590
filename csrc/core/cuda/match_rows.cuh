// Staging tokens for the tensor cores: mean over heads, length 1, split into two halves, and laid
// out as mma takes them.
#pragma once

#include "match_args.h"

namespace tome::match_cuda_detail {

using device::BFloat;
using device::Half;
using device::kFullMask;

// Four channels of a staged row, 16 bytes. A float32 value v times kUnit is held as the sum of two
// float16: high = round(v), low = round(v - high), which leaves at most 2^-22 of v unsaid.
//
//   | high 0 1 | high 2 3 | low 0 1 | low 2 3 |
//
// mma wants k = 2t, 2t + 1 and 2t + 8, 2t + 9 from lane t of four. The order of k is free as long
// as both sides agree on it, so lane t takes channels 4t..4t + 3 instead: a whole record.
//
// mma also wants rows g and g + 8 of A in four registers in a row. So two rows of A share their
// records, and what the tensor cores take is what was loaded, without a move:
//
//   slot of row g       | high 0 1 of g | of g + 8 | high 2 3 of g | of g + 8 |
//   slot of row g + 8   | low 0 1 of g  | of g + 8 | low 2 3 of g  | of g + 8 |
using Record = uint4;

__device__ __forceinline__ Record record_of(float a, float b, float c, float d) {
    return make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c),
                      __float_as_uint(d));
}

__device__ __forceinline__ Record split(float a, float b, float c, float d) {
    const float values[4] = {a, b, c, d};
    Half high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high[i] = device::to_half(values[i]);
        low[i] = device::to_half(values[i] - device::to_float(high[i]));
    }
    return make_uint4(device::pack(high[0], high[1]), device::pack(high[2], high[3]),
                      device::pack(low[0], low[1]), device::pack(low[2], low[3]));
}

// A token that may not be chosen and may not choose: all its scores are NaN, larger than nothing.
constexpr uint32_t kUnusable = 0x7fff7fffu;

// What the eight lanes of a row hold, combined.
template <class T, class Combine>
__device__ __forceinline__ T over_row_lanes(T value, const Combine& combine) {
#pragma unroll
    for (int by = match_tiles::kLanesPerRow / 2; by > 0; by /= 2) {
        value = combine(value, __shfl_xor_sync(kFullMask, value, by));
    }
    return value;
}

// Sum over heads of channels d..d + 7 of one token, in the order of heads.
//   x (heads, dim)  the token's metric in every head
template <class In, bool kVector>
__device__ __forceinline__ void sum_heads(const In* x, const MatchParams& p, int64_t d,
                                          float (&sum)[8]) {
    if constexpr (kVector) {
        constexpr int kCount = 16 / sizeof(In);
        constexpr int kLoads = 8 / kCount;
        constexpr int kHeads = match_tiles::kVectorsInFlight / kLoads;
        const In* head = x + d;
        for (int64_t first = 0; first < p.heads; first += kHeads) {
            const int64_t left = p.heads - first;
            uint4 words[kHeads * kLoads];
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
#pragma unroll
                for (int load = 0; load < kLoads; ++load) {
                    uint4& word = words[h * kLoads + load];
                    word = make_uint4(0, 0, 0, 0);
                    if (h < left) word = device::load_word<In, kCount>(head + load * kCount);
                }
                head += p.stride_head;
            }
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                if (h >= left) break;
#pragma unroll
                for (int load = 0; load < kLoads; ++load) {
                    const auto values = device::as_vector<In, kCount>(words[h * kLoads + load]);
#pragma unroll
                    for (int i = 0; i < kCount; ++i) {
                        sum[load * kCount + i] += device::widen(values.v[i]);
                    }
                }
            }
        }
    } else {
        for (int64_t h = 0; h < p.heads; ++h) {
            const In* head = x + h * p.stride_head + d;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (d + i < p.dim) sum[i] += device::widen(head[i]);
            }
        }
    }
}

// A warp stages four rows, 2q, 2q + 1, 2q + 8 and 2q + 9, of a group of 16: eight lanes a row, 8
// channels a lane and turn.
//
//            lane 0   lane 1        lane 7   lane 0
//   token  | 8 chan | 8 chan | ... | 8 chan | 8 chan | ...  of every head, summed
//   slots  | 2 recs | 2 recs | ... | 2 recs | 2 recs | ...  zeros to a multiple of 16 channels
//
// A row of several turns (!kShort) waits in its slots, as float32, until its length is known. A
// lane reads back only slots that it wrote itself, so nothing here waits. The arithmetic is spelled
// out (no multiply-add where none is written): the bits don't depend on the kernel this is part of.
//   image (heads, tokens, dim) strided
//   set   (count) rows; those past `count`, and those that take no part, are unusable
//   out   (slots) of the group, shared or global
template <class In, bool kVector, bool kShort, bool kIsA, class Set>
__device__ __forceinline__ void stage_rows(const MatchArgs& m, const In* image, const Set& set,
                                           int64_t count, int quarter, Record* out) {
    using namespace match_tiles;
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp;
    const int half = lane / 16, g = 2 * quarter + lane / 8 % 2;
    const int row = g + 8 * half;
    const MatchParams& p = m.p;
    const int pieces = 2 * m.steps;  // of 8 channels
    const int turns = kShort ? 1 : (pieces + kLanesPerRow - 1) / kLanesPerRow;
    const float share = 1.0f / static_cast<float>(p.heads);
    const bool exists = row < count;
    const In* x = image + set.token(exists ? row : 0) * p.stride_token;

    const auto piece_of = [&](int turn) { return turn * kLanesPerRow + lane % kLanesPerRow; };
    // A piece's two records; see slot() for the reason that some lanes begin with the second.
    const auto swaps = [](int piece) { return piece / 4 % 2; };
    const auto slot_of = [&](int piece, int record) {
        return slot(piece / 2, half, 4 * g + 2 * (piece % 2) + record);
    };
    const auto put = [&](int piece, const Record& first, const Record& second) {
        const int swap = swaps(piece);
        out[slot_of(piece, swap)] = swap ? second : first;
        out[slot_of(piece, 1 - swap)] = swap ? first : second;
    };

    float v[8];
    uint32_t largest = 0;  // as bits, where NaN and infinity are largest of all
    for (int turn = 0; turn < turns; ++turn) {
        const int piece = piece_of(turn);
#pragma unroll
        for (float& value : v) value = 0.0f;
        if (exists && piece * 8 < p.dim) sum_heads<In, kVector>(x, p, piece * 8, v);
#pragma unroll
        for (float& value : v) {
            value = __fmul_rn(value, share);
            const uint32_t size = __float_as_uint(value) & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        if (!kShort && piece < pieces) {
            put(piece, record_of(v[0], v[1], v[2], v[3]), record_of(v[4], v[5], v[6], v[7]));
        }
    }
    largest = over_row_lanes(largest, [](uint32_t a, uint32_t b) { return a < b ? b : a; });
    const bool finite = largest < 0x7f800000u;
    const float scale = scale_for(__uint_as_float(largest));

    // Of the turn's piece again, now scaled; zeros where there is none.
    const auto fetch = [&](int piece) {
        if constexpr (!kShort) {
            Record first = make_uint4(0, 0, 0, 0), second = first;
            if (piece < pieces) first = out[slot_of(piece, 0)], second = out[slot_of(piece, 1)];
            const uint32_t bits[8] = {first.x,  first.y,  first.z,  first.w,
                                      second.x, second.y, second.z, second.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(bits[i]);
        }
    };
    float square = 0.0f;
    for (int turn = 0; turn < turns; ++turn) {
        fetch(piece_of(turn));
#pragma unroll
        for (const float& value : v) {
            const float scaled = __fmul_rn(value, scale);
            square = __fmaf_rn(scaled, scaled, square);
        }
    }
    square = over_row_lanes(square, [](float a, float b) { return a + b; });
    const float factor = kUnit / sqrtf(square);
    const bool usable = exists && finite && set.takes_part(row), zero = largest == 0;
    for (int turn = 0; turn < turns; ++turn) {
        const int piece = piece_of(turn);
        fetch(piece);
        Record records[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float of[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                of[j] = __fmul_rn(__fmul_rn(v[4 * i + j], scale), factor);
            }
            Record& record = records[i];
            record = split(of[0], of[1], of[2], of[3]);
            if (zero) record = make_uint4(0, 0, 0, 0);
            if (!usable) record = make_uint4(kUnusable, kUnusable, kUnusable, kUnusable);
            if constexpr (kIsA) {  // high parts for low ones with the row 8 away
                const uint32_t give_0 = half == 0 ? record.z : record.x;
                const uint32_t give_1 = half == 0 ? record.w : record.y;
                const uint32_t take_0 = __shfl_xor_sync(kFullMask, give_0, 16);
                const uint32_t take_1 = __shfl_xor_sync(kFullMask, give_1, 16);
                record = half == 0 ? make_uint4(record.x, take_0, record.y, take_1)
                                   : make_uint4(take_0, record.z, take_1, record.w);
            }
        }
        if (piece < pieces) put(piece, records[0], records[1]);
    }
}

// A vector of 16 bytes serves wherever 8 channels begin.
template <class In>
bool vectors_serve(const MatchParams& p) {
    const auto whole = [](int64_t stride) { return stride * int64_t{sizeof(In)} % 16 == 0; };
    return p.dim % 8 == 0 && whole(p.stride_batch) && whole(p.stride_head) &&
           whole(p.stride_token) && reinterpret_cast<uintptr_t>(p.metric) % 16 == 0;
}

}  // namespace tome::match_cuda_detail
