// match without tensor cores: float64, whose scores they don't give, and rows of so many channels
// that no tile of them fits shared memory. Correct for all dtypes and sizes; not tuned.
#include "launch.h"
#include "match_finish.cuh"
#include "match_kernels.h"

namespace tome::match_cuda_detail {
namespace {

using device::BFloat;
using device::Half;
using device::kFullMask;
using match_tiles::kPlainDepth;
using match_tiles::kPlainRows;
using match_tiles::kThreads;

static_assert(kThreads == kPlainRows * kPlainRows, "a thread per pair");
static_assert(kPlainRows <= device::kWarp);

// Sum over heads of one channel of one token, over their number.
//   x (heads, dim)  the token's metric in every head
template <class In>
__device__ __forceinline__ auto mean_heads(const In* x, const MatchParams& p, int64_t d) {
    using T = typename device::Accumulate<In>::Type;
    T sum = device::widen(x[d]);
    for (int64_t h = 1; h < p.heads; ++h) sum += device::widen(x[h * p.stride_head + d]);
    return sum * (T(1) / static_cast<T>(p.heads));
}

// Brings a row to length 1 in two steps that neither overflow nor vanish: value * scale * by.
template <class T>
struct Factor {
    T scale, by;
};

// 16 tokens, 16 lanes each.
//   image   (heads, tokens, dim) strided
//   set     (count) rows
//   factors (kPlainRows) shared, out
//   usable  (kPlainRows) shared, out: 0 where the token holds NaN or infinity, takes no part or is
//   past
//           `count`
template <class In, class T, class Set>
__device__ void measure_rows(const MatchParams& p, const In* image, const Set& set, int64_t count,
                             Factor<T>* factors, unsigned char* usable) {
    const int row = static_cast<int>(threadIdx.x) / kPlainRows;
    const int lane = static_cast<int>(threadIdx.x) % kPlainRows;
    const bool exists = row < count;
    const In* x = image + set.token(exists ? row : 0) * p.stride_token;
    T largest = 0;
    int bad = 0;
    for (int64_t d = lane; exists && d < p.dim; d += kPlainRows) {
        const T value = mean_heads(x, p, d);
        const T size = value < 0 ? -value : value;
        largest = size > largest ? size : largest;
        bad |= !(size <= (sizeof(T) == 8 ? T(1.7976931348623157e308) : T(3.4028234663852886e38f)));
    }
    for (int by = kPlainRows / 2; by > 0; by /= 2) {
        const T other = __shfl_xor_sync(kFullMask, largest, by);
        largest = other > largest ? other : largest;
        bad |= __shfl_xor_sync(kFullMask, bad, by);
    }
    const bool zero = bad || largest == 0;
    const T scale = scale_for(zero ? T(1) : largest);
    T square = 0;
    for (int64_t d = lane; exists && !zero && d < p.dim; d += kPlainRows) {
        const T value = mean_heads(x, p, d) * scale;
        square += value * value;
    }
    for (int by = kPlainRows / 2; by > 0; by /= 2) {
        square += __shfl_xor_sync(kFullMask, square, by);
    }
    if (lane == 0) {
        factors[row] = {scale, zero ? T(0) : T(1) / static_cast<T>(sqrt(square))};
        usable[row] = exists && !bad && set.takes_part(row);
    }
}

// Channels [begin, begin + kPlainDepth) of 16 tokens at length 1; zeros past the end.
//   out (kPlainRows, kPlainDepth + 1) shared, out
template <class In, class T, class Set>
__device__ void stage_step(const MatchParams& p, const In* image, const Set& set, int64_t count,
                           int64_t begin, const Factor<T>* factors, T* out) {
    for (int i = static_cast<int>(threadIdx.x); i < kPlainRows * kPlainDepth; i += kThreads) {
        const int row = i / kPlainDepth, d = i % kPlainDepth;
        T value = 0;
        if (row < count && begin + d < p.dim && factors[row].by != 0) {
            const In* x = image + set.token(row) * p.stride_token;
            value = mean_heads(x, p, begin + d) * factors[row].scale * factors[row].by;
        }
        out[row * (kPlainDepth + 1) + d] = value;
    }
}

// A block owns 16 A tokens of one image and passes over all of set B, 16 tokens at a time; a thread
// owns a pair of each such tile, and keeps the best of its pairs. Then the 16 lanes of a row join.
//
//                 16 of B     16 of B
//              +-----------+-----------+-
//   16 of A    | thread =  |           |     scores: one chain of multiply-adds over dim, staged
//              | (row, col)| --> next  |     kPlainDepth channels at a time
//              +-----------+-----------+-
template <class In, bool kListed>
__global__ void __launch_bounds__(kThreads, 2)
    match_plain_kernel(const __grid_constant__ MatchArgs m) {
    device::let_next_kernel_begin();  // merge: see match.cu
    using T = typename device::Accumulate<In>::Type;
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / kPlainRows, column = thread % kPlainRows;
    const int64_t image = blockIdx.x / m.blocks_per_image;
    const int64_t begin_a = int64_t{blockIdx.x % m.blocks_per_image} * kPlainRows;

    unsigned char* shared = device::dynamic_shared();
    constexpr int kStride = kPlainDepth + 1;
    T* a = reinterpret_cast<T*>(shared);
    T* b = a + kPlainRows * kStride;
    auto* factors_a = reinterpret_cast<Factor<T>*>(b + kPlainRows * kStride);
    Factor<T>* factors_b = factors_a + kPlainRows;
    auto* usable_a = reinterpret_cast<unsigned char*>(factors_b + kPlainRows);
    unsigned char* usable_b = usable_a + kPlainRows;

    const In* metric = static_cast<const In*>(m.p.metric) + image * m.p.stride_batch;
    const RowsOf<kListed> set_a(m, image, true, begin_a);
    const int64_t count_a = m.sets.num_a - begin_a;
    measure_rows<In, T>(m.p, metric, set_a, count_a, factors_a, usable_a);
    Packed best = 0;  // ordered score
    auto best_column = static_cast<int32_t>(0);
    for (int64_t tile = 0; tile < m.sets.num_b; tile += kPlainRows) {
        const RowsOf<kListed> set_b(m, image, false, tile);
        const int64_t count_b = m.sets.num_b - tile;
        measure_rows<In, T>(m.p, metric, set_b, count_b, factors_b, usable_b);
        __syncthreads();
        T score = 0;
        for (int64_t begin = 0; begin < m.p.dim; begin += kPlainDepth) {
            stage_step<In, T>(m.p, metric, set_a, count_a, begin, factors_a, a);
            stage_step<In, T>(m.p, metric, set_b, count_b, begin, factors_b, b);
            __syncthreads();
            const int64_t left = m.p.dim - begin;
            const int depth = left < kPlainDepth ? static_cast<int>(left) : kPlainDepth;
            for (int d = 0; d < depth; ++d) {
                score += a[row * kStride + d] * b[column * kStride + d];
            }
            __syncthreads();
        }
        const Packed candidate = ordered(score);
        if (usable_a[row] && usable_b[column] && candidate > best) {
            best = candidate;
            best_column = static_cast<int32_t>(tile) + column;
        }
        __syncthreads();  // before factors_b and usable_b are another tile's
    }
    for (int by = kPlainRows / 2; by > 0; by /= 2) {
        const Packed other = __shfl_xor_sync(kFullMask, best, by);
        const int32_t other_column = __shfl_xor_sync(kFullMask, best_column, by);
        if (other > best || (other == best && other_column < best_column)) {
            best = other;
            best_column = other_column;
        }
    }
    if (column == 0 && row < count_a) {
        const int64_t at = image * m.sets.num_a + begin_a + row;
        if constexpr (sizeof(T) == 8) {
            m.best[at] = best;
            m.columns[at] = best_column;
        } else {
            m.best[at] = best == 0 ? 0 : best << 32 | ~static_cast<uint32_t>(best_column);
        }
    }
    if (!last_block_of_image(m, image, shared)) return;
    if constexpr (kListed) {
        finish_listed_image<T>(m, image, shared);
    } else {
        finish_image<T>(m, image, shared);
    }
}

template <class In>
cudaError_t launch_of(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const auto kernel = m.listed() ? match_plain_kernel<In, true> : match_plain_kernel<In, false>;
    return device::launch(kernel, grid, dim3(kThreads), static_cast<size_t>(m.tiles.shared_bytes),
                          stream, m);
}

}  // namespace

cudaError_t launch_match_plain(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    switch (m.p.dtype) {
        case DType::kFloat32:
            return launch_of<float>(m, grid, stream);
        case DType::kFloat16:
            return launch_of<Half>(m, grid, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(m, grid, stream);
        case DType::kFloat64:
            return launch_of<double>(m, grid, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome::match_cuda_detail
