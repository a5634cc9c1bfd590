// merge_cuda, merge_backward_cuda and unmerge_cuda.
//
// All three move rows of channels. A warp owns one chunk of one output row (tiles.h says how long a
// chunk is), and its lanes own vectors of it, 16 bytes where the addresses allow, else one element:
//
//   row      | chunk 0                                  | chunk 1 ...
//   vectors  | 0 1 2 ... 31 | 32 ... 63 | 64 ... | 96 ... 127 | 128 ...
//   lane     | 0 1 2 ... 31 |  0 ... 31 |  0 ... |  0 ...  31 |   0 ...
//
// blockIdx.y is the image, blockIdx.x and the warp count the chunks of its rows. No two warps write
// one address and no sum is shared between threads, so results never depend on timing.
//
// merge follows match, and is launched while it still runs where the chip can (launch.h).

#include "device.h"
#include "launch.h"
#include "merge_rows.cuh"
#include "tiles.h"
#include "tome_core/cuda.h"

namespace tome {
namespace {

using namespace tome::device;

constexpr int kBlock = kRowsBlock;
constexpr int kUnroll = tiles::kUnroll;

// A kernel's params and what the launch worked out.
template <class P>
struct Work {
    P p;
    int64_t chunks;  // of a row
    int64_t items;   // chunks of an image
};

// This warp's chunks of an image, one after another: body(row, first vector of the chunk).
template <class P, class Body>
__device__ __forceinline__ void for_each_chunk(const Work<P>& work, const Body& body) {
    for_each_item(work.items, [&](int64_t item) {
        // 64-bit divisions are slow, and most rows are one chunk.
        const int64_t row = work.chunks == 1 ? item : item / work.chunks;
        body(row, (item - row * work.chunks) * kUnroll * kWarp);
    });
}

// Copies this warp's chunk of `from` to `to`, all loads before the first store; zeros if null.
template <class T, int kVec>
__device__ __forceinline__ void copy_chunk(const T* from, T* to, int64_t first, int64_t channels) {
    using Bits = typename Word<sizeof(T) * kVec>::Type;
    const Lane lane = Lane::of<kVec>(first, channels);
    Bits held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        held[u] = Bits{};
        if (from != nullptr && lane.has<kVec>(u)) {
            held[u] = load_word<T, kVec>(from + lane.begin + u * kWarp * kVec);
        }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (lane.has<kVec>(u)) {
            store_global<T, kVec>(to + lane.begin + u * kWarp * kVec, held[u]);
        }
    }
}

// --- merge
// ----------------------------------------------------------------------------------------

// The members of an output row, and where their data is.
template <class T>
struct Row {
    const T* x;  // (tokens, channels), rows stride_token apart
    int64_t stride_token, tokens, channels;
    Members members;
    const float* size;  // (tokens), or nullptr for ones
};

// torch.amax's rule: NaN wins, whichever side it is on.
template <class A>
__device__ __forceinline__ A maximum(A a, A b) {
    return a > b || a != a ? a : b;
}

// kCount vectors of a row for each lane: to[c] = sum over members of size * x[c], over `divisor` or
// over the sum of sizes where that is 0; or their maximum. Returns the sum of sizes.
template <class T, int kVec, int kCount, bool kMaximum, class A = typename Accumulate<T>::Type>
__device__ __forceinline__ A reduce_vectors(const Row<T>& row, bool weighted, A divisor, T* to,
                                            int64_t first) {
    const Lane lane = Lane::of<kVec>(first, row.channels);
    A sum[kCount][kVec];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[u][i] = kMaximum ? -A(INFINITY) : A(-0.0f);
    }
    const auto add = [&](int64_t token, A weight) {
        const T* from = row.x + token * row.stride_token + lane.begin;
        Vector<T, kVec> held[kCount];
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
            held[u] = {};
            if (lane.has<kVec>(u)) held[u] = load_vector<T, kVec>(from + u * kWarp * kVec);
        }
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                const A value = widen(held[u].v[i]);
                sum[u][i] = kMaximum ? maximum(value, sum[u][i]) : sum[u][i] + value * weight;
            }
        }
    };
    const A total = for_each_member<A>(row.members, row.tokens, row.size, weighted, add);
    const A by = divisor == 0 ? total : divisor;
    const A inverse = reciprocal(by);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        if (!lane.has<kVec>(u)) continue;
        A out[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            out[i] = kMaximum ? sum[u][i] : divide(sum[u][i], by, inverse);
        }
        store_global<T, kVec>(to + lane.begin + u * kWarp * kVec, narrow_word<T>(out));
    }
    return total;
}

