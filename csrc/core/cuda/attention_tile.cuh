// Tiles of (tokens, dim) of 16-bit values in shared memory, for the forward and backward of
// attention: how they get there, and from there into the registers of mma.m16n8k16.
//
// A tile has rows of pitch(kDim) elements, of which kDim are used:
//
//            0        dim    kDim   pitch
//   row 0    | values  | zeros | --- |      rows past the last token, up to a multiple of 16, are
//   row 1    | values  | zeros | --- |      all zeros, so that 0 * row is 0 and never NaN
#pragma once

#include "attention_tiles.h"
#include "device.h"

namespace tome::attention_cuda_detail {

using attention_tiles::pitch;
using device::BFloat;
using device::Half;
using device::kFullMask;
using device::kWarp;

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// How far, in log2, a row's logits may rise above the maximum that its weights are relative to
// before the row is scaled anew. Weights up to 2^8 are as exact as those up to 1, in any of the
// types; and after the first keys hardly any row rises so far.
inline constexpr float kRise = 8.0f;

// A row's maximum before any: not -inf, from which a hidden key's -inf would be NaN away.
inline constexpr float kLowest = -3.402823466e38f;

// --- global to shared --------------------------------------------------------------------------

// How threads share the copying of a tile: a warp takes as many whole rows at once as it has lanes
// for, 16 bytes a lane.
template <class T, int kDim>
struct Part {
    static constexpr unsigned kCount = 16 / sizeof(T), kPitch = kDim + kCount;
    static constexpr unsigned kChunks = kDim / kCount, kAtOnce = kWarp / kChunks;

