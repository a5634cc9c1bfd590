// merge_add_norm_cuda: residual sum, merge by weighted mean and LayerNorm in one pass over memory.
//
// A warp owns an output row. Its lanes hold vectors of it, as in merge.cu, but all of the row at
// once, in registers: x and branch are read once, out and normed written once, and the statistics
// take two passes over registers, mean first, that cost no memory. Rows too long for that, rows
// that are not a multiple of 16 bytes, and float64 go through the same code a group of vectors at a
// time, with `out` read back for each pass over the row. A lane reads back only what it wrote
// itself.
//
// Kept norms take a pass over each token of a row of several, and one over their sum, before that:
// few rows have several, and what they are made of is then in the cache.
//
// No sum is shared between threads but by shuffles in a fixed order, so results never depend on
// timing. Like merge, it is launched while the kernel before it still runs where the chip can.

#include "device.h"
#include "launch.h"
#include "merge_rows.cuh"
#include "tiles.h"
#include "tome_core/cuda.h"

namespace tome {
namespace {

using namespace tome::device;

// An image's tokens.
template <class T>
struct Tokens {
    const T* x;       // (tokens, channels), rows x_stride apart
    const T* branch;  // (tokens, channels), rows branch_stride apart
    int64_t x_stride, branch_stride;
    const T* scale;  // (channels), or nullptr for ones
};

template <class T, int kVec>
using Bits = typename Word<sizeof(T) * kVec>::Type;

// A vector of a (channels) array, of which a null one holds `absent` everywhere.
template <class T, int kVec>
__device__ __forceinline__ Bits<T, kVec> load_channels(const T* from, int64_t c, bool has,
                                                       float absent) {
    Vector<T, kVec> fill;
#pragma unroll
    for (int i = 0; i < kVec; ++i) fill.v[i] = narrow<T>(absent);
    Bits<T, kVec> out = as_word(fill);
    if (from != nullptr && has) out = load_word<T, kVec>(from + c);
    return out;
}

// sum += weight * (x + scale * branch) of a token, for kCount vectors of each lane; where kOnly,
// sum = x + scale * branch. kMost: vectors of x in flight.
template <bool kOnly, int kMost, bool kScaled, class T, int kVec, int kCount, class A>
__device__ __forceinline__ void add_scaled(const Tokens<T>& from, int64_t token, A weight,
                                           const Lane& lane, A (&sum)[kCount][kVec]) {
    constexpr int kStep = kCount < kMost ? kCount : kMost;
    const T* from_x = from.x + token * from.x_stride + lane.begin;
    const T* from_branch = from.branch + token * from.branch_stride + lane.begin;
    const T* from_scale = from.scale + lane.begin;
#pragma unroll
    for (int u = 0; u < kCount; u += kStep) {
        // Else the compiler loads all groups', and the scales for all members, before it computes
        // anything, and has no registers to keep them.
        if (kMost < 8 || u > 0) __syncwarp();
        Bits<T, kVec> held_x[kStep], held_branch[kStep], held_scale[kStep];
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
            held_x[s] = held_branch[s] = held_scale[s] = Bits<T, kVec>{};
            if (u + s < kCount && lane.has<kVec>(u + s)) {
                held_x[s] = load_word<T, kVec>(from_x + (u + s) * kWarp * kVec);
                held_branch[s] = load_word<T, kVec>(from_branch + (u + s) * kWarp * kVec);
                if (kScaled) {
                    held_scale[s] = load_word<T, kVec>(from_scale + (u + s) * kWarp * kVec);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
            if (u + s >= kCount) continue;
            const auto x = as_vector<T, kVec>(held_x[s]);
            const auto branch = as_vector<T, kVec>(held_branch[s]);
            const auto scale = as_vector<T, kVec>(held_scale[s]);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                const A added =
                    kScaled ? widen(scale.v[i]) * widen(branch.v[i]) : widen(branch.v[i]);
                const A value = widen(x.v[i]) + added;
                sum[u + s][i] = kOnly ? value : sum[u + s][i] + weight * value;
            }
        }
    }
}

// Loads in flight: all if nothing else is held, else as many as leave room for the sums.
template <bool kOnly, int kMost = kOnly ? 8 : 2, class T, int kVec, int kCount, class A>
__device__ __forceinline__ void add_token(const Tokens<T>& from, int64_t token, A weight,
                                          const Lane& lane, A (&sum)[kCount][kVec]) {
    if (from.scale == nullptr) {
        add_scaled<kOnly, kMost, false>(from, token, weight, lane, sum);
    } else {
        add_scaled<kOnly, kMost, true>(from, token, weight, lane, sum);
    }
}

template <int kVec, int kCount, class A>
__device__ __forceinline__ void clear(A (&row)[kCount][kVec]) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) row[u][i] = 0;
    }
}

