// attention_backward_cuda: two launches of one kernel, once for queries and once for keys.
//
//   1. a row per query: delta = sum of grad * out, kept for the second launch; grad_q
//   2. a row per key: grad_k and grad_v
//
// With p = softmax(scale q k^T + log size), made anew from lse, and ds = p (grad v^T - delta):
//   grad_q = scale ds k,   grad_k = scale ds^T q,   grad_v = p^T grad
//
// Each sum is one warp's, in one order: no atomics, and the same bits every time. For that p and ds
// are made twice, 7 products instead of 5.
#include <limits>

#include "attention_backward_kernels.h"
#include "attention_backward_products.cuh"
#include "launch.h"
#include "tome_core/cuda.h"

namespace tome {
namespace attention_backward_detail {
namespace {

using attention_cuda_detail::kLog2E;
using device::BFloat;
using device::Half;

// Two tensors of the same rows, (batch, heads, count, dim) strided.
struct Pair {
    const void *first, *second;
    HeadStrides first_strides, second_strides;
    int count;
};

struct Work {
    Pair rows, columns;  // queries: q, grad; keys: k, v; one is rows, the other columns
    int64_t heads;
    int dim, row_blocks;  // blocks to an image's head
    bool vector;          // whether 16 bytes at a time may be copied everywhere
    float scale;
    const float* size;               // (batch, keys) or nullptr
    const float* lse;                // (batch, heads, queries)
    const void* out;                 // (batch, queries, heads, dim)
    float* delta;                    // (batch, heads, queries), out for queries
    void *grad_first, *grad_second;  // (batch, count, heads, dim) out; the second for keys only
};

// What a query and a key bring to a logit (x, in units of log2) and to dP (y):
//   p = exp2(scale log2e s + query.x + key.x),   ds = p (dP - query.y - key.y)
// A row or column past the last has x = -inf, and so p = 0.
struct Side {
    float x, y;
};

//   lse, delta (queries) of this head; size (keys) of this image, or nullptr
__device__ __forceinline__ Side query_side(const float* lse, const float* delta, int query,
                                           int queries) {
    if (query >= queries) return {-INFINITY, 0.0f};
    return {-kLog2E * lse[query], delta[query]};
}
__device__ __forceinline__ Side key_side(const float* size, int key, int keys) {
    return {attention_cuda_detail::log2_size(size, key, keys), 0.0f};
}

// All threads of the block together fill `rows` rows, like attention_tile.cuh's stage_tile.
//   tile (rows, kPitch) shared, out
//   from (count, dim) strided; count > 0
template <class T, int kDim>
__device__ __forceinline__ void stage(T* tile, const T* from, int64_t stride, int count, int rows,
                                      int dim, bool vector) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    constexpr int kRow = kPitch<T, kDim>;
    if (vector) {
        constexpr int kWidth = 16 / sizeof(T), kPieces = kDim / kWidth;
#pragma unroll 1
        for (int i = thread; i < rows * kPieces; i += threads) {
            const int row = i / kPieces, d = i % kPieces * kWidth;
            const bool valid = row < count && d < dim;
            device::cp_async_16(tile + row * kRow + d, valid ? from + row * stride + d : from,
                                valid);
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < rows * kDim; i += threads) {
            const int row = i / kDim, d = i % kDim;
            const bool valid = row < count && d < dim;
            tile[row * kRow + d] = valid ? from[row * stride + d] : T{};
        }
    }
}

// The warp's sums, scaled, by way of its rows in shared memory.
//   tile (16, kPitch) shared: free to be overwritten by this warp
//   to   (count, dim) strided, out
template <class T, int kDim>
__device__ __forceinline__ void write_rows(const typename Products<T, kDim>::Sums& sums,
                                           float factor, T* tile, T* to, int64_t stride, int count,
                                           int dim, bool vector) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    constexpr int kRow = kPitch<T, kDim>;
    __syncwarp();
    Products<T, kDim>::store(sums, factor, tile);
    __syncwarp();
    if (vector) {
        constexpr int kWidth = 16 / sizeof(T), kPieces = kDim / kWidth;
#pragma unroll 1
        for (int i = lane; i < 16 * kPieces; i += kWarp) {
            const int row = i / kPieces, d = i % kPieces * kWidth;
            if (row >= count || d >= dim) continue;
            const uint4 piece = device::load_word<T, kWidth>(tile + row * kRow + d);
            device::store_word<T, kWidth>(to + row * stride + d, piece);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < 16 * kDim; i += kWarp) {
            const int row = i / kDim, d = i % kDim;
            if (row < count && d < dim) to[row * stride + d] = tile[row * kRow + d];
        }
    }
}

// Lane 2 r gets the sum over channels of grad * out of row r.
//   grad, out (16, kPitch) shared
template <class T, int kDim>
__device__ __forceinline__ float dot_rows(const T* grad, const T* out) {
    constexpr int kWidth = 16 / sizeof(T);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int begin = lane / 2 * kPitch<T, kDim> + lane % 2 * kWidth;
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < kDim; d += 2 * kWidth) {
        const auto a = device::load_vector<T, kWidth>(grad + begin + d);
        const auto b = device::load_vector<T, kWidth>(out + begin + d);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += device::widen(a.v[i]) * device::widen(b.v[i]);
    }
    return sum + __shfl_xor_sync(kFullMask, sum, 1);
}

