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

struct Work {
    Pair rows, columns;  // queries: q, grad; keys: k, v; one is rows, the other columns
    int64_t heads;
    int dim, row_blocks;             // blocks to an image's head
    bool vector;                     // whether 16 bytes at a time may be copied everywhere
    float scale, scale_log2;         // the second times log2(e)
    const float* size;               // (batch, keys) or nullptr
    const float* lse;                // (batch, heads, queries)
    const void* out;                 // (batch, queries, heads, dim)
    float* minus_delta;              // (batch, heads, queries), out for queries
    void *grad_first, *grad_second;  // (batch, count, heads, dim) out; the second for keys only
};

// What a query and a key bring to a logit, in units of log2, and a query to dP:
//   p = exp2(scale log2e s + x of the query + x of the key),   ds = p (dP - delta)
// x is -log2e lse of a query and log2 size of a key. A row or column past the last has -inf, and so
// p = 0. A staged query brings lse as it is, copied as rows are: +inf past the last.

// The warp's sums, scaled, by way of shared memory.
//   tile (kRows, kPitch) shared: free to be overwritten by this warp
//   to   (count, dim) strided, out
template <class P, class T, int kDim, int kRows>
__device__ __forceinline__ void write_rows(const typename P::Sums& sums, float factor, T* tile,
                                           T* to, int64_t stride, int count, int dim, bool vector) {
    __syncwarp();
    P::store(sums, factor, tile);
    __syncwarp();
    attention_cuda_detail::write_tile<T, kDim, kRows>(tile, to, stride, count, dim, vector);
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

// A block owns up to kRows rows per warp of one image's head, and passes over all its columns,
// kStage at a time: while one stage is worked on, the next is copied. A warp owns 32 rows or 16,
// and meets a stage's columns 16 at a time; see attention_backward_products.cuh for what a lane
// holds.
//
//                     stage      stage
//                  | 16 | 16 | 16 | 16 | ...       columns: keys, or queries
//        warp 0    | -> | -> | -> | ->             s  = first  * first^T      p = exp2(..)
//        warp 1    | -> | -> | -> | ->             dP = second * second^T     ds = p (dP - delta)
//        ...                                       sums += ds * first,  p * second
//
// Shared memory: stage 0 | stage 1, a stage being first columns | second columns | what they add to
// logits | -delta. Where rows are not kept in registers: first rows | second rows | the stages.
template <class T, int kDim, bool kOfKeys>
__global__ void __launch_bounds__(attention_tiles::kBackwardWarps* kWarp,
                                  attention_tiles::backward_blocks(kDim, sizeof(T), kOfKeys))
    attention_backward_kernel(const __grid_constant__ Work w) {
    constexpr int kBlocks = attention_tiles::backward_row_blocks(kDim, sizeof(T), kOfKeys);
    constexpr int kRows = 16 * kBlocks;
    using P = Products<T, kDim, kBlocks>;
    constexpr int kRow = kPitch<T, kDim>;
    constexpr int kStage = attention_tiles::backward_stage(kDim, sizeof(T));
    constexpr int64_t kSides = attention_tiles::backward_sides(kDim, sizeof(T));
    constexpr int64_t kStageBytes = attention_tiles::backward_stage_bytes(kDim, sizeof(T));
    constexpr bool kKeepBoth = attention_tiles::backward_keeps_both(kDim, kOfKeys);
    constexpr bool kFromGlobal = attention_tiles::backward_from_global(kDim, sizeof(T), kOfKeys);
    constexpr bool kPark = attention_tiles::backward_parks(kDim, kOfKeys);
    static_assert(kSides == 2 * kStage * kRow * int{sizeof(T)});
    static_assert(kRows * attention_tiles::kBackwardWarps * kRow * int{sizeof(T)} <=
                  2 * kStageBytes);  // where `out` lies at first, or results at last
    // What follows on the stream and is a kernel of this file waits; and so does this one.
    if constexpr (kOfKeys) {
        device::wait_for_earlier_kernels();
    } else {
        device::let_next_kernel_begin();
    }
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int block_rows = static_cast<int>(blockDim.x) / kWarp * kRows;
    const unsigned head = blockIdx.x / static_cast<unsigned>(w.row_blocks);  // of all images
    const int first_row =
        static_cast<int>(blockIdx.x % static_cast<unsigned>(w.row_blocks)) * block_rows;
    const int left_rows = w.rows.count - first_row;
    const unsigned image = head / static_cast<unsigned>(w.heads);
    const unsigned of_image = head % static_cast<unsigned>(w.heads);
    const int queries = kOfKeys ? w.columns.count : w.rows.count;
    const int keys = kOfKeys ? w.rows.count : w.columns.count;
    const float* lse = w.lse + int64_t{head} * queries;
    float* minus_delta = w.minus_delta + int64_t{head} * queries;
    const float* size = w.size == nullptr ? nullptr : w.size + int64_t{image} * keys;

    auto* rows_1 = reinterpret_cast<T*>(device::dynamic_shared());
    T* rows_2 = rows_1 + (kFromGlobal ? 0 : block_rows * kRow);
    auto* stages = reinterpret_cast<unsigned char*>(rows_2 + (kFromGlobal ? 0 : block_rows * kRow));
    const auto base = [&](const void* data, const HeadStrides& s, int token) {
        return static_cast<const T*>(data) + image * s.batch + of_image * s.head + token * s.token;
    };
    const int64_t out_stride = w.heads * w.dim;
    const HeadStrides out_strides{w.rows.count * out_stride, w.dim, out_stride};
    const auto own = static_cast<int>(attention_cuda_detail::turned_warp(head)) * kRows;
    const int count = left_rows - own;  // of the warp's rows; none, or less, if it has no work

    // What a thread copies next: in shared memory where registers are short.
    struct From {
        const T *first, *second;
    };
    auto* const parked = reinterpret_cast<From*>(stages + 2 * kStageBytes) + thread;
    const T* from_1 =
        attention_cuda_detail::copy_from<T, kDim>(base(w.columns.first, w.columns.first_strides, 0),
                                                  w.columns.first_strides.token, w.dim, w.vector);
    const T* from_2 = attention_cuda_detail::copy_from<T, kDim>(
        base(w.columns.second, w.columns.second_strides, 0), w.columns.second_strides.token, w.dim,
        w.vector);
    const auto stage_at = [&](int stage) { return stages + stage * kStageBytes; };
    const auto sides_at = [&](int stage) {
        return reinterpret_cast<float*>(stage_at(stage) + kSides);
    };
    // Starts the copy of the columns from `first` on, each behind the last one's.
    const auto stage_columns = [&](int first, int stage) {
        const int64_t stride_1 = w.columns.first_strides.token;
        const int64_t stride_2 = w.columns.second_strides.token;
        attention_cuda_detail::stage_pair<T, kDim, kStage, kPark>(
            reinterpret_cast<T*>(stage_at(stage)), from_1, stride_1, from_2, stride_2,
            w.columns.count - first, w.dim, w.vector);
        if constexpr (kOfKeys) {
            const int column = first + thread;
            float* const x = sides_at(stage) + thread;
            if (thread < kStage && column < queries) {
                const uint64_t at =
                    uint64_t{device::forget_origin(head)} * static_cast<unsigned>(queries) +
                    static_cast<unsigned>(column);
                device::cp_async_4(x, w.lse + at);
                device::cp_async_4(x + kStage, w.minus_delta + at);
            } else if (thread < kStage) {
                x[0] = INFINITY;
                x[kStage] = 0.0f;
            }
        }
        device::cp_async_commit();
        const unsigned rows = kPark ? device::forget_origin(kStage) : kStage;
        from_1 = device::forget_origin(from_1 + rows * stride_1);
        from_2 = device::forget_origin(from_2 + rows * stride_2);
        if constexpr (kPark) *parked = {from_1, from_2};
    };
    const auto column_x = [&](int column) {
        const float* of_image = w.size;
        if (of_image != nullptr)
            of_image += uint64_t{device::forget_origin(image)} * static_cast<unsigned>(keys);
        return attention_cuda_detail::log2_size(of_image, column, keys);
    };
    float own_x = 0.0f;  // of this thread's column of the stage that is next, if it is a key
    const auto bring_first_x = [&] {
        if (!kOfKeys && thread < kStage) sides_at(0)[thread] = own_x = column_x(thread);
    };

    typename P::template Left<true> left_1;
    typename P::template Left<kKeepBoth> left_2;
    float row_x[kBlocks][2];  // of the lane's rows, g and g + 8 of each 16
    // -delta, which dP begins with: in the layout of dP, the same all along the rows
    [[maybe_unused]] float row_start[kBlocks][2][4];
    if constexpr (kFromGlobal) {
        if (w.columns.count > 0) {
            stage_columns(0, 0);
            bring_first_x();
        }
        const auto own_rows = [&](const void* data, const HeadStrides& s) {
            return P::left_from(base(data, s, first_row + own), s.token, count, w.dim, w.vector);
        };
        left_1 = own_rows(w.rows.first, w.rows.first_strides);
        left_2 = own_rows(w.rows.second, w.rows.second_strides);
        if constexpr (!kOfKeys) {
            float sums[kBlocks][2];
            P::dot_rows(sums, left_2, own_rows(w.out, out_strides));
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                const float of_row = sums[i / 2][i % 2];
                const int row = 8 * i + lane / 4;
                if (lane % 4 == 0 && row < count) minus_delta[first_row + own + row] = -of_row;
#pragma unroll
                for (int j = 0; j < 4; ++j) row_start[i / 2][j / 2][i % 2 * 2 + j % 2] = -of_row;
            }
        }
    } else {
        const auto stage_own = [&](T* tile, const void* data, const HeadStrides& s) {
            attention_cuda_detail::stage_tile<T, kDim>(tile, block_rows, base(data, s, first_row),
                                                       s.token, left_rows, w.dim, w.vector);
        };
        stage_own(rows_1, w.rows.first, w.rows.first_strides);
        stage_own(rows_2, w.rows.second, w.rows.second_strides);
        if constexpr (!kOfKeys) stage_own(reinterpret_cast<T*>(stages), w.out, out_strides);
        device::cp_async_commit();
        device::cp_async_wait<0>();
        __syncthreads();
        if constexpr (!kOfKeys) {
            const float of_row =
                dot_rows<T, kDim>(rows_2 + own * kRow, reinterpret_cast<T*>(stages) + own * kRow);
            if (lane % 2 == 0 && lane / 2 < count)
                minus_delta[first_row + own + lane / 2] = -of_row;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float start = -__shfl_sync(kFullMask, of_row, lane / 4 * 2 + 16 * i);
#pragma unroll
                for (int j = 0; j < 4; ++j) row_start[0][j / 2][i * 2 + j % 2] = start;
            }
            __syncthreads();  // `out` gives way to the first stages
        }
        left_1 = P::template left<true>(rows_1 + own * kRow);
        left_2 = P::template left<kKeepBoth>(rows_2 + own * kRow);
        if (w.columns.count > 0) {
            stage_columns(0, 0);
            bring_first_x();
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
        const int row = first_row + own + lane / 4 + 8 * i;
        row_x[i / 2][i % 2] = kOfKeys         ? attention_cuda_detail::log2_size(size, row, keys)
                              : row < queries ? -kLog2E * lse[row]
                                              : -INFINITY;
    }
    typename P::Sums sums_1, sums_2;

#pragma unroll 1
    for (int first = 0; first < w.columns.count; first += kStage) {
        const int stage = first / kStage % 2;
        device::cp_async_wait<0>();
        // Behind this, the stage is there for all, and nobody reads the one before any more.
        if constexpr (kOfKeys) {
            __syncthreads();
        } else {
            // Columns behind the last have -infinity, too, and are zeros.
            const bool hides = own_x == -INFINITY && first + thread < w.columns.count;
            attention_cuda_detail::sync_shown<T, kDim, kStage>(
                reinterpret_cast<T*>(stage_at(stage)), hides);
        }
        const bool more = first + kStage < w.columns.count;
        float next_x = 0.0f;
        if (more) {
            if constexpr (kPark) from_1 = parked->first, from_2 = parked->second;
            stage_columns(first + kStage, stage ^ 1);
            if (!kOfKeys && thread < kStage) next_x = column_x(first + kStage + thread);
        }
        const int columns = count <= 0                         ? 0
                            : w.columns.count - first < kStage ? w.columns.count - first
                                                               : kStage;
        const unsigned self = device::forget_origin(threadIdx.x);
        const unsigned char* here = stage_at(stage);
        const auto* tile_1 = reinterpret_cast<const T*>(here);
        const float* side = reinterpret_cast<const float*>(here + kSides) + self % 4 * 2;
        const float* const end = side + columns;
#pragma unroll 1
        for (; side < end; side += 16) {
            const T* tile_2 = tile_1 + kStage * kRow;
            float p[kBlocks][2][4], ds[kBlocks][2][4];
            const float none[kBlocks][2][4] = {};
            P::dot(p, left_1, tile_1, none);
            float of_column[2][2];
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const auto x = device::load_vector<float, 2>(side + 8 * s);
                of_column[s][0] = x.v[0], of_column[s][1] = x.v[1];
            }
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int i = 0; i < 4 * kBlocks; ++i) {
                    const float of_row = row_x[i / 4][i % 4 / 2], other = of_column[s][i % 2];
                    const float added = kOfKeys ? of_row - kLog2E * other : of_row + other;
                    float& weight = p[i / 4][s][i % 4];
                    weight = device::exp2_approx(weight * w.scale_log2 + added);
                }
            }
            // Before dP, so that as few registers as possible are in use at once.
            if constexpr (kOfKeys) {
                P::add(sums_2, p, tile_2);
                float start[kBlocks][2][4];
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    const auto y = device::load_vector<float, 2>(side + kStage + 8 * s);
#pragma unroll
                    for (int i = 0; i < 4 * kBlocks; ++i) start[i / 4][s][i % 4] = y.v[i % 2];
                }
                P::dot(ds, left_2, tile_2, start);
            } else {
                P::dot(ds, left_2, tile_2, row_start);
            }