// The only member of a row; -1 if there are several or none, or it lies outside the image.
__device__ __forceinline__ int64_t only_member(const Members& members, int64_t tokens) {
    const int64_t only = members.count == 1 ? members.tokens[0] : -1;
    return inside(only, tokens) ? only : -1;
}

// Whether members count by their sizes: sizes that sum to 0 are padding, and taken evenly it stays
// finite. `total`: of the sizes.
template <class A>
__device__ __forceinline__ bool weighs(const MergeAddNormParams& p, const Members& members,
                                       const float* size, A& total) {
    total = for_each_member<A>(members, p.tokens, size, size != nullptr, [](int64_t, A) {});
    return size != nullptr && total != 0;
}

// kCount vectors of each lane: the merged row's, `stretch` times as long, before rounding. Returns
// the sum of sizes.
template <class T, int kVec, int kCount, class A>
__device__ __forceinline__ A merge_vectors(const MergeAddNormParams& p, const Tokens<T>& from,
                                           const Members& members, const float* size, A stretch,
                                           const Lane& lane, A (&row)[kCount][kVec]) {
    clear(row);
    if (members.count == 0) return 0;
    const int64_t only = only_member(members, p.tokens);
    if (only >= 0) {  // most rows
        add_token<true>(from, only, A(1), lane, row);
        return size != nullptr ? A(size[only]) : A(1);
    }
    const auto add = [&](int64_t token, A weight) {
        add_token<false>(from, token, weight, lane, row);
    };
    A total;
    const bool weighted = weighs(p, members, size, total);
    const A by = for_each_member<A>(members, p.tokens, size, weighted, add);
    const A inverse = reciprocal(by);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) row[u][i] = divide(row[u][i], by, inverse) * stretch;
    }
    return total;
}

// The same sum in every lane, to the bit.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
    for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kFullMask, x, by);
    return x;
}

// The sum of (value - center)^2, or of the values where not kSquares, over a lane's vectors.
template <bool kSquares, int kVec, int kCount, class A>
__device__ __forceinline__ A lane_sum(const A (&row)[kCount][kVec], A center, const Lane& lane) {
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        if (!lane.has<kVec>(u)) continue;
        A part = 0;  // chains of its own: shorter, and more exact
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            const A value = row[u][i] - center;
            part += kSquares ? value * value : row[u][i];
        }
        sum += part;
    }
    return sum;
}

// By what the mean of several tokens is multiplied to be as long as they are on average; 1 where
// that isn't finite, as of tokens that cancel out. `row` is for the vectors of a group at a time.
template <class T, int kVec, int kCount, class A, class ForEachGroup>
__device__ __forceinline__ A stretch_of(const MergeAddNormParams& p, const Tokens<T>& from,
                                        const Members& members, const float* size,
                                        const ForEachGroup& for_each_group,
                                        A (&row)[kCount][kVec]) {
    if (members.count == 0 || only_member(members, p.tokens) >= 0) return 1;
    constexpr int kMost = 2;  // in flight, or registers spill
    A total;
    const bool weighted = weighs(p, members, size, total);
    A lengths = 0, squares;
    for_each_member<A>(members, p.tokens, size, weighted, [&](int64_t token, A weight) {
        squares = 0;
        for_each_group([&](const Lane& lane) {
            clear(row);
            add_token<true, kMost>(from, token, A(1), lane, row);
            squares += lane_sum<true>(row, A(0), lane);
        });
        lengths += weight * square_root(warp_sum(squares));
    });
    squares = 0;
    for_each_group([&](const Lane& lane) {
        clear(row);
        for_each_member<A>(members, p.tokens, size, weighted, [&](int64_t token, A weight) {
            add_token<false, kMost>(from, token, weight, lane, row);
        });
        squares += lane_sum<true>(row, A(0), lane);
    });
    // Of the sum, not of the mean: what both are divided by cancels out.
    const A length = square_root(warp_sum(squares));
    const A stretch = divide(lengths, length, reciprocal(length));
    return stretch - stretch == 0 ? stretch : A(1);
}

// normed = (row - mean) * inverse * weight + bias, for kCount vectors of each lane.
template <class T, int kVec, int kCount, class A>
__device__ __forceinline__ void write_normed(const MergeAddNormParams& p, T* normed, A mean,
                                             A inverse, const Lane& lane,
                                             const A (&row)[kCount][kVec]) {
    // The compiler cannot know that a store to `normed` leaves the weights alone: several vectors'
    // are loaded before the first store.
    constexpr int kStep = kCount < 4 ? kCount : 4;
    const auto* weight = static_cast<const T*>(p.weight);
    const auto* bias = static_cast<const T*>(p.bias);
#pragma unroll
    for (int u = 0; u < kCount; u += kStep) {
        Bits<T, kVec> weights[kStep], biases[kStep];
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
            const int64_t c = lane.begin + (u + s) * kWarp * kVec;
            const bool has = u + s < kCount && lane.has<kVec>(u + s);
            weights[s] = load_channels<T, kVec>(weight, c, has, 1.0f);
            biases[s] = load_channels<T, kVec>(bias, c, has, 0.0f);
        }
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
            if (u + s >= kCount || !lane.has<kVec>(u + s)) continue;
            const auto w = as_vector<T, kVec>(weights[s]);
            const auto added = as_vector<T, kVec>(biases[s]);
            A out[kVec];
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                const A value = (row[u + s][i] - mean) * inverse;
                out[i] = value * widen(w.v[i]) + widen(added.v[i]);
            }
            store_word<T, kVec>(normed + lane.begin + (u + s) * kWarp * kVec, narrow_word<T>(out));
        }
    }
}

// A row in registers (kWhole: it has at most kCount * kVec * kWarp channels) or group by group.
template <class T, int kVec, int kCount, bool kWhole, bool kKeepNorms>
__global__ void __launch_bounds__(kRowsBlock,
                                  tiles::norm_blocks_resident(kWhole ? kVec* kCount : 0,
                                                              std::is_same_v<T, float>, kKeepNorms))
    merge_add_norm_kernel(const __grid_constant__ MergeAddNormParams p) {
    using A = typename Accumulate<T>::Type;
    wait_for_earlier_kernels();  // as merge does
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        for_each_item(p.rows, [&](int64_t m) {
            const Tokens<T> from{static_cast<const T*>(p.x) + b * p.x_stride_batch,
                                 static_cast<const T*>(p.branch) + b * p.branch_stride_batch,
                                 p.x_stride_token, p.branch_stride_token,
                                 static_cast<const T*>(p.scale)};
            const Members members = members_of(p, b, m);
            const float* size = p.size == nullptr ? nullptr : p.size + b * p.tokens;
            T* out = static_cast<T*>(p.out) + (b * p.rows + m) * p.channels;
            T* normed = static_cast<T*>(p.normed) + (b * p.rows + m) * p.channels;
            A row[kCount][kVec];

            // body(lane) for each group of vectors of the row, and at least once.
            const auto for_each_group = [&](const auto& body) {
                int64_t first = 0;
#pragma unroll 1
                do {
                    body(Lane::of<kVec>(first, p.channels));
                    first += kCount * kWarp;
                } while (!kWhole && first * kVec < p.channels);
            };
            const auto read_back = [&](const Lane& lane) {
                if constexpr (kWhole) return;
#pragma unroll
                for (int u = 0; u < kCount; ++u) {
                    if (!lane.has<kVec>(u)) continue;
                    const auto held = load_vector<T, kVec>(out + lane.begin + u * kWarp * kVec);
#pragma unroll
                    for (int i = 0; i < kVec; ++i) row[u][i] = widen(held.v[i]);
                }
            };

            A stretch = 1, total = 0, sum = 0, squares = 0;
            if (kKeepNorms) stretch = stretch_of(p, from, members, size, for_each_group, row);
            for_each_group([&](const Lane& lane) {
                total = merge_vectors(p, from, members, size, stretch, lane, row);
#pragma unroll
                for (int u = 0; u < kCount; ++u) {
                    const Bits<T, kVec> bits = narrow_word<T>(row[u]);
                    const auto rounded = as_vector<T, kVec>(bits);
#pragma unroll
                    for (int i = 0; i < kVec; ++i) row[u][i] = widen(rounded.v[i]);
                    if (lane.has<kVec>(u)) {
                        store_word<T, kVec>(out + lane.begin + u * kWarp * kVec, bits);
                    }
                }
                sum += lane_sum<false>(row, A(0), lane);
            });
            const A channels = static_cast<A>(p.channels);
            const A per_channel = reciprocal(channels);
            const A mean = divide(warp_sum(sum), channels, per_channel);
            for_each_group([&](const Lane& lane) {
                read_back(lane);
                squares += lane_sum<true>(row, mean, lane);
            });
            const A variance = divide(warp_sum(squares), channels, per_channel);
            const A inverse = inverse_sqrt(variance + static_cast<A>(p.eps));
            for_each_group([&](const Lane& lane) {
                read_back(lane);
                write_normed(p, normed, mean, inverse, lane, row);
            });
            if (lane_id() == 0) p.out_size[b * p.rows + m] = static_cast<float>(total);
        });
    }
}