// A chunk of a row with several members, two vectors at a time: more would not leave
// room in 64 registers for their sums and the next member's data.
template <class T, int kVec, bool kMaximum, class A = typename Accumulate<T>::Type>
__device__ __forceinline__ A reduce_chunk(const Row<T>& row, bool weighted, A divisor, T* to,
                                          int64_t first) {
    constexpr int kCount = 2;
    A total = 0;
#pragma unroll 1
    for (int u = 0; u < kUnroll; u += kCount) {
        if (u > 0 && (first + u * kWarp) * kVec >= row.channels) break;
        total = reduce_vectors<T, kVec, kCount, kMaximum>(row, weighted, divisor, to,
                                                          first + u * kWarp);
    }
    return total;
}

// A warp's chunk of row m of image b.
template <class T, int kVec>
__device__ __forceinline__ void merge_chunk(const MergeParams& p, int64_t b, int64_t m,
                                            int64_t first) {
    using A = typename Accumulate<T>::Type;
    const Row<T> row{static_cast<const T*>(p.x) + b * p.stride_batch,
                     p.stride_token,
                     p.tokens,
                     p.channels,
                     members_of(p, b, m),
                     p.size == nullptr ? nullptr : p.size + b * p.tokens};
    const bool sized = row.size != nullptr;
    T* out = static_cast<T*>(p.out) + (b * p.rows + m) * p.channels;
    A total = 0;

    const int64_t only = row.members.count == 1 ? row.members.tokens[0] : -1;
    if (inside(only, p.tokens)) total = sized ? A(row.size[only]) : A(1);
    if (row.members.count == 0) {
        copy_chunk<T, kVec>(nullptr, out, first, p.channels);
    } else if (inside(only, p.tokens) && (p.reduce != Reduce::kSum || total == 1)) {
        copy_chunk<T, kVec>(row.x + only * p.stride_token, out, first, p.channels);
    } else if (p.reduce == Reduce::kAmax) {
        total = reduce_chunk<T, kVec, true>(row, sized, A(1), out, first);
    } else {
        const A divisor = p.reduce == Reduce::kSum ? A(1) : A(0);
        total = reduce_chunk<T, kVec, false>(row, sized, divisor, out, first);
        if (p.reduce == Reduce::kMean && total == 0 && sized) {
            // Padding: nothing says how to weigh it, but it stays finite.
            reduce_chunk<T, kVec, false>(row, false, A(0), out, first);
        }
    }
    if (first == 0 && lane_id() == 0) p.out_size[b * p.rows + m] = static_cast<float>(total);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kBlock, tiles::kBlocksResident)
    merge_kernel(const __grid_constant__ Work<MergeParams> work) {
    const MergeParams& p = work.p;
    wait_for_earlier_kernels();  // they may have written x, size and the plan, and have read `out`
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        for_each_chunk(work,
                       [&](int64_t m, int64_t first) { merge_chunk<T, kVec>(p, b, m, first); });
    }
}

// Two rows of one chunk each to a warp; tiles::pairs_serve says where. Most rows are copies of one
// token: those of both are on their way together, and so are the offsets and the members at the
// places from the first row's number on, among which theirs mostly are.
template <class T, int kVec>
__global__ void __launch_bounds__(kBlock, tiles::kBlocksResident)
    merge_pairs_kernel(const __grid_constant__ Work<MergeParams> work) {
    using Bits = typename Word<sizeof(T) * kVec>::Type;
    const MergeParams& p = work.p;
    wait_for_earlier_kernels();
    const auto own = static_cast<int>(lane_id());
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        for_each_item(work.items, [&](int64_t item) {
            const int64_t m = 2 * item;
            const int count = m + 1 < p.rows ? 2 : 1;
            const int32_t* members = p.members + b * p.tokens;
            const int64_t offset = p.offsets[b * (p.rows + 1) + m + (own < count ? own : count)];
            const int32_t near = m + own < p.tokens ? members[m + own] : -1;

            // Lane 0 has the first row, lane 1 the second.
            const auto begin = static_cast<int32_t>(clamp(offset, 0, p.tokens));
            const int32_t end = __shfl_down_sync(kFullMask, begin, 1);
            const int64_t at = begin - m;
            int32_t only = __shfl_sync(kFullMask, near, static_cast<int>(at & (kWarp - 1)));
            bool copies = own < count && end - begin == 1;
            if (copies && !inside(at, kWarp)) only = members[begin];
            copies = copies && inside(only, p.tokens);
            const float size = copies && p.size != nullptr ? p.size[b * p.tokens + only] : 1.0f;
            if (p.reduce == Reduce::kSum) copies = copies && size == 1.0f;
            if (!copies) only = -1;

            const Lane lane = Lane::of<kVec>(0, p.channels);
            const T* x = static_cast<const T*>(p.x) + b * p.stride_batch + lane.begin;
            T* out = static_cast<T*>(p.out) + (b * p.rows + m) * p.channels + lane.begin;
            Bits held[2][kUnroll];
            int32_t token[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                token[j] = __shfl_sync(kFullMask, only, j);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    held[j][u] = Bits{};
                    if (token[j] >= 0 && lane.has<kVec>(u)) {
                        held[j][u] =
                            load_word<T, kVec>(x + token[j] * p.stride_token + u * kWarp * kVec);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    if (token[j] >= 0 && lane.has<kVec>(u)) {
                        store_global<T, kVec>(out + j * p.channels + u * kWarp * kVec, held[j][u]);
                    }
                }
            }
            if (copies) p.out_size[b * p.rows + m + own] = size;
#pragma unroll 1
            for (int j = 0; j < count; ++j) {
                if (__shfl_sync(kFullMask, only, j) < 0) merge_chunk<T, kVec>(p, b, m + j, 0);
            }
        });
    }
}