// A block owns up to 16 rows per warp of one image's head, and passes over all its columns, kStage
// at a time: while one stage is worked on, the next is copied. A warp owns 16 rows, and meets a
// stage's columns 16 at a time; see attention_backward_products.cuh for what a lane holds.
//
//                     stage      stage
//                  | 16 | 16 | 16 | 16 | ...       columns: keys, or queries
//        warp 0    | -> | -> | -> | ->             s  = first  * first^T      p = exp2(..)
//        warp 1    | -> | -> | -> | ->             dP = second * second^T     ds = p (dP - delta)
//        ...                                       sums += ds * first,  p * second
//
// Shared memory: first rows | second rows | stage 0 | stage 1, a stage being first columns | second
// columns | sides.
template <class T, int kDim, bool kOfKeys>
__global__ void __launch_bounds__(attention_tiles::kBackwardWarps* kWarp,
                                  attention_tiles::backward_blocks(kDim))
    attention_backward_kernel(const __grid_constant__ Work w) {
    using P = Products<T, kDim>;
    constexpr int kRow = kPitch<T, kDim>;
    constexpr int kStage = attention_tiles::backward_stage(sizeof(T));
    constexpr int64_t kSides = attention_tiles::backward_sides(kDim, sizeof(T));
    constexpr int64_t kStageBytes = attention_tiles::backward_stage_bytes(kDim, sizeof(T));
    static_assert(kSides == 2 * kStage * kRow * int{sizeof(T)});
    static_assert(16 * attention_tiles::kBackwardWarps * kRow * int{sizeof(T)} <=
                  2 * kStageBytes);  // where `out` lies at first
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp, warp = thread / kWarp;
    const int block_rows = static_cast<int>(blockDim.x) / 2;                 // 16 per warp
    const unsigned head = blockIdx.x / static_cast<unsigned>(w.row_blocks);  // of all images
    const int first_row =
        static_cast<int>(blockIdx.x % static_cast<unsigned>(w.row_blocks)) * block_rows;
    const int left_rows = w.rows.count - first_row;
    const int64_t image = head / static_cast<unsigned>(w.heads);
    const int64_t of_image = head % static_cast<unsigned>(w.heads);
    const int queries = kOfKeys ? w.columns.count : w.rows.count;
    const int keys = kOfKeys ? w.rows.count : w.columns.count;
    const float* lse = w.lse + int64_t{head} * queries;
    float* delta = w.delta + int64_t{head} * queries;
    const float* size = w.size == nullptr ? nullptr : w.size + image * keys;

    auto* rows_1 = reinterpret_cast<T*>(device::dynamic_shared());
    T* rows_2 = rows_1 + block_rows * kRow;
    auto* stages = reinterpret_cast<unsigned char*>(rows_2 + block_rows * kRow);
    const auto base = [&](const void* data, const HeadStrides& s, int token) {
        return static_cast<const T*>(data) + image * s.batch + of_image * s.head + token * s.token;
    };
    const auto stage_own = [&](T* tile, const void* data, const HeadStrides& s) {
        stage<T, kDim>(tile, base(data, s, first_row), s.token, left_rows, block_rows, w.dim,
                       w.vector);
    };
    stage_own(rows_1, w.rows.first, w.rows.first_strides);
    stage_own(rows_2, w.rows.second, w.rows.second_strides);
    const int64_t out_stride = w.heads * w.dim;
    const HeadStrides out_strides{w.rows.count * out_stride, w.dim, out_stride};
    if constexpr (!kOfKeys) stage_own(reinterpret_cast<T*>(stages), w.out, out_strides);
    device::cp_async_commit();
    device::cp_async_wait<0>();
    __syncthreads();

    const int own = warp * 16;  // the warp's first row in the block
    Side side[2];               // of the lane's rows, g and g + 8
    if constexpr (!kOfKeys) {
        const float of_row =
            dot_rows<T, kDim>(rows_2 + own * kRow, reinterpret_cast<T*>(stages) + own * kRow);
        const int row = own + lane / 2;
        if (lane % 2 == 0 && row < left_rows) delta[first_row + row] = of_row;
        __syncthreads();  // delta is there; and `out` gives way to the first stages
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + own + lane / 4 + 8 * i;
        side[i] = kOfKeys ? key_side(size, row, keys) : query_side(lse, delta, row, queries);
    }
    constexpr bool kKeepBoth = !kOfKeys || attention_tiles::backward_keeps_both(kDim);
    const auto left_1 = P::template left<true>(rows_1 + own * kRow);
    const auto left_2 = P::template left<kKeepBoth>(rows_2 + own * kRow);
    typename P::Sums sums_1, sums_2;

    // Starts the copy of the columns from `first` on.
    const auto stage_columns = [&](int first, unsigned char* to) {
        auto* tile = reinterpret_cast<T*>(to);
        const auto stage_one = [&](T* tile, const void* data, const HeadStrides& s) {
            stage<T, kDim>(tile, base(data, s, first), s.token, w.columns.count - first, kStage,
                           w.dim, w.vector);
        };
        stage_one(tile, w.columns.first, w.columns.first_strides);
        stage_one(tile + kStage * kRow, w.columns.second, w.columns.second_strides);
        device::cp_async_commit();
    };
    const auto column_side = [&](int column) {
        return kOfKeys ? query_side(lse, delta, column, queries) : key_side(size, column, keys);
    };
    const auto sides_of = [](unsigned char* stage_begin) {
        return reinterpret_cast<Side*>(stage_begin + kSides);
    };
    const float scale = w.scale * kLog2E;

    unsigned char *now = stages, *next = stages + kStageBytes;
    if (w.columns.count > 0) {
        stage_columns(0, now);
        if (thread < kStage) sides_of(now)[thread] = column_side(thread);
    }
#pragma unroll 1
    for (int first = 0; first < w.columns.count; first += kStage) {
        device::cp_async_wait<0>();
        __syncthreads();  // this stage is there for all, and nobody reads the one before any more
        const bool more = first + kStage < w.columns.count;
        Side next_side{};
        if (more) {
            stage_columns(first + kStage, next);
            if (thread < kStage) next_side = column_side(first + kStage + thread);
        }
        const int columns = own >= left_rows ? 0 : w.columns.count - first;
#pragma unroll 1
        for (int c = 0; c < kStage && c < columns; c += 16) {
            const T* tile_1 = reinterpret_cast<const T*>(now) + c * kRow;
            const T* tile_2 = tile_1 + kStage * kRow;
            const Side* column = sides_of(now) + c + lane % 4 * 2;
            float p[2][4], ds[2][4];
            P::dot(p, left_1, tile_1);
            P::dot(ds, left_2, tile_2);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Side of_row = side[i / 2], of_column = column[8 * s + i % 2];
                    p[s][i] = device::exp2_approx(p[s][i] * scale + (of_row.x + of_column.x));
                    ds[s][i] = p[s][i] * (ds[s][i] - (kOfKeys ? of_column.y : of_row.y));
                }
            }
            if constexpr (kOfKeys) P::add(sums_2, p, tile_2);
            P::add(sums_1, ds, tile_1);
        }
        if (more && thread < kStage) sides_of(next)[thread] = next_side;
        unsigned char* const free = now;
        now = next;
        next = free;
    }

    // Nobody but the warp itself reads its rows of the tiles.
    const int count = left_rows - own;
    if (count <= 0) return;
    const int64_t to = image * out_strides.batch + of_image * out_strides.head +
                       (first_row + own) * out_strides.token;
    write_rows<T, kDim>(sums_1, w.scale, rows_1 + own * kRow, static_cast<T*>(w.grad_first) + to,
                        out_stride, count, w.dim, w.vector);
    if constexpr (kOfKeys) {
        write_rows<T, kDim>(sums_2, 1.0f, rows_2 + own * kRow, static_cast<T*>(w.grad_second) + to,
                            out_stride, count, w.dim, w.vector);
    }
}

