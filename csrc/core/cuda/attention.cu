// attention_cuda: chooses the kernel; and the kernel on tensor cores, for float16 and bfloat16.
#include <limits>

#include "attention_kernels.h"
#include "attention_tile.cuh"
#include "launch.h"
#include "tome_core/cuda.h"

namespace tome {
namespace attention_cuda_detail {
namespace {

using attention_tiles::kMaxWarps;
using attention_tiles::row_blocks;
using attention_tiles::rows_per_warp;
using attention_tiles::stage_elements;
using attention_tiles::step_keys;
using attention_tiles::tile_keys;

// What a warp keeps of its 16 * kBlocks rows. With g = lane / 4 and t = lane % 4, a lane holds of
// each 16 rows the rows g and g + 8, and of each 8 columns the columns 2t and 2t + 1.
template <int kDim>
struct Rows {
    static constexpr int kBlocks = row_blocks(kDim);
    uint32_t q[kBlocks][kDim / 16][4];
    float out[kBlocks][kDim / 8][4];  // sum of weight * v
    float top[kBlocks][2];            // what weights are relative to: near the largest logit so far
    float sum[kBlocks][2];            // of the weights of this lane's columns
};

// One step: kKeys keys of the staged tile meet all of the warp's rows.
//
//              kKeys              kDim
//            +-------+         +----------+
//   16 rows  | q k^T | -> P, x | v        | kKeys    P in the registers where q k^T was
//     or 32  |       |         |          |          out: 16 or 32 rows x kDim, added to
//            +-------+         +----------+
//   k, v  (kKeys, pitch(kDim)) shared: the step's first row, at the lane's place for load_b of k
//         and load_b_transposed of v
//   bias  (kKeys) shared: log2 of the sizes, at the lane's columns
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void attend(Rows<kDim>& rows, const T* k, const T* v, const float* bias,
                                       float scale_log2) {
    constexpr int kBlocks = Rows<kDim>::kBlocks;
    float s[kBlocks][kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            uint32_t b[4];
            device::ldmatrix_x4(b, k + n * 16 * pitch(kDim) + d * 16);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                mma_16x16<T>(s[block][2 * n], s[block][2 * n + 1], rows.q[block][d], b);
            }
        }
    }

    float top[kBlocks][2];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) top[block][0] = top[block][1] = -INFINITY;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
        const auto sizes = device::load_vector<float, 2>(bias + n * 8);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& logit = s[block][n][i];
                logit = logit * scale_log2 + sizes.v[i % 2];
                top[block][i / 2] = fmaxf(top[block][i / 2], logit);
            }
        }
    }

    bool rises = false;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[block][half] = max_over_row(top[block][half]);
            rises |= top[block][half] > rows.top[block][half] + kRise;
        }
    }
    if (__any_sync(kFullMask, rises)) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = rows.top[block][half];
                const float now = fmaxf(before, top[block][half]);
                const float factor = device::exp2_approx(before - now);
                rows.top[block][half] = now;
                rows.sum[block][half] *= factor;
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n) {
                    rows.out[block][n][2 * half] *= factor;
                    rows.out[block][n][2 * half + 1] *= factor;
                }
            }
        }
    }

#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& weight = s[block][n][2 * half + j];
                    weight = device::exp2_approx(weight - rows.top[block][half]);
                    rows.sum[block][half] += weight;
                }
            }
        }
    }

#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t p[kBlocks][4];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            as_operand<T>(p[block], s[block][2 * n], s[block][2 * n + 1]);
        }
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
            uint32_t b[4];
            device::ldmatrix_x4_trans(b, v + n * 16 * pitch(kDim) + d * 16);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                mma_16x16<T>(rows.out[block][2 * d], rows.out[block][2 * d + 1], p[block], b);
            }
        }
    }
}