    static __device__ __forceinline__ unsigned row(unsigned thread) {
        return thread / kWarp * kAtOnce + thread % kWarp / kChunks;
    }
    static __device__ __forceinline__ unsigned column(unsigned thread) {
        return thread % kWarp % kChunks * kCount;
    }
    static __device__ __forceinline__ bool has_part(unsigned thread) {
        return kAtOnce * kChunks == kWarp || thread % kWarp < kAtOnce * kChunks;
    }
};

// All warps of the block together fill a tile; with `vector` by cp_async_16, which the caller
// commits and waits for, else by plain stores. Either way a barrier must follow before it is read.
//   tile  (tile_rows, kDim + 16 bytes) shared, out: for 16-bit values that is pitch(kDim)
//   rows  (count, dim) strided: only rows below `count` and channels below `dim` are read
//   vector: every row begins at a multiple of 16 bytes, and so long is every row
template <class T, int kDim>
__device__ __forceinline__ void stage_tile(T* tile, int tile_rows, const T* rows, int64_t stride,
                                           int64_t count, int dim, bool vector) {
    constexpr int kCount = 16 / sizeof(T), kPitch = kDim + kCount;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    // Between two tiles, registers are worth more than these few sums.
    const int thread = static_cast<int>(device::forget_origin(threadIdx.x));
    const int warp = thread / kWarp, lane = thread % kWarp;
    if (vector) {
        // A warp copies as many whole rows at once as it has lanes for, 16 bytes a lane. A lane
        // keeps its column, so that a step costs it no more than an addition.
        constexpr int kChunks = kDim / kCount, kAtOnce = kWarp / kChunks;
        const int column = lane % kChunks * kCount;
        const bool has_column = lane < kAtOnce * kChunks && column < dim;
        const int first = warp * kAtOnce + lane / kChunks;
        const T* from = rows + first * stride + column;
        T* to = tile + first * kPitch + column;
        for (int row = first; row < tile_rows; row += warps * kAtOnce) {
            const bool valid = has_column && row < count;
            // What isn't valid is not read, but must be an address: that of the first row.
            if (lane < kAtOnce * kChunks) device::cp_async_16(to, valid ? from : rows, valid);
            from += warps * kAtOnce * stride;
            to += warps * kAtOnce * kPitch;
        }
    } else {
#pragma unroll 1
        for (int row = warp; row < tile_rows; row += warps) {
#pragma unroll 1
            for (int column = lane; column < kDim; column += kWarp) {
                const bool valid = row < count && column < dim;
                tile[row * kPitch + column] = valid ? rows[row * stride + column] : T{};
            }
        }
    }
}

// Where a thread begins to copy a tile of `rows`: what stage_pair wants, and to be moved on by as
// many rows as it is.
//   rows (.., dim) strided
template <class T, int kDim>
__device__ __forceinline__ const T* copy_from(const T* rows, int64_t stride, int dim, bool vector) {
    if (!vector) return rows;
    const unsigned column = Part<T, kDim>::column(threadIdx.x);
    // A lane behind the row's end writes zeros, and reads nothing, but needs an address.
    return rows + Part<T, kDim>::row(threadIdx.x) * stride +
           (column < static_cast<unsigned>(dim) ? column : 0);
}

// All warps of the block together fill two tiles of kRows rows; with `vector` by cp_async_16, which
// the caller commits and waits for, and by plain stores of zeros, else by plain stores. Either way
// a barrier must follow before they are read. Where fewer than kRows rows are left, they and as
// many rows of zeros as make a multiple of 16 are written.
//   tile (2, kRows, kDim + 16 bytes) shared, out: for 16-bit values that is pitch(kDim)
//   first, second (count, dim) strided: copy_from of the tiles' first rows
//   vector: every row begins at a multiple of 16 bytes, and so long is every row
//   kAnew: multiples of strides are computed again for every tile, not kept in registers
template <class T, int kDim, int kRows, bool kAnew = false>
__device__ __forceinline__ void stage_pair(T* tile, const T* first, int64_t first_stride,
                                           const T* second, int64_t second_stride, int count,
                                           int dim, bool vector) {
    using P = Part<T, kDim>;
    constexpr int kTile = kRows * static_cast<int>(P::kPitch);
    const unsigned threads = blockDim.x;
    // Between two tiles, registers are worth more than these few sums.
    const unsigned thread = device::forget_origin(threadIdx.x);
    if (vector) {
        const unsigned column = P::column(thread);
        const bool has_column = column < static_cast<unsigned>(dim);
        auto row = static_cast<int>(P::row(thread));
        T* to = tile + row * static_cast<int>(P::kPitch) + column;
        if (!P::has_part(thread)) return;
        if (count >= kRows && threads == attention_tiles::kMaxWarps * kWarp) {
            constexpr int kStep = attention_tiles::kMaxWarps * static_cast<int>(P::kAtOnce);
            const unsigned rows_on = kAnew ? device::forget_origin(kStep) : kStep;
            const int64_t first_step = rows_on * first_stride,
                          second_step = rows_on * second_stride;
            constexpr int kSteps = (kRows + kStep - 1) / kStep;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                if (kRows % kStep == 0 || i + 1 < kSteps || row + i * kStep < kRows) {
                    T* const there = to + i * kStep * static_cast<int>(P::kPitch);
                    device::cp_async_16(there, first, has_column);
                    device::cp_async_16(there + kTile, second, has_column);
                }
                first += first_step;
                second += second_step;
            }
        } else {
            const int step = static_cast<int>(threads / kWarp * P::kAtOnce);
            const int rows = count >= kRows ? kRows : (count + 15) / 16 * 16;
#pragma unroll 1
            for (; row < rows; row += step) {
                if (row < count) {
                    device::cp_async_16(to, first, has_column);
                    device::cp_async_16(to + kTile, second, has_column);
                } else {
                    device::store_word<T, P::kCount>(to, make_uint4(0, 0, 0, 0));
                    device::store_word<T, P::kCount>(to + kTile, make_uint4(0, 0, 0, 0));
                }
                first += step * first_stride;
                second += step * second_stride;
                to += step * static_cast<int>(P::kPitch);
            }
        }
    } else {
        const int rows = count >= kRows ? kRows : (count + 15) / 16 * 16;
#pragma unroll 1
        for (int i = static_cast<int>(thread); i < rows * kDim; i += static_cast<int>(threads)) {
            const int row = i / kDim, column = i % kDim;
            const bool valid = row < count && column < dim;
            T* const to = tile + row * static_cast<int>(P::kPitch) + column;
            to[0] = valid ? first[row * first_stride + column] : T{};
            to[kTile] = valid ? second[row * second_stride + column] : T{};
        }
    }
}