// --- merge_backward
// -------------------------------------------------------------------------------

// The row of a place in `members`: the first one whose end lies behind it. `rows` if none does.
__device__ __forceinline__ int64_t row_of(int64_t place, const int32_t* offsets, int64_t rows) {
    int64_t low = 0, high = rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle + 1] > place) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// What a member's token gets of its row's gradient; A is what the elements are summed in.
template <class A>
__device__ __forceinline__ A backward_weight(const MergeBackwardParams& p, int64_t b,
                                             const int32_t* members, int64_t begin, int64_t end,
                                             int64_t token) {
    const bool mean = p.reduce == Reduce::kMean;
    if (end - begin == 1 && mean) return 1;
    const auto even = static_cast<A>(end - begin);
    if (p.size == nullptr) return mean ? divide(A(1), even, reciprocal(even)) : A(1);
    const float* size = p.size + b * p.tokens;
    if (!mean) return size[token];
    A total = 0;
    for (int64_t m = begin; m < end; ++m) {
        if (inside(members[m], p.tokens)) total += A(size[members[m]]);
    }
    const A share = total == 0 ? A(1) : A(size[token]);
    const A of = total == 0 ? even : total;
    return divide(share, of, reciprocal(of));
}

// A warp owns a chunk of the token at one place of `members`: long rows and short ones cost a place
// the same, and the places behind the last row are the dropped tokens.
template <class T, int kVec>
__global__ void __launch_bounds__(kBlock)
    merge_backward_kernel(const __grid_constant__ Work<MergeBackwardParams> work) {
    using A = typename Accumulate<T>::Type;
    const MergeBackwardParams& p = work.p;
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        const int32_t* offsets = p.offsets + b * (p.rows + 1);
        const int32_t* members = p.members + b * p.tokens;
        for_each_chunk(work, [&](int64_t place, int64_t first) {
            const int64_t token = members[place];
            if (!inside(token, p.tokens)) return;
            T* out = static_cast<T*>(p.out) + (b * p.tokens + token) * p.channels;
            const int64_t row = row_of(place, offsets, p.rows);
            if (row == p.rows) {
                copy_chunk<T, kVec>(nullptr, out, first, p.channels);
                return;
            }
            const int64_t begin = clamp(offsets[row], 0, p.tokens);
            const int64_t end = clamp(offsets[row + 1], begin, p.tokens);
            const A weight = backward_weight<A>(p, b, members, begin, end, token);
            const T* grad = static_cast<const T*>(p.grad) + b * p.stride_batch + row * p.stride_row;
            if (weight == 1) {
                copy_chunk<T, kVec>(grad, out, first, p.channels);
                return;
            }
            const Lane lane = Lane::of<kVec>(first, p.channels);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                if (!lane.has<kVec>(u)) continue;
                const int64_t c = lane.begin + u * kWarp * kVec;
                const Vector<T, kVec> value = load_vector<T, kVec>(grad + c);
                A weighed[kVec];
#pragma unroll
                for (int i = 0; i < kVec; ++i) weighed[i] = widen(value.v[i]) * weight;
                store_global<T, kVec>(out + c, narrow_word<T>(weighed));
            }
        });
    }
}

// --- unmerge
// --------------------------------------------------------------------------------------