using Kernel = void (*)(MergeAddNormParams);

// The kernel for rows of `channels`; `fit`: whose addresses allow 16 bytes at a time.
template <class T, bool kKeepNorms>
Kernel kernel_for(int64_t channels, bool fit) {
    constexpr int kVec = 16 / sizeof(T);
    if (!fit) return merge_add_norm_kernel<T, 1, tiles::kNormElements, false, kKeepNorms>;
    if constexpr (!std::is_same_v<T, double>) {
        switch (tiles::norm_elements(channels)) {
            case 8:
                return merge_add_norm_kernel<T, kVec, 8 / kVec, true, kKeepNorms>;
            case 16:
                return merge_add_norm_kernel<T, kVec, 16 / kVec, true, kKeepNorms>;
            case 24:
                return merge_add_norm_kernel<T, kVec, 24 / kVec, true, kKeepNorms>;
            case 32:
                return merge_add_norm_kernel<T, kVec, 32 / kVec, true, kKeepNorms>;
            case 64:
                if constexpr (!kKeepNorms || !std::is_same_v<T, float>) {  // or registers spill
                    return merge_add_norm_kernel<T, kVec, 64 / kVec, true, kKeepNorms>;
                }
                break;
            default:
                break;
        }
    }
    return merge_add_norm_kernel<T, kVec, tiles::kNormVectors, false, kKeepNorms>;
}

}  // namespace

cudaError_t merge_add_norm_cuda(const MergeAddNormParams& p, cudaStream_t stream) {
    if (p.batch == 0 || p.rows == 0) return cudaSuccess;
    const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
    const auto go = [&]<class T>(T) {
        constexpr int64_t kElement = sizeof(T);
        const bool fit =
            tiles::vectors_fit(address(p.x) | address(p.branch) | address(p.scale) |
                                   address(p.weight) | address(p.bias),
                               address(p.out) | address(p.normed),
                               (p.x_stride_batch * kElement) | (p.branch_stride_batch * kElement),
                               (p.x_stride_token * kElement) | (p.branch_stride_token * kElement),
                               p.channels * kElement);
        const Kernel kernel = p.keep_norms ? kernel_for<T, true>(p.channels, fit)
                                           : kernel_for<T, false>(p.channels, fit);
        return launch_overlapping(kernel, grid_of(p.rows, p.batch), dim3(kRowsBlock), 0, stream, p);
    };
    return for_dtype(p.dtype, go);
}

}  // namespace tome