// Divides by the sums, and writes the warp's rows by way of shared memory, which makes whole 16
// bytes of the pairs that lanes hold.
//   tile  (rows_per_warp, pitch(kDim)) shared: the warp's own
//   out   (count, dim), rows heads * dim apart: the warp's first row and those behind it
//   lse   (count)
template <class T, int kDim>
__device__ __forceinline__ void write_rows(const AttentionArgs& m, Rows<kDim>& rows, T* tile,
                                           T* out, float* lse, int count) {
    const int lane = static_cast<int>(device::forget_origin(threadIdx.x)) % kWarp;
#pragma unroll
    for (int block = 0; block < Rows<kDim>::kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = block * 16 + half * 8 + lane / 4;
            const float sum = sum_over_row(rows.sum[block][half]);
            const bool seen = !(sum == 0.0f);  // NaN stays NaN
            const float factor = seen ? device::reciprocal(sum) : 0.0f;
            if (lane % 4 == 0 && row < count) {
                lse[row] = seen ? (rows.top[block][half] + log2f(sum)) * kLn2 : 0.0f;
            }
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                const float* pair = rows.out[block][n] + 2 * half;
                const uint32_t rounded =
                    seen ? round_pair<T>(pair[0] * factor, pair[1] * factor) : 0;
                device::store_word<T, 2>(tile + row * pitch(kDim) + n * 8 + lane % 4 * 2, rounded);
            }
        }
    }
    __syncwarp();
    write_tile<T, kDim, rows_per_warp(kDim)>(tile, out, m.p.heads * m.p.dim, count,
                                             static_cast<int>(m.p.dim), m.vector_out);
}

// Where a warp's queries are.
struct Place {
    unsigned image, head;
    int64_t query;  // the warp's first
    int count;      // of the warp's rows; none, or less, if it has no work
};

__device__ __forceinline__ Place place_of(const AttentionArgs& m, unsigned block, unsigned thread,
                                          int rows) {
    const unsigned head_of_all = block / m.query_tiles;
    const auto heads = static_cast<unsigned>(m.p.heads);
    const int64_t tile = block % m.query_tiles;
    const int64_t query = (tile * (blockDim.x / kWarp) + turned_warp(head_of_all, thread)) * rows;
    const int64_t left = m.p.queries - query;
    return {head_of_all / heads, head_of_all % heads, query,
            left < rows ? static_cast<int>(left) : rows};
}

// A block owns up to kMaxWarps * rows_per_warp queries of one head, a warp 32 of them (16 at 128
// channels), and passes over all keys, a tile at a time: while one is worked on, the next is being
// copied. Blocks of the same head are neighbours, so that they find its keys in L2.
//
//             keys ->
//           +--------+--------+--------+--
//   warp 0  |        |        |            tiles of keys and values, staged for all warps;
//   warp 1  | stage  | stage  | stage      no logit leaves its warp's registers
//   warp 2  |   0    |   1    |   0
//           +--------+--------+--------+--
//                    |<- being copied while the tile before is worked on
template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps* kWarp, attention_tiles::resident_blocks(kDim))
    attention_kernel(const __grid_constant__ AttentionArgs m) {
    constexpr int kTileKeys = tile_keys(kDim);
    constexpr int kTile = kTileKeys * pitch(kDim);
    constexpr int kWarpRows = rows_per_warp(kDim), kStep = step_keys(kDim);
    static_assert(kStep == 16 || kStep == 32);
    const AttentionParams& p = m.p;
    const int thread = static_cast<int>(threadIdx.x);
    const int dim = static_cast<int>(p.dim), keys = static_cast<int>(p.keys);
    const Place place = place_of(m, blockIdx.x, threadIdx.x, kWarpRows);

    T* stages = reinterpret_cast<T*>(device::dynamic_shared());
    auto* biases = reinterpret_cast<float*>(stages + 2 * stage_elements(kDim));

    // Image and head are kept in two registers, and what is seldom wanted is made of them anew.
    const unsigned image_kept = place.image, head_kept = place.head;
    const auto base = [&](const void* data, const HeadStrides& s, int64_t token) {
        return static_cast<const T*>(data) + device::forget_origin(image_kept) * s.batch +
               device::forget_origin(head_kept) * s.head + token * s.token;
    };
    const T *k_from = nullptr, *v_from = nullptr;  // what this thread copies next
    const auto find_tile = [&](int key) {
        const int64_t k_stride = p.k_strides.token, v_stride = p.v_strides.token;
        k_from = copy_from<T, kDim>(base(p.k, p.k_strides, key), k_stride, dim, m.vector_k);
        v_from = copy_from<T, kDim>(base(p.v, p.v_strides, key), v_stride, dim, m.vector_k);
    };
    constexpr bool kAnew = attention_tiles::finds_tiles_anew(kDim);
    if constexpr (!kAnew) find_tile(0);

    // Starts the copies of a tile, each behind the last one's, and returns its size for this
    // thread's key.
    const auto start_copies = [&](int key, int stage) {
        if constexpr (kAnew) find_tile(key);
        stage_pair<T, kDim, kTileKeys, kAnew>(stages + stage * stage_elements(kDim), k_from,
                                              p.k_strides.token, v_from, p.v_strides.token,
                                              keys - key, dim, m.vector_k);
        device::cp_async_commit();
        if constexpr (!kAnew) {
            k_from = device::forget_origin(k_from + kTileKeys * p.k_strides.token);
            v_from = device::forget_origin(v_from + kTileKeys * p.v_strides.token);
        }
        const bool has_key = thread < kTileKeys && thread < keys - key;
        const int64_t image = device::forget_origin(image_kept);
        return has_key && p.size != nullptr ? p.size[image * keys + (key + thread)] : 1.0f;
    };
    const auto write_bias = [&](int key, int stage, float key_size) {
        if (thread >= kTileKeys) return;
        biases[stage * kTileKeys + thread] = thread < keys - key ? log2f(key_size) : -INFINITY;
    };

    float key_size = 1.0f;  // of this thread's key of the tile that is next
    if (keys > 0) {
        key_size = start_copies(0, 0);
        write_bias(0, 0, key_size);
    }
    Rows<kDim> rows;
    load_rows<T, kDim, Rows<kDim>::kBlocks>(rows.q, base(p.q, p.q_strides, place.query),
                                            p.q_strides.token, place.count, dim, m.vector_q);
#pragma unroll
    for (int block = 0; block < Rows<kDim>::kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.top[block][half] = kLowest;
            rows.sum[block][half] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) rows.out[block][n][i] = 0.0f;
        }
    }

    const bool has_work = place.count > 0;
    int stage = 0;
#pragma unroll 1
    for (int key = 0; key < keys; key += kTileKeys, stage ^= 1) {
        device::cp_async_wait<0>();
        // Behind this, the tile is there for all, and none is still at the one before it, whose
        // place the next takes.
        sync_shown<T, kDim, kTileKeys>(stages + stage * stage_elements(kDim), key_size == 0.0f);
        const int next = key + kTileKeys;
        // The size's latency, too, passes behind the work on this tile.
        const float next_size = next < keys ? start_copies(next, stage ^ 1) : 1.0f;
        if (has_work) {
            const unsigned self = device::forget_origin(threadIdx.x);
            const T* tile = stages + stage * stage_elements(kDim);
            const T* k = right_then_down<kDim>(tile, 0, 0, self);
            const T* v = down_then_right<kDim>(tile + kTile, 0, 0, self);
            const float* bias = biases + stage * kTileKeys + self % 4 * 2;
            int left = keys - key < kTileKeys ? keys - key : kTileKeys;
#pragma unroll 1
            for (; left > kStep - 16; left -= kStep) {
                attend<T, kDim, kStep>(rows, k, v, bias, m.scale_log2);
                k += kStep * pitch(kDim);
                v += kStep * pitch(kDim);
                bias += kStep;
            }
            if constexpr (kStep > 16) {
                if (left > 0) attend<T, kDim, 16>(rows, k, v, bias, m.scale_log2);
            }
        }
        if (next < keys) write_bias(next, stage ^ 1, next_size);
        key_size = next_size;
    }

    __syncthreads();  // before the outputs take the tiles' place
    const unsigned self = device::forget_origin(threadIdx.x);
    const Place end = place_of(m, device::forget_origin(blockIdx.x), self, kWarpRows);
    if (end.count > 0) {
        const int64_t head_of_all = end.image * p.heads + end.head;
        write_rows<T, kDim>(m, rows, stages + self / kWarp * kWarpRows * pitch(kDim),
                            static_cast<T*>(p.out) +
                                ((end.image * p.queries + end.query) * p.heads + end.head) * p.dim,
                            static_cast<float*>(p.lse) + head_of_all * p.queries + end.query,
                            end.count);
    }
}