#pragma unroll
            for (int i = 0; i < 8 * kBlocks; ++i)
                ds[i / 8][i / 4 % 2][i % 4] *= p[i / 8][i / 4 % 2][i % 4];
            P::add(sums_1, ds, tile_1);
            tile_1 += 16 * kRow;
        }
        if (!kOfKeys && more && thread < kStage) sides_at(stage ^ 1)[thread] = next_x;
        own_x = next_x;
    }

    if constexpr (kOfKeys) P::clear_hidden(sums_1, sums_2, row_x);
    if constexpr (kFromGlobal) __syncthreads();  // before results take the stages' place
    const unsigned end_thread = device::forget_origin(threadIdx.x);
    const unsigned end_head =
        device::forget_origin(blockIdx.x) / static_cast<unsigned>(w.row_blocks);
    const int end_row = static_cast<int>(blockIdx.x % static_cast<unsigned>(w.row_blocks) *
                                             (device::forget_origin(blockDim.x) / kWarp) +
                                         attention_cuda_detail::turned_warp(end_head, end_thread)) *
                        kRows;
    const int end_count = w.rows.count - end_row;
    if (end_count <= 0) return;
    // Nobody but the warp itself uses these rows.
    T* mine = rows_1 + (kFromGlobal ? static_cast<int>(end_thread / kWarp) * kRows : own) * kRow;
    const auto heads = static_cast<unsigned>(w.heads);
    const int64_t to = end_head / heads * out_strides.batch + end_head % heads * out_strides.head +
                       end_row * out_strides.token;
    write_rows<P, T, kDim, kRows>(sums_1, w.scale, mine, static_cast<T*>(w.grad_first) + to,
                                  out_stride, end_count, w.dim, w.vector);
    if constexpr (kOfKeys) {
        write_rows<P, T, kDim, kRows>(sums_2, 1.0f, mine, static_cast<T*>(w.grad_second) + to,
                                      out_stride, end_count, w.dim, w.vector);
    }
}

