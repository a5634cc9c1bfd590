// Staging tokens for the tensor cores: mean over heads, length 1, split into two halves.
#pragma once

#include "match_args.h"

namespace tome::match_cuda_detail {

using device::BFloat;
using device::Half;
using device::kFullMask;

// Four channels of a staged row, 16 bytes. A float32 value v times kUnit is held as the sum of two
// float16: high = round(v), low = round(v - high), which leaves at most 2^-22 of v unsaid. First
// the record holds the four float32 means themselves, and is then split in place.
//
//   | high 0 1 | high 2 3 | low 0 1 | low 2 3 |
//
// mma wants k = 2t, 2t + 1 and 2t + 8, 2t + 9 from lane t of four. The order of k is free as long
// as both sides agree on it, so lane t takes channels 4t..4t + 3 instead: one load of a whole
// record.
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

// Length that a row is given: far from where float16 loses bits, and products far from overflow.
constexpr float kUnit = 16384.0f;

template <class T>
__device__ __forceinline__ T sum_over_row_lanes(T value) {
    for (int by = match_tiles::kLanesPerRow / 2; by > 0; by /= 2) {
        value += __shfl_xor_sync(kFullMask, value, by);
    }
    return value;
}

// Sum over heads of channels d..d + 7 of one token.
//   x (heads, dim)  the token's metric in every head
template <class In, bool kVector>
__device__ __forceinline__ void sum_heads(const In* x, const MatchParams& p, int64_t d,
                                          float (&sum)[8]) {
    if constexpr (kVector) {
        constexpr int kCount = 16 / sizeof(In);
        constexpr int kLoads = 8 / kCount;
#pragma unroll 4
        for (int64_t h = 0; h < p.heads; ++h) {
            const In* head = x + h * p.stride_head + d;
#pragma unroll
            for (int load = 0; load < kLoads; ++load) {
                const auto values = device::load_vector<In, kCount>(head + load * kCount);
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    sum[load * kCount + i] += device::widen(values.v[i]);
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

// Every kLanesPerRow lanes stage one token, 8 channels a lane and step; warps take rows in turn.
//
//            lane 0   lane 1        lane 7   lane 0
//   token  | 8 chan | 8 chan | ... | 8 chan | 8 chan | ...  of every head, summed
//   row    | 2 recs | 2 recs | ... | 2 recs | 2 recs | ...  zeros to a multiple of 16 channels
//
// A lane reads back only records that it wrote itself, so nothing here waits.
//   image  (heads, tokens, dim) strided
//   rows   (num_rows, row_records) shared, out; num_rows a multiple of kRowsPerWarp
//   usable (num_rows) shared, out: 0 where the token holds NaN or infinity, or is past `count`
template <class In, bool kVector>
__device__ __forceinline__ void stage_rows(const MatchArgs& m, const In* image, int64_t first_token,
                                           int64_t count, int num_rows, Record* rows,
                                           unsigned char* usable) {
    using namespace match_tiles;
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kLanesPerRow;
    const MatchParams& p = m.p;
    const int pieces = m.records / 2;  // of 8 channels
    const float share = 1.0f / static_cast<float>(p.heads);
    for (int row = thread / kLanesPerRow; row < num_rows; row += kThreads / kLanesPerRow) {
        const bool exists = row < count;
        const In* x = image + (first_token + 2 * int64_t{exists ? row : 0}) * p.stride_token;
        Record* out = rows + row * m.stride;
        uint32_t largest = 0;  // as bits, where NaN and infinity are largest of all
        for (int piece = lane; piece < pieces; piece += kLanesPerRow) {
            float v[8] = {};
            if (exists && piece * 8 < p.dim) sum_heads<In, kVector>(x, p, piece * 8, v);
#pragma unroll
            for (float& value : v) {
                value *= share;
                const uint32_t size = __float_as_uint(value) & 0x7fffffffu;
                largest = size > largest ? size : largest;
            }
            out[2 * piece] = record_of(v[0], v[1], v[2], v[3]);
            out[2 * piece + 1] = record_of(v[4], v[5], v[6], v[7]);
        }
        for (int by = kLanesPerRow / 2; by > 0; by /= 2) {
            const uint32_t other = __shfl_xor_sync(kFullMask, largest, by);
            largest = other > largest ? other : largest;
        }
        const bool finite = largest < 0x7f800000u;
        const float scale = scale_for(__uint_as_float(largest));
        const auto scaled = [&](uint32_t bits) { return __uint_as_float(bits) * scale; };
        float square = 0.0f;
        for (int i = lane; i < pieces; i += kLanesPerRow) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Record v = out[2 * i + j];
                const float a = scaled(v.x), b = scaled(v.y), c = scaled(v.z), d = scaled(v.w);
                square += (a * a + b * b) + (c * c + d * d);
            }
        }
        square = sum_over_row_lanes(square);
        const float factor = kUnit / sqrtf(square);
        const bool zero = !finite || largest == 0;
        for (int i = lane; i < pieces; i += kLanesPerRow) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Record v = out[2 * i + j];
                out[2 * i + j] = zero ? make_uint4(0, 0, 0, 0)
                                      : split(scaled(v.x) * factor, scaled(v.y) * factor,
                                              scaled(v.z) * factor, scaled(v.w) * factor);
            }
        }
        if (lane == 0) usable[row] = exists && finite;
    }
}

}  // namespace tome::match_cuda_detail