// A barrier of the block, behind which a pair of tiles is there for all, the rows of hidden keys as
// zeros: their weights are 0, but 0 times a NaN or an infinity would be NaN in every result.
//   pair  as stage_pair leaves it
//   hides: whether the key that is this thread's, the row of its number, is hidden
template <class T, int kDim, int kRows>
__device__ __forceinline__ void sync_shown(T* pair, bool hides) {
    if (!__syncthreads_or(hides)) return;
    using P = Part<T, kDim>;
    constexpr int kPitch = P::kPitch, kTile = kRows * kPitch;
    if (hides) {
        T* to = pair + static_cast<int>(threadIdx.x) * kPitch;
#pragma unroll 1
        for (unsigned i = 0; i < P::kChunks; ++i, to += P::kCount) {
            device::store_word<T, P::kCount>(to, make_uint4(0, 0, 0, 0));
            device::store_word<T, P::kCount>(to + kTile, make_uint4(0, 0, 0, 0));
        }
    }
    __syncthreads();
}

// --- shared to global --------------------------------------------------------------------------

// A warp writes the first `count` of the kRows rows of a tile of its own.
//   tile (kRows, kDim + 16 bytes) shared
//   to   (count, dim) strided, out; `vector` as above
template <class T, int kDim, int kRows>
__device__ __forceinline__ void write_tile(const T* tile, T* to, int64_t stride, int count, int dim,
                                           bool vector) {
    using P = Part<T, kDim>;
    constexpr int kPitch = P::kPitch;
    const unsigned lane = threadIdx.x % kWarp;
    if (vector) {
        constexpr int kStep = P::kAtOnce;
        const auto row = static_cast<int>(P::row(lane));
        const auto column = static_cast<int>(P::column(lane));
        if (!P::has_part(lane) || column >= dim) return;
        tile += row * kPitch + column;
        to += row * stride + column;
#pragma unroll
        for (int i = 0; i < kRows; i += kStep) {
            if (i + row < count && (kRows % kStep == 0 || i + row < kRows)) {
                device::store_word<T, P::kCount>(
                    to, device::load_word<T, P::kCount>(tile + i * kPitch));
            }
            to += kStep * stride;
        }
    } else {
#pragma unroll 1
        for (int i = static_cast<int>(lane); i < kRows * kDim; i += kWarp) {
            const int row = i / kDim, column = i % kDim;
            if (row < count && column < dim) {
                to[row * stride + column] = tile[row * kPitch + column];
            }
        }
    }
}

// --- global to registers -----------------------------------------------------------------------

// The first of 16 * kBlocks rows as operands a of mma, for each 16 channels; zeros outside.
//   from (count, dim) strided
//   vector: as above
template <class T, int kDim, int kBlocks>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kBlocks][kDim / 16][4], const T* from,
                                          int64_t stride, int count, int dim, bool vector) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane % 4 * 2;
    from += lane / 4 * stride + column;
    if (vector) {
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {  // upper and lower half of each 16 rows
            // dim is a multiple of 8, so that a group of 8 channels is inside for all lanes or
            // none.
            const int left = i * 8 + lane / 4 < count ? dim : 0;
#pragma unroll
            for (int j = 0; j < kDim / 8; ++j) {
                uint32_t& pair = a[i / 2][j / 2][j % 2 * 2 + i % 2];
                pair = 0;
                if (j * 8 < left) pair = device::load_word<T, 2>(from + j * 8);
            }
            from += 8 * stride;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            const int left = i * 8 + lane / 4 < count ? dim - column : 0;
#pragma unroll
            for (int j = 0; j < kDim / 8; ++j) {
                const T low = j * 8 < left ? from[j * 8] : T{};
                const T high = j * 8 + 1 < left ? from[j * 8 + 1] : T{};
                a[i / 2][j / 2][j % 2 * 2 + i % 2] = device::pack(low, high);
            }
            from += 8 * stride;
        }
    }
}

// --- work of a warp ----------------------------------------------------------------------------