// --- launches
// -------------------------------------------------------------------------------------

template <class T, int kDim, bool kOfKeys>
cudaError_t launch_one(Work w, int64_t batch, const device::Chip& chip, cudaStream_t stream) {
    const attention_tiles::BackwardCut cut =
        attention_tiles::cut_backward(batch * w.heads, w.rows.count, kDim, sizeof(T), kOfKeys,
                                      chip.multiprocessors, chip.shared_per_block);
    const int64_t blocks = batch * w.heads * cut.row_blocks;
    if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    w.row_blocks = static_cast<int>(cut.row_blocks);
    constexpr auto kStart = kOfKeys ? device::launch_overlapping<Work> : device::launch<Work>;
    return kStart(attention_backward_kernel<T, kDim, kOfKeys>, dim3(static_cast<unsigned>(blocks)),
                  dim3(static_cast<unsigned>(cut.warps * kWarp)),
                  static_cast<size_t>(cut.shared_bytes), stream, w);
}

template <class T, int kDim>
cudaError_t launch_both(const AttentionBackwardParams& p, float* minus_delta,
                        const device::Chip& chip, cudaStream_t stream) {
    Work w{};
    w.vector = vectors_fit(p);
    w.heads = p.heads;
    w.dim = static_cast<int>(p.dim);
    w.scale = static_cast<float>(p.scale);
    w.scale_log2 = w.scale * kLog2E;
    w.size = p.size;
    w.lse = static_cast<const float*>(p.lse);
    w.out = p.out;
    w.minus_delta = minus_delta;
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
cudaError_t launch_of(const AttentionBackwardParams& p, float* minus_delta,
                      const device::Chip& chip, cudaStream_t stream) {
    switch (attention_tiles::padded_dim(p.dim)) {
        case 32:
            return launch_both<T, 32>(p, minus_delta, chip, stream);
        case 64:
            return launch_both<T, 64>(p, minus_delta, chip, stream);
        case 80:
            return launch_both<T, 80>(p, minus_delta, chip, stream);
        case 96:
            return launch_both<T, 96>(p, minus_delta, chip, stream);
        case 128:
            return launch_both<T, 128>(p, minus_delta, chip, stream);
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
    auto* minus_delta = static_cast<float*>(workspace);
    if (hopper_takes(p, chip)) {
        return launch_attention_backward_hopper(p, minus_delta, stream);
    }
    switch (p.dtype) {
        case DType::kFloat32:
            return launch_of<float>(p, minus_delta, chip, stream);
        case DType::kFloat16:
            return launch_of<Half>(p, minus_delta, chip, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(p, minus_delta, chip, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome
