// cls_attention_cuda: the class token's attention, averaged over heads, in two launches.
#include <limits>

#include "attention_tile.cuh"
#include "launch.h"
#include "tome_core/cuda.h"

namespace tome {
namespace attention_cuda_detail {
namespace {

using attention_tiles::kClsMeanThreads;
using attention_tiles::kClsWarps;

struct ClsArgs {
    ClsAttentionParams p;
    float scale_log2;  // scale * log2(e): logits are in units of log2
    uint32_t heads, tiles, items;
    float* logits;  // (batch, heads, keys) workspace
};

// Which keys a warp multiplies, and how: of 16-bit floats, a head's class token by tensor cores,
// else by plain multiply-adds. Afterwards a lane has the sum of one key.
template <class T, int kCount, bool kTensorCores = sizeof(T) == 2 && kCount == 8>
struct Product;

// A key is a row of `a`, and every column of `b` is the query, so each of the four lanes of a row
// ends with its sum. A lane takes 16 bytes of a row as they lie, which are its k of two mma: k may
// be in any order that both sides agree on.
//
//              lane 4 g    4 g + 1   4 g + 2   4 g + 3
//   channels  | 0 .. 7  | 8 .. 15 | 16 .. 23 | 24 .. 31 |   of keys g and g + 8 of 16
template <class T>
struct Product<T, 8, true> {
    static constexpr int kGroups = attention_tiles::kClsGroups;
    static constexpr int kKeys = 16 * kGroups;
    static constexpr int kVectors = 2;  // on their way at once, of each row: 64 channels

    // Which of the warp's keys this lane has the sum of.
    __device__ static int key() {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        return lane % 4 * 8 + lane / 4;
    }

    __device__ static float sum(const ClsAttentionParams& p, const T* q, const T* k,
                                int64_t first) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const int dim = static_cast<int>(p.dim);
        int channel = lane % 4 * 8;
        q += channel;
        const T* rows[2 * kGroups];
#pragma unroll
        for (int r = 0; r < 2 * kGroups; ++r) {
            const int64_t key = first + 8 * r + lane / 4;
            // Behind the last key, the last one again: read, but not used.
            rows[r] = k + (key < p.keys ? key : p.keys - 1) * p.k_strides.token + channel;
        }
        float sums[kGroups][4] = {};
#pragma unroll 1
        for (int begin = 0; begin < dim; begin += 32 * kVectors) {
            uint4 query[kVectors], keys[2 * kGroups][kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const bool valid = channel + 32 * v < dim;
                query[v] = valid ? device::load_word<T, 8>(q + 32 * v) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int r = 0; r < 2 * kGroups; ++r) {
                    keys[r][v] =
                        valid ? device::load_word<T, 8>(rows[r] + 32 * v) : make_uint4(0, 0, 0, 0);
                }
            }
            channel += 32 * kVectors;
            q += 32 * kVectors;
#pragma unroll
            for (int r = 0; r < 2 * kGroups; ++r) rows[r] += 32 * kVectors;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const uint4 &upper = keys[2 * g][v], &lower = keys[2 * g + 1][v];
                    device::mma_m16n8k16<T>(sums[g], {upper.x, lower.x, upper.y, lower.y},
                                            {query[v].x, query[v].y});
                    device::mma_m16n8k16<T>(sums[g], {upper.z, lower.z, upper.w, lower.w},
                                            {query[v].z, query[v].w});
                }
            }
        }
        float mine = 0;
#pragma unroll
        for (int r = 0; r < 2 * kGroups; ++r) {
            if (lane % 4 == r) mine = sums[r / 2][r % 2 * 2];
        }
        return mine;
    }
};

// Eight lanes a key:
//
//   lane      0 .. 7      8 .. 15     16 .. 23    24 .. 31
//   load 0  | key 0     | key 1     | key 2     | key 3     |    16 bytes a lane; lane i of eight
//   load 1  | key 4     | ..                                     has channels 4 i to 4 i + 3 and
//                                                                so on, of q and k
template <class T, int kCount>
struct Product<T, kCount, false> {
    static constexpr int kLanes = 8, kUnroll = 4;
    static constexpr int kKeysOfLoad = kWarp / kLanes;
    static constexpr int kKeys = kKeysOfLoad * kUnroll;

    // kKeys of a lane that has none.
    __device__ static int key() {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        return lane % kLanes < kUnroll ? lane % kLanes * kKeysOfLoad + lane / kLanes : kKeys;
    }

    __device__ static float sum(const ClsAttentionParams& p, const T* q, const T* k,
                                int64_t first) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const T* rows[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t key = first + u * kKeysOfLoad + lane / kLanes;
            rows[u] = k + (key < p.keys ? key : p.keys - 1) * p.k_strides.token;
        }
        float sums[kUnroll] = {};
#pragma unroll 1
        for (int64_t d = lane % kLanes * kCount; d < p.dim; d += kLanes * kCount) {
            device::Vector<T, kCount> keys[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) keys[u] = device::load_vector<T, kCount>(rows[u] + d);
            const auto query = device::load_vector<T, kCount>(q + d);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    sums[u] += device::widen(query.v[i]) * device::widen(keys[u].v[i]);
                }
            }
        }
        float mine = 0;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            for (int by = kLanes / 2; by > 0; by /= 2) {
                sums[u] += __shfl_xor_sync(kFullMask, sums[u], by);
            }
            if (lane % kLanes == u) mine = sums[u];
        }
        return mine;
    }
};

// Logits: a warp takes some keys of a head. Neighbouring warps take the same keys of different
// heads, which lie side by side in a packed qkv.
template <class T, int kCount>
__global__ void __launch_bounds__(kClsWarps* kWarp, attention_tiles::kClsBlocks)
    cls_logits_kernel(const __grid_constant__ ClsArgs m) {
    using P = Product<T, kCount>;
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();
    const ClsAttentionParams& p = m.p;
    const uint32_t item = blockIdx.x * kClsWarps + threadIdx.x / kWarp;
    if (item >= m.items) return;
    const int64_t head = item % m.heads;
    const int64_t image = item / m.heads / m.tiles;
    const int64_t first = int64_t{item / m.heads % m.tiles} * P::kKeys;
    const bool mine = P::key() < P::kKeys && first + P::key() < p.keys;
    // Loaded before the keys; its logarithm waits until they are.
    float size = 1.0f;
    if (mine && p.size != nullptr) size = p.size[image * p.keys + first + P::key()];
    float* to = m.logits + ((image * p.heads + head) * p.keys + first + P::key());
    const float sum = P::sum(
        p, static_cast<const T*>(p.q) + image * p.q_stride_batch + head * p.q_stride_head,
        static_cast<const T*>(p.k) + image * p.k_strides.batch + head * p.k_strides.head, first);
    if (!mine) return;
    // A hidden key's is its bias, whatever it holds.
    const float bias = log2f(size);
    *to = bias == -INFINITY ? bias : sum * m.scale_log2 + bias;
}

// What a head's logits are taken relative to, and what its weights are multiplied by: 1 / (their
// sum * heads), 0 where all keys are hidden.
struct HeadSum {
    float base, factor;
};

// Of one head, by a warp; every lane returns it.
//   logits (keys)
__device__ __forceinline__ HeadSum sum_weights(const float* logits, int64_t keys, int64_t heads) {
    constexpr int kAtOnce = 8;  // loads on their way
    float top = -INFINITY, sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < keys; i += kAtOnce * kWarp) {
        float x[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            x[u] = i + u * kWarp < keys ? logits[i + u * kWarp] : -INFINITY;
        }
        const float before = top;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) top = fmaxf(top, x[u]);
        // -inf - -inf would be NaN; relative to 0, hidden keys weigh 0 as they should.
        const float base = top == -INFINITY ? 0.0f : top;
        sum *= device::exp2_approx(before - base);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) sum += device::exp2_approx(x[u] - base);
    }
    const float before = top;
    for (int by = kWarp / 2; by > 0; by /= 2) {
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, by));
    }
    const float base = top == -INFINITY ? 0.0f : top;
    sum *= device::exp2_approx(before - base);
    for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kFullMask, sum, by);
    const float weights = sum * static_cast<float>(heads);
    return {base, weights == 0.0f ? 0.0f : device::reciprocal(weights)};
}

// A block owns an image: a maximum and a sum for each head, by a warp; then a thread owns a key,
// and adds up its shares in the order of the heads.
//
//             keys
//           +----------------+
//   heads   | logits         | -> maximum, sum
//           +----------------+
//             | mean over heads of exp(logit - maximum) / sum
//   out     +----------------+
__global__ void __launch_bounds__(kClsMeanThreads, 1)
    cls_mean_kernel(const __grid_constant__ ClsArgs m) {
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();
    const ClsAttentionParams& p = m.p;
    const int64_t image = blockIdx.x;
    const float* logits = m.logits + image * p.heads * p.keys;
    auto* sums = reinterpret_cast<HeadSum*>(device::dynamic_shared());
    for (int64_t head = threadIdx.x / kWarp; head < p.heads; head += kClsMeanThreads / kWarp) {
        const HeadSum sum = sum_weights(logits + head * p.keys, p.keys, p.heads);
        if (threadIdx.x % kWarp == 0) sums[head] = sum;
    }
    __syncthreads();
    float* out = static_cast<float*>(p.out) + image * p.keys;
    for (int64_t key = threadIdx.x; key < p.keys; key += kClsMeanThreads) {
        float total = 0.0f;
#pragma unroll 4
        for (int64_t head = 0; head < p.heads; ++head) {
            total += device::exp2_approx(logits[head * p.keys + key] - sums[head].base) *
                     sums[head].factor;
        }
        out[key] = total;
    }
}

template <class T, int kCount>
cudaError_t launch_cls(ClsArgs m, cudaStream_t stream) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const int64_t tiles = attention_tiles::ceil_div(m.p.keys, Product<T, kCount>::kKeys);
    // In floating point, which says nothing of the last digits but does not overflow.
    if (double(m.p.batch) * double(m.p.heads) * double(tiles) > double(kMost)) {
        return cudaErrorInvalidConfiguration;
    }
    m.heads = static_cast<uint32_t>(m.p.heads);
    m.tiles = static_cast<uint32_t>(tiles);
    m.items = static_cast<uint32_t>(m.p.batch * m.p.heads * tiles);
    const auto blocks = static_cast<unsigned>(attention_tiles::ceil_div(m.items, kClsWarps));
    const cudaError_t error = device::launch_overlapping(cls_logits_kernel<T, kCount>, dim3(blocks),
                                                         dim3(kClsWarps * kWarp), 0, stream, m);
    if (error != cudaSuccess) return error;
    return device::launch_overlapping(cls_mean_kernel, dim3(static_cast<unsigned>(m.p.batch)),
                                      dim3(kClsMeanThreads),
                                      static_cast<size_t>(m.p.heads) * sizeof(HeadSum), stream, m);
}

template <class T>
cudaError_t launch_cls(const ClsArgs& m, bool vector, cudaStream_t stream) {
    return vector ? launch_cls<T, 16 / sizeof(T)>(m, stream) : launch_cls<T, 1>(m, stream);
}

}  // namespace
}  // namespace attention_cuda_detail

size_t cls_attention_cuda_workspace_bytes(const ClsAttentionParams& p) {
    return static_cast<size_t>(p.batch * p.heads * p.keys) * sizeof(float);
}

cudaError_t cls_attention_cuda(const ClsAttentionParams& p, void* workspace, cudaStream_t stream) {
    using namespace attention_cuda_detail;
    if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
    if (p.batch == 0 || p.keys == 0) return cudaSuccess;
    device::Chip chip;
    const cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (p.batch > kMost || p.dim > kMost - 64 ||
        p.heads > chip.shared_per_block / int64_t{sizeof(HeadSum)}) {
        return cudaErrorInvalidConfiguration;
    }
    const ClsArgs m{p, static_cast<float>(p.scale * 1.4426950408889634),
                    0, 0,
                    0, static_cast<float*>(workspace)};
    const auto fits = [&](const void* data, int64_t batch, int64_t head, int64_t token) {
        return attention_tiles::vectors_fit(reinterpret_cast<uintptr_t>(data), batch, head, token,
                                            p.dim, element_size(p.dtype));
    };
    const bool vector = fits(p.q, p.q_stride_batch, p.q_stride_head, 0) &&
                        fits(p.k, p.k_strides.batch, p.k_strides.head, p.k_strides.token);
    switch (p.dtype) {
        case DType::kFloat16:
            return launch_cls<device::Half>(m, vector, stream);
        case DType::kBFloat16:
            return launch_cls<device::BFloat>(m, vector, stream);
        default:
            return launch_cls<float>(m, vector, stream);
    }
}

}  // namespace tome
