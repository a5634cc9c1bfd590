// Tiles of (tokens, dim) of 16-bit values in shared memory, for the forward and backward of
// attention: how they get there, and from there into the registers of mma.m16n8k16.
//
// A tile has rows of pitch(kDim) elements, of which kDim are used:
//
//            0        dim    kDim   pitch
//   row 0    | values  | zeros | --- |      rows past the last token are all zeros, so that
//   row 1    | values  | zeros | --- |      0 * row is 0 and never NaN
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

// --- global to shared --------------------------------------------------------------------------

// All warps of the block together fill kRows rows; with `vector` by cp_async_16, which the caller
// commits and waits for, else by plain stores. Either way a barrier must follow before it is read.
//   tile  (kRows, kDim + 16 bytes) shared, out: for 16-bit values that is pitch(kDim)
//   rows  (count, dim) strided: only rows below `count` and channels below `dim` are read
//   vector: every row begins at a multiple of 16 bytes, and so long is every row
template <class T, int kDim, int kRows>
__device__ __forceinline__ void stage_tile(T* tile, const T* rows, int64_t stride, int64_t count,
                                           int dim, bool vector) {
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
        for (int row = first; row < kRows; row += warps * kAtOnce) {
            const bool valid = has_column && row < count;
            // What isn't valid is not read, but must be an address: that of the first row.
            if (lane < kAtOnce * kChunks) device::cp_async_16(to, valid ? from : rows, valid);
            from += warps * kAtOnce * stride;
            to += warps * kAtOnce * kPitch;
        }
    } else {
#pragma unroll 1
        for (int row = warp; row < kRows; row += warps) {
#pragma unroll 1
            for (int column = lane; column < kDim; column += kWarp) {
                const bool valid = row < count && column < dim;
                tile[row * kPitch + column] = valid ? rows[row * stride + column] : T{};
            }
        }
    }
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
    const int lane = static_cast<int>(thread) % kWarp;
    return tile + (row + lane % 16) * pitch(kDim) + column + lane / 16 * 8;
}

// Matrices 0, 1 side by side, 2, 3 below them.
template <int kDim, class T>
__device__ __forceinline__ const T* right_then_down(const T* tile, int row, int column,
                                                    unsigned thread = threadIdx.x) {
    const int lane = static_cast<int>(thread) % kWarp;
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
    return device::pack(device::narrow<T>(low), device::narrow<T>(high));
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