// --- launches
// -------------------------------------------------------------------------------------

template <class T, int kDim, bool kOfKeys>
cudaError_t launch_one(Work w, int64_t batch, const device::Chip& chip, cudaStream_t stream) {
    const attention_tiles::BackwardCut cut =
        attention_tiles::cut_backward(batch * w.heads, w.rows.count, kDim, sizeof(T),
                                      chip.multiprocessors, chip.shared_per_block);
    const int64_t blocks = batch * w.heads * cut.row_blocks;
    if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    w.row_blocks = static_cast<int>(cut.row_blocks);
    return device::launch(attention_backward_kernel<T, kDim, kOfKeys>,
                          dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(cut.warps * kWarp)),
                          static_cast<size_t>(cut.shared_bytes), stream, w);
}

template <class T, int kDim>
cudaError_t launch_both(const AttentionBackwardParams& p, float* delta, const device::Chip& chip,
                        cudaStream_t stream) {
    const auto fit = [&](const void* data, const HeadStrides& s) {
        return attention_tiles::vectors_fit(reinterpret_cast<uintptr_t>(data), s.batch, s.head,
                                            s.token, p.dim, sizeof(T));
    };
    const HeadStrides of_heads{0, p.dim, p.heads * p.dim};  // out and the gradients
    Work w{};
    w.vector = fit(p.q, p.q_strides) && fit(p.k, p.k_strides) && fit(p.v, p.v_strides) &&
               fit(p.grad, p.grad_strides) && fit(p.out, of_heads) && fit(p.grad_q, of_heads) &&
               fit(p.grad_k, of_heads) && fit(p.grad_v, of_heads);
    w.heads = p.heads;
    w.dim = static_cast<int>(p.dim);
    w.scale = static_cast<float>(p.scale);
    w.size = p.size;
    w.lse = static_cast<const float*>(p.lse);
    w.out = p.out;
    w.delta = delta;
    const Pair queries{p.q, p.grad, p.q_strides, p.grad_strides, static_cast<int>(p.queries)};
    const Pair keys{p.k, p.v, p.k_strides, p.v_strides, static_cast<int>(p.keys)};
    w.rows = queries;
    w.columns = keys;
    w.grad_first = p.grad_q;
    const cudaError_t error = launch_one<T, kDim, false>(w, p.batch, chip, stream);
    if (error != cudaSuccess) return error;
    w.rows = keys;
    w.columns = queries;
    w.grad_first = p.grad_k;
    w.grad_second = p.grad_v;
    return launch_one<T, kDim, true>(w, p.batch, chip, stream);
}