// T is any type of the elements' size.
template <class T, int kVec>
__global__ void __launch_bounds__(kBlock)
    unmerge_kernel(const __grid_constant__ Work<UnmergeParams> work) {
    const UnmergeParams& p = work.p;
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        for_each_chunk(work, [&](int64_t token, int64_t first) {
            const int64_t row = p.assign[b * p.tokens + token];
            const T* x = static_cast<const T*>(p.x) + b * p.stride_batch;
            copy_chunk<T, kVec>(inside(row, p.rows) ? x + row * p.stride_row : nullptr,
                                static_cast<T*>(p.out) + (b * p.tokens + token) * p.channels, first,
                                p.channels);
        });
    }
}

// --- launches
// -------------------------------------------------------------------------------------

template <class P>
using Kernel = void (*)(Work<P>);

template <class P>
using Launch = cudaError_t (*)(Kernel<P>, dim3, dim3, size_t, cudaStream_t, const Work<P>&);

// Whether all addresses allow 16 bytes at a time.
template <class P>
bool vectors_serve(const P& p, const void* from, const void* to, int64_t stride_batch,
                   int64_t stride_row, int64_t element) {
    return tiles::vectors_fit(reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(to),
                              stride_batch * element, stride_row * element, p.channels * element);
}

// Starts `vectors` if they serve, else `elements`. `rows` are the output's, of every image.
template <class P>
cudaError_t launch_rows(Launch<P> start, Kernel<P> vectors, Kernel<P> elements, const P& p,
                        const void* from, const void* to, int64_t stride_batch, int64_t stride_row,
                        int64_t rows, int64_t element, cudaStream_t stream) {
    if (p.batch == 0 || rows == 0) return cudaSuccess;
    const bool fit = vectors_serve(p, from, to, stride_batch, stride_row, element);
    const int64_t chunks = tiles::chunks_per_row(p.channels, fit ? 16 / element : 1);
    Work<P> work{p, chunks > 0 ? chunks : 1, 0};  // a row without channels still has a size
    work.items = rows * work.chunks;
    return start(fit ? vectors : elements, grid_of(work.items, p.batch), dim3(kBlock), 0, stream,
                 work);
}

}  // namespace

cudaError_t merge_cuda(const MergeParams& p, cudaStream_t stream) {
    const auto go = [&]<class T>(T) {
        constexpr int kVec = 16 / sizeof(T);
        if constexpr (sizeof(T) == 2) {
            if (vectors_serve(p, p.x, p.out, p.stride_batch, p.stride_token, sizeof(T))) {
                Chip chip;
                const cudaError_t error = current_chip(chip);
                if (error != cudaSuccess) return error;
                if (tiles::pairs_serve(p.batch * p.rows, p.channels * int64_t{sizeof(T)},
                                       chip.multiprocessors)) {
                    const Work<MergeParams> work{p, 1, (p.rows + 1) / 2};
                    return launch_overlapping(merge_pairs_kernel<T, kVec>,
                                              grid_of(work.items, p.batch), dim3(kBlock), 0, stream,
                                              work);
                }
            }
        }
        return launch_rows<MergeParams>(launch_overlapping, merge_kernel<T, kVec>,
                                        merge_kernel<T, 1>, p, p.x, p.out, p.stride_batch,
                                        p.stride_token, p.rows, sizeof(T), stream);
    };
    return for_dtype(p.dtype, go);
}

cudaError_t merge_backward_cuda(const MergeBackwardParams& p, cudaStream_t stream) {
    const auto go = [&]<class T>(T) {
        constexpr int kVec = 16 / sizeof(T);
        return launch_rows<MergeBackwardParams>(
            launch, merge_backward_kernel<T, kVec>, merge_backward_kernel<T, 1>, p, p.grad, p.out,
            p.stride_batch, p.stride_row, p.tokens, sizeof(T), stream);
    };
    return for_dtype(p.dtype, go);
}

cudaError_t unmerge_cuda(const UnmergeParams& p, cudaStream_t stream) {
    const auto go = [&]<class T>(T) {
        constexpr int kVec = 16 / sizeof(T);
        return launch_rows<UnmergeParams>(launch, unmerge_kernel<T, kVec>, unmerge_kernel<T, 1>, p,
                                          p.x, p.out, p.stride_batch, p.stride_row, p.tokens,
                                          sizeof(T), stream);
    };
    switch (element_size(p.dtype)) {
        case 2:
            return go(uint16_t{});
        case 4:
            return go(uint32_t{});
        default:
            return go(uint64_t{});
    }
}

}  // namespace tome
