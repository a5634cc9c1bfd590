// The products of attention's gradient as a warp makes them: for 16-bit floats on tensor cores, for
// float32 by plain multiplications (TF32 would cost half of the mantissa).
//
// A warp owns kBlocks times 16 rows and meets 16 columns at a time; each row and each column is a
// vector of kDim channels. Of 16 rows,
//
//                  16 columns
//             +--------+--------+      c[0][0, 1]: row g,     columns 2 t + {0, 1}
//   16 rows   |  c[0]  |  c[1]  |      c[0][2, 3]: row g + 8, the same columns
//             +--------+--------+      c[1]: 8 columns further; g = lane / 4, t = lane % 4
#pragma once

#include "attention_tile.cuh"

namespace tome::attention_backward_detail {

using device::kFullMask;
using device::kWarp;

// Elements from one row of a tile to the next: 16 bytes of pad spread the 8 rows that are read at
// once over all banks. For 16-bit values the pitch of attention_tile.cuh.
template <class T, int kDim>
inline constexpr int kPitch = kDim + 16 / static_cast<int>(sizeof(T));

// --- 16-bit floats
// --------------------------------------------------------------------------------

template <class T, int kDim, int kBlocks>
struct Products {
    static_assert(kPitch<T, kDim> == attention_tiles::pitch(kDim));
    static constexpr int kSteps = kDim / 16;
    // Whether rows can come to the registers without a detour by shared memory.
    static constexpr bool kFromGlobal = true;

    // The warp's rows, as left operands: in registers if kKeep, else loaded whenever they are used.
    template <bool kKeep>
    struct Left {
        const T* tile;
        uint32_t kept[kKeep ? kBlocks : 1][kKeep ? kSteps : 1][4];

        __device__ __forceinline__ void load(uint32_t (&a)[4], int block, int k) const {
            if constexpr (kKeep) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = kept[block][k][i];
            } else {
                attention_cuda_detail::load_a<kDim>(a, tile, block * 16, k * 16);
            }
        }
    };

    //   tile (16 * kBlocks, kPitch) shared
    template <bool kKeep>
    static __device__ __forceinline__ Left<kKeep> left(const T* tile) {
        Left<kKeep> rows;
        rows.tile = tile;
        if constexpr (kKeep) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    attention_cuda_detail::load_a<kDim>(rows.kept[block][k], tile, block * 16,
                                                        k * 16);
                }
            }
        }
        return rows;
    }

    // The same from global memory: rows outside (count, dim) are zeros.
    static __device__ __forceinline__ Left<true> left_from(const T* from, int64_t stride, int count,
                                                           int dim, bool vector) {
        Left<true> rows;
        rows.tile = nullptr;
        attention_cuda_detail::load_rows<T, kDim, kBlocks>(rows.kept, from, stride, count, dim,
                                                           vector);
        return rows;
    }

    // sums[block][i]: the sum over channels of a * b in row 16 block + 8 i + g, the same in the
    // four lanes of a row.
    static __device__ __forceinline__ void dot_rows(float (&sums)[kBlocks][2], const Left<true>& a,
                                                    const Left<true>& b) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = 0.0f;
#pragma unroll
                for (int k = 0; k < 2 * kSteps; ++k) {
                    const uint32_t x = a.kept[block][k / 2][k % 2 * 2 + i];
                    const uint32_t y = b.kept[block][k / 2][k % 2 * 2 + i];
                    sum += device::unpack<T>(x, 0) * device::unpack<T>(y, 0);
                    sum += device::unpack<T>(x, 1) * device::unpack<T>(y, 1);
                }
                sums[block][i] = attention_cuda_detail::sum_over_row(sum);
            }
        }
    }

    // c = start + rows * columns^T.
    //   columns (16, kPitch) shared
    template <bool kKeep>
    static __device__ __forceinline__ void dot(float (&c)[kBlocks][2][4], const Left<kKeep>& rows,
                                               const T* columns,
                                               const float (&start)[kBlocks][2][4]) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t b[4];
            attention_cuda_detail::load_b<kDim>(b, columns, 0, k * 16);
            const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                uint32_t a[4];
                rows.load(a, block, k);
                float(&x)[2][4] = c[block];
                const auto& from = k == 0 ? start[block] : x;
                device::mma_m16n8k16<T>(x[0], a, b_left, from[0]);
                device::mma_m16n8k16<T>(x[1], a, b_right, from[1]);
            }
        }
    }

    // The warp's rows of a result: of[block][i] is channels 8 i to 8 i + 7, in the layout of c[0].
    struct Sums {
        float of[kBlocks][2 * kSteps][4] = {};
    };

    // sums += c * columns, c rounded to T.
    //   columns (16, kPitch) shared
    static __device__ __forceinline__ void add(Sums& sums, const float (&c)[kBlocks][2][4],
                                               const T* columns) {
        uint32_t a[kBlocks][4];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            attention_cuda_detail::as_operand<T>(a[block], c[block][0], c[block][1]);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t b[4];
            attention_cuda_detail::load_b_transposed<kDim>(b, columns, 0, k * 16);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                float(&of)[2 * kSteps][4] = sums.of[block];
                attention_cuda_detail::mma_16x16<T>(of[2 * k], of[2 * k + 1], a[block], b);
            }
        }
    }

    // Zeros rows whose x is -infinity: of hidden keys, which a NaN in k or v would reach.
    static __device__ __forceinline__ void clear_hidden(Sums& first, Sums& second,
                                                        const float (&x)[kBlocks][2]) {
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            if (x[i / 2][i % 2] != -INFINITY) continue;
#pragma unroll
            for (int j = 0; j < 4 * kSteps; ++j) {
                first.of[i / 2][j / 2][i % 2 * 2 + j % 2] = 0.0f;
                second.of[i / 2][j / 2][i % 2 * 2 + j % 2] = 0.0f;
            }
        }
    }

    // tile = factor * sums.
    //   tile (16 * kBlocks, kPitch) shared, out
    static __device__ __forceinline__ void store(const Sums& sums, float factor, T* tile) {
        const unsigned lane = device::forget_origin(threadIdx.x) % kWarp;
        constexpr int kRowWords = kPitch<T, kDim> / 2;
        auto* to = reinterpret_cast<uint32_t*>(tile) + lane / 4 * kRowWords + lane % 4;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int i = 0; i < 2 * kSteps; ++i) {
                const float(&x)[4] = sums.of[block][i];
                to[block * 16 * kRowWords + i * 4] =
                    attention_cuda_detail::round_pair<T>(factor * x[0], factor * x[1]);
                to[block * 16 * kRowWords + i * 4 + 8 * kRowWords] =
                    attention_cuda_detail::round_pair<T>(factor * x[2], factor * x[3]);
            }
        }
    }
};