template <class T>
cudaError_t launch_of(const AttentionBackwardParams& p, float* delta, const device::Chip& chip,
                      cudaStream_t stream) {
    switch (attention_tiles::padded_dim(p.dim)) {
        case 32:
            return launch_both<T, 32>(p, delta, chip, stream);
        case 64:
            return launch_both<T, 64>(p, delta, chip, stream);
        case 80:
            return launch_both<T, 80>(p, delta, chip, stream);
        case 96:
            return launch_both<T, 96>(p, delta, chip, stream);
        case 128:
            return launch_both<T, 128>(p, delta, chip, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace attention_backward_detail

size_t attention_backward_cuda_workspace_bytes(const AttentionBackwardParams& p) {
    return static_cast<size_t>(p.batch * p.heads * p.queries) * sizeof(float);
}

cudaError_t attention_backward_cuda(const AttentionBackwardParams& p, void* workspace,
                                    cudaStream_t stream) {
    using namespace attention_backward_detail;
    if (p.batch == 0 || p.heads == 0 || p.dim == 0) return cudaSuccess;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (p.queries > kMost - 64 || p.keys > kMost - 64) return cudaErrorInvalidValue;
    device::Chip chip;
    const cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    auto* delta = static_cast<float*>(workspace);
    if (hopper_takes(p, chip)) return launch_attention_backward_hopper(p, delta, chip, stream);
    switch (p.dtype) {
        case DType::kFloat32:
            return launch_of<float>(p, delta, chip, stream);
        case DType::kFloat16:
            return launch_of<Half>(p, delta, chip, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(p, delta, chip, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome
