// Tiles of (tokens, 64) of 16-bit values in shared memory, as Hopper's products read them
// (device_hopper.h): how they get there, and how results leave.
#pragma once

#include "attention_tile.cuh"
#include "device_hopper.h"

namespace tome::attention_cuda_detail {

// Starts a block's copies of kRows rows of 64 channels, kThreads threads together: each an eighth
// of every kThreads / 8-th row. Rows past the last become zeros.
//   tile (kRows, 64) shared, out
//   rows (count, 64) strided, every row at a multiple of 16 bytes
//   anything: what isn't valid is not read, but must be an address of 16 bytes: this one
template <class T, int kThreads, int kRows>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const T* rows, int64_t stride,
                                          int count, const void* anything) {
    constexpr int kStep = kThreads / 8;
    static_assert(kStep % 8 == 0, "a thread's piece lies at the same place of all its rows");
    static_assert(kRows % kStep == 0);
    const auto first = static_cast<int>(threadIdx.x % kThreads / 8u);
    const auto piece = static_cast<int>(threadIdx.x % 8u);
    const T* from = rows + first * stride + piece * 8;
    unsigned char* to = tile + device::tile_offset(first, piece);
    count -= first;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
        const bool valid = i * kStep < count;
        device::cp_async_16(to + i * kStep * device::kTileRowBytes, valid ? from : anything, valid);
        from += kStep * stride;
    }
}

// Zeros a row of each of two tiles, as sync_shown of attention_tile.cuh does. For products to see
// it, share_with_products() must follow, and a barrier.
__device__ __forceinline__ void clear_pair(unsigned char* first, unsigned char* second, int row) {
#pragma unroll 1
    for (int at = row * device::kTileRowBytes; at < (row + 1) * device::kTileRowBytes; at += 16) {
        *reinterpret_cast<uint4*>(first + at) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(second + at) = make_uint4(0, 0, 0, 0);
    }
}

// Four lanes hold of a row, side by side, two values of every eight: word n of a lane is the pair
// at 8 n + 2 t. Afterwards lane t holds all of columns 8 t to 8 t + 7 in words 0 to 3.
__device__ __forceinline__ void gather_row(uint32_t (&x)[4]) {
    const unsigned t = threadIdx.x % 4u;
    // First lanes 1 apart exchange, then lanes 2 apart: a transposition of 4 x 4 words.
    const auto exchange = [&](uint32_t& low, uint32_t& high, unsigned by) {
        const bool upper = (t & by) != 0;
        const uint32_t got =
            __shfl_xor_sync(device::kFullMask, upper ? low : high, static_cast<int>(by));
        if (upper) {
            low = got;
        } else {
            high = got;
        }
    };
    exchange(x[0], x[1], 1);
    exchange(x[2], x[3], 1);
    exchange(x[0], x[2], 2);
    exchange(x[1], x[3], 2);
}

// factor times a warp's 16 rows of a product's 64 columns, rounded, to memory. Factor 0 is of row
// g, factor 1 of row g + 8, g = lane / 4.
//   to (count, 64), rows `stride` apart, each at a multiple of 16 bytes: the warp's first row
template <class T>
__device__ __forceinline__ void write_rows(const float (&d)[32], const float (&factor)[2], T* to,
                                           int64_t stride, int64_t count) {
    const unsigned lane = threadIdx.x % device::kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto row = static_cast<int>(half * 8 + lane / 4);
#pragma unroll
        for (int part = 0; part < 2; ++part) {  // columns 32 part to 32 part + 31
            uint32_t words[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float* pair = d + 4 * (4 * part + n) + 2 * half;
                words[n] = round_pair<T>(pair[0] * factor[half], pair[1] * factor[half]);
            }
            gather_row(words);
            if (row < count) {
                device::store_global<T, 8>(to + row * stride + part * 32 + lane % 4 * 8,
                                           make_uint4(words[0], words[1], words[2], words[3]));
            }
        }
    }
}

}  // namespace tome::attention_cuda_detail