// --- float32
// --------------------------------------------------------------------------------------

template <int kDim>
struct Products<float, kDim, 1> {
    static constexpr bool kFromGlobal = false;
    static constexpr int kRow = kPitch<float, kDim>;
    using Four = device::Vector<float, 4>;

    // The warp's rows stay where they are.
    template <bool>
    struct Left {
        const float* tile;
    };

    template <bool kKeep>
    static __device__ __forceinline__ Left<kKeep> left(const float* tile) {
        return {tile};
    }

    template <bool kKeep>
    static __device__ __forceinline__ void dot(float (&of)[1][2][4], const Left<kKeep>& rows,
                                               const float* columns,
                                               const float (&start)[1][2][4]) {
        float(&c)[2][4] = of[0];
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const float* row = rows.tile + lane / 4 * kRow;
        const float* column = columns + lane % 4 * 2 * kRow;
#pragma unroll
        for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = start[0][i / 4][i % 4];
#pragma unroll 4
        for (int d = 0; d < kDim; d += 4) {
            Four a[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                a[i] = device::load_vector<float, 4>(row + i * 8 * kRow + d);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int which = j / 2 * 8 + j % 2;
                const Four b = device::load_vector<float, 4>(column + which * kRow + d);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[j / 2][j % 2] += a[0].v[e] * b.v[e];
                    c[j / 2][j % 2 + 2] += a[1].v[e] * b.v[e];
                }
            }
        }
    }

    // of[i][0] is row g, of[i][1] row g + 8; channels 16 i + 4 t to 16 i + 4 t + 3, which are one
    // load of a column.
    struct Sums {
        float of[kDim / 16][2][4] = {};
    };

    static __device__ __forceinline__ void add(Sums& sums, const float (&of)[1][2][4],
                                               const float* columns) {
        const float(&c)[2][4] = of[0];
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const float* from = columns + lane % 4 * 4;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll 1
                for (int t = 0; t < 4; ++t) {  // lane t of the four holds column 8 s + 2 t + j
                    const float low = __shfl_sync(kFullMask, c[s][j], t, 4);
                    const float high = __shfl_sync(kFullMask, c[s][j + 2], t, 4);
                    const float* column = from + (8 * s + 2 * t + j) * kRow;
#pragma unroll
                    for (int i = 0; i < kDim / 16; ++i) {
                        const Four b = device::load_vector<float, 4>(column + i * 16);
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            sums.of[i][0][e] += low * b.v[e];
                            sums.of[i][1][e] += high * b.v[e];
                        }
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ void clear_hidden(Sums& first, Sums& second,
                                                        const float (&x)[1][2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (x[0][i] != -INFINITY) continue;
#pragma unroll
            for (int j = 0; j < kDim / 4; ++j) {
                first.of[j / 4][i][j % 4] = second.of[j / 4][i][j % 4] = 0.0f;
            }
        }
    }

    static __device__ __forceinline__ void store(const Sums& sums, float factor, float* tile) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        float* to = tile + lane / 4 * kRow + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                Four x;
#pragma unroll
                for (int e = 0; e < 4; ++e) x.v[e] = factor * sums.of[i][r][e];
                device::store_vector(to + r * 8 * kRow + i * 16, x);
            }
        }
    }
};

}  // namespace tome::attention_backward_detail