template <class T, int kDim>
cudaError_t launch_dim(AttentionArgs m, int multiprocessors, cudaStream_t stream) {
    static_assert(tile_keys(kDim) <= attention_tiles::kMinWarps * kWarp, "a thread per key");
    static_assert(tile_keys(kDim) % step_keys(kDim) == 0);
    static_assert(kMaxWarps * rows_per_warp(kDim) * pitch(kDim) <= stage_elements(kDim),
                  "the outputs fit a stage");
    m.vector_k = m.vector_v = m.vector_k && m.vector_v;  // one loop copies both
    const int64_t heads = m.p.batch * m.p.heads;
    const attention_tiles::Tiles tiles =
        attention_tiles::choose(heads, m.p.queries, kDim, multiprocessors);
    m.query_tiles = static_cast<unsigned>(tiles.query_tiles);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (tiles.query_tiles > kMost / heads || m.p.keys > kMost - tile_keys(kDim)) {
        return cudaErrorInvalidConfiguration;
    }
    return device::launch(attention_kernel<T, kDim>,
                          dim3(static_cast<unsigned>(heads * tiles.query_tiles)),
                          dim3(static_cast<unsigned>(tiles.warps * kWarp)),
                          static_cast<size_t>(attention_tiles::shared_bytes(kDim)), stream, m);
}

template <class T>
cudaError_t launch_tile(const AttentionArgs& m, cudaStream_t stream) {
    device::Chip chip;
    const cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    if (hopper_takes(m, chip)) return launch_attention_hopper(m, chip, stream);
    switch (attention_tiles::padded_dim(m.p.dim)) {
        case 32:
            return launch_dim<T, 32>(m, chip.multiprocessors, stream);
        case 64:
            return launch_dim<T, 64>(m, chip.multiprocessors, stream);
        case 80:
            return launch_dim<T, 80>(m, chip.multiprocessors, stream);
        case 96:
            return launch_dim<T, 96>(m, chip.multiprocessors, stream);
        case 128:
            return launch_dim<T, 128>(m, chip.multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace attention_cuda_detail

const char* attention_cuda_form() {
    device::Chip chip;
    const bool known = device::current_chip(chip) == cudaSuccess;
    return known && attention_cuda_detail::has_hopper_kernels(chip) ? "hopper" : "mma";
}

cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream) {
    if (p.dtype == DType::kFloat64 || p.dim > kMaxCudaHeadDim) return cudaErrorInvalidValue;
    if (p.batch == 0 || p.heads == 0 || p.queries == 0) return cudaSuccess;
    const auto fits = [&](const void* data, const HeadStrides& s) {
        return attention_tiles::vectors_fit(reinterpret_cast<uintptr_t>(data), s.batch, s.head,
                                            s.token, p.dim, element_size(p.dtype));
    };
    attention_cuda_detail::AttentionArgs m{};
    m.p = p;
    m.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
    m.vector_q = fits(p.q, p.q_strides);
    m.vector_k = fits(p.k, p.k_strides);
    m.vector_v = fits(p.v, p.v_strides);
    m.vector_out = fits(p.out, {0, 0, 0});
    switch (p.dtype) {
        case DType::kFloat16:
            return attention_cuda_detail::launch_tile<device::Half>(m, stream);
        case DType::kBFloat16:
            return attention_cuda_detail::launch_tile<device::BFloat>(m, stream);
        default:
            return attention_cuda_detail::launch_attention_plain(m, stream);
    }
}

}  // namespace tome