// Which of a block's rows are this warp's: turned by the head. The warps of one number share a
// quarter of the multiprocessor, and where the last block of a head has too few rows, it would
// always be the same quarter that idles.
__device__ __forceinline__ unsigned turned_warp(unsigned head, unsigned thread = threadIdx.x) {
    const unsigned warps = blockDim.x / kWarp;
    const unsigned warp = thread / kWarp + (warps == 3 ? head % 3 : head & (warps - 1));
    return warp < warps ? warp : warp - warps;
}

// --- shared to registers -----------------------------------------------------------------------
//
// ldmatrix takes the address of row `lane % 8` of 8 x 8 matrix `lane / 8`. All of a warp's lanes
// call these; `row` and `column` are the same for all of them, multiples of 16.
//
//   operand       | the tile's rows are | load
//   a (m=16,k=16) | m                   | load_a
//   a (m=16,k=16) | k                   | load_a_transposed
//   b (k=16,n=16) | n                   | load_b     (q k^T: keys are n, and rows)
//   b (k=16,n=16) | k                   | load_b_transposed     (p v: keys are k, and rows)
//
// b holds the operands of two mma side by side: b[0], b[1] for columns 0-7 and b[2], b[3] for
// columns 8-15.

// Matrices 0, 1 below one another, 2, 3 right of them.
template <int kDim, class T>
__device__ __forceinline__ const T* down_then_right(const T* tile, int row, int column,
                                                    unsigned thread = threadIdx.x) {
    const unsigned lane = thread % kWarp;
    return tile + (row + lane % 16) * pitch(kDim) + column + lane / 16 * 8;
}

// Matrices 0, 1 side by side, 2, 3 below them.
template <int kDim, class T>
__device__ __forceinline__ const T* right_then_down(const T* tile, int row, int column,
                                                    unsigned thread = threadIdx.x) {
    const unsigned lane = thread % kWarp;
    return tile + (row + lane % 8 + lane / 16 * 8) * pitch(kDim) + column + lane / 8 % 2 * 8;
}

template <int kDim, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int row, int column) {
    device::ldmatrix_x4(a, down_then_right<kDim>(tile, row, column));
}

template <int kDim, class T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* tile, int row,
                                                  int column) {
    device::ldmatrix_x4_trans(a, right_then_down<kDim>(tile, row, column));
}

template <int kDim, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int row, int column) {
    device::ldmatrix_x4(b, right_then_down<kDim>(tile, row, column));
}

template <int kDim, class T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const T* tile, int row,
                                                  int column) {
    device::ldmatrix_x4_trans(b, down_then_right<kDim>(tile, row, column));
}

// c (16 x 16, as two of 16 x 8 side by side) += a (16 x 16) * b (16 x 16).
template <class T>
__device__ __forceinline__ void mma_16x16(float (&left)[4], float (&right)[4],
                                          const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
    device::mma_m16n8k16<T>(left, a, b_left);
    device::mma_m16n8k16<T>(right, a, b_right);
}

// --- in registers ------------------------------------------------------------------------------

// Rounds two neighbours of a row to T.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    return device::narrow_pair<T>(low, high);
}

// The results of two mma side by side are, rounded, the a operand of the next one: the layouts are
// the same.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
    a[0] = round_pair<T>(left[0], left[1]);
    a[1] = round_pair<T>(left[2], left[3]);
    a[2] = round_pair<T>(right[0], right[1]);
    a[3] = round_pair<T>(right[2], right[3]);
}

// Over the four lanes that share a row of an mma's result.
__device__ __forceinline__ float max_over_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ __forceinline__ float sum_over_row(float x) {
    x += __shfl_xor_sync(kFullMask, x, 1);
    return x + __shfl_xor_sync(kFullMask, x, 2);
}

// What is added to a key's logit, both in units of log2: -inf hides the key.
//   size (keys) of this image, or nullptr
__device__ __forceinline__ float log2_size(const float* size, int64_t key, int64_t keys) {
    if (key >= keys) return -INFINITY;
    return size == nullptr ? 0.0f : log2f(size[key]);
}

}  // namespace tome::attention_cuda_detail
