// cls_attention_cuda: the class token's attention, averaged over heads, in one launch.
#include <limits>

#include "attention_tile.cuh"
#include "launch.h"
#include "tome_core/cuda.h"

namespace tome {
namespace attention_cuda_detail {
namespace {

using attention_tiles::kClsKeys;
using attention_tiles::kClsLanes;
using attention_tiles::kClsUnroll;

struct ClsArgs {
    ClsAttentionParams p;
    float scale_log2;  // scale * log2(e): logits are in units of log2
    int64_t chunk;     // keys whose logits are held at once
};

// Logits of keys [begin, end) for all heads. A warp takes 16 keys of a head, 8 lanes a key:
//
//   lane      0 .. 7      8 .. 15     16 .. 23    24 .. 31
//   load 0  | key 0     | key 1     | key 2     | key 3     |    16 bytes a lane; lane i of eight
//   load 1  | key 4     | ..                                     has channels 8 i to 8 i + 7 and
//                                                                so on, of q and k
//
// Neighbouring warps take the same keys of different heads, which lie side by side in a packed qkv.
//   logits (heads, chunk) shared, out
template <class T, int kCount>
__device__ __forceinline__ void compute_logits(const ClsArgs& m, int64_t image, int64_t begin,
                                               int64_t end, float* logits) {
    const ClsAttentionParams& p = m.p;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int key_of_load = static_cast<int>(threadIdx.x) % kWarp / kClsLanes;
    const int lane = static_cast<int>(threadIdx.x) % kClsLanes;
    const float* size = p.size == nullptr ? nullptr : p.size + image * p.keys;
    const int64_t items = p.heads * attention_tiles::ceil_div(end - begin, kClsKeys);
    for (int64_t item = warp; item < items; item += warps) {
        const int64_t head = item % p.heads;
        const int64_t first = begin + item / p.heads * kClsKeys + key_of_load;
        const T* q = static_cast<const T*>(p.q) + image * p.q_stride_batch + head * p.q_stride_head;
        const T* k =
            static_cast<const T*>(p.k) + image * p.k_strides.batch + head * p.k_strides.head;
        float sums[kClsUnroll] = {};
#pragma unroll 1
        for (int64_t d = lane * kCount; d < p.dim; d += kClsLanes * kCount) {
            device::Vector<T, kCount> keys[kClsUnroll];
#pragma unroll
            for (int u = 0; u < kClsUnroll; ++u) {
                const int64_t key = first + u * (kWarp / kClsLanes);
                // Behind the last key, the last one again: read, but not used.
                const int64_t from = key < end ? key : end - 1;
                keys[u] = device::load_vector<T, kCount>(k + from * p.k_strides.token + d);
            }
            const auto query = device::load_vector<T, kCount>(q + d);
#pragma unroll
            for (int u = 0; u < kClsUnroll; ++u) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    sums[u] += device::widen(query.v[i]) * device::widen(keys[u].v[i]);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kClsUnroll; ++u) {
            for (int by = kClsLanes / 2; by > 0; by /= 2) {
                sums[u] += __shfl_xor_sync(kFullMask, sums[u], by);
            }
            const int64_t key = first + u * (kWarp / kClsLanes);
            if (lane == u && key < end) {
                const float bias = log2_size(size, key, p.keys);
                // A hidden key's is its bias, whatever it holds.
                logits[head * m.chunk + key - begin] =
                    bias == -INFINITY ? bias : sums[u] * m.scale_log2 + bias;
            }
        }
    }
}

// Takes `count` more logits of every head into its maximum and sum; a warp per head.
//   logits (heads, chunk), top (heads), sum (heads) shared
__device__ __forceinline__ void update_sums(const ClsArgs& m, int64_t count, const float* logits,
                                            float* top, float* sum) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int64_t head = threadIdx.x / kWarp; head < m.p.heads; head += warps) {
        const float* row = logits + head * m.chunk;
        const float before = top[head];
        float now = before;
        for (int64_t i = lane; i < count; i += kWarp) now = fmaxf(now, row[i]);
        for (int by = kWarp / 2; by > 0; by /= 2) {
            now = fmaxf(now, __shfl_xor_sync(kFullMask, now, by));
        }
        // -inf - -inf would be NaN; relative to 0, hidden keys weigh 0 as they should.
        const float base = now == -INFINITY ? 0.0f : now;
        float added = 0.0f;
        for (int64_t i = lane; i < count; i += kWarp) added += device::exp2_approx(row[i] - base);
        for (int by = kWarp / 2; by > 0; by /= 2) {
            added += __shfl_xor_sync(kFullMask, added, by);
        }
        __syncwarp();  // all lanes have read the maximum
        if (lane == 0) {
            sum[head] = sum[head] * device::exp2_approx(before - base) + added;
            top[head] = now;
        }
    }
}

// A block owns an image: logits of all heads into shared memory; a maximum and a sum for each head;
// then a thread owns a key, and adds up its shares in the order of the heads.
//
//             keys
//           +----------------+
//   heads   | logits         | -> maximum, sum
//           +----------------+
//             | mean over heads of exp(logit - maximum) / sum
//   out     +----------------+
//
// Where not all keys' logits fit, chunks of them pass twice: for the sums, then for the shares.
template <class T, int kCount>
__global__ void __launch_bounds__(attention_tiles::kClsMostThreads, 1)
    cls_attention_kernel(const __grid_constant__ ClsArgs m) {
    const ClsAttentionParams& p = m.p;
    const int threads = static_cast<int>(blockDim.x);
    const int64_t image = blockIdx.x;
    auto* logits = reinterpret_cast<float*>(device::dynamic_shared());
    float* top = logits + p.heads * m.chunk;
    float* sum = top + p.heads;
    for (int64_t head = threadIdx.x; head < p.heads; head += threads) {
        top[head] = -INFINITY;
        sum[head] = 0.0f;
    }
    for (int64_t begin = 0; begin < p.keys; begin += m.chunk) {
        const int64_t end = begin + m.chunk < p.keys ? begin + m.chunk : p.keys;
        compute_logits<T, kCount>(m, image, begin, end, logits);
        __syncthreads();
        update_sums(m, end - begin, logits, top, sum);
        __syncthreads();
    }
    float* out = static_cast<float*>(p.out) + image * p.keys;
    for (int64_t begin = 0; begin < p.keys; begin += m.chunk) {
        const int64_t end = begin + m.chunk < p.keys ? begin + m.chunk : p.keys;
        if (m.chunk < p.keys) {
            compute_logits<T, kCount>(m, image, begin, end, logits);
            __syncthreads();
        }
        for (int64_t key = begin + threadIdx.x; key < end; key += threads) {
            float total = 0.0f;
            for (int64_t head = 0; head < p.heads; ++head) {
                const float weights = sum[head] * static_cast<float>(p.heads);
                if (weights == 0.0f) continue;  // all keys are hidden
                const float logit = logits[head * m.chunk + key - begin];
                total += device::exp2_approx(logit - top[head]) * device::reciprocal(weights);
            }
            out[key] = total;
        }
        __syncthreads();  // before the logits are another chunk's
    }
}

template <class T>
cudaError_t launch_cls(const ClsArgs& m, bool vector, int threads, cudaStream_t stream) {
    const auto kernel =
        vector ? cls_attention_kernel<T, 16 / sizeof(T)> : cls_attention_kernel<T, 1>;
    return device::launch(
        kernel, dim3(static_cast<unsigned>(m.p.batch)), dim3(static_cast<unsigned>(threads)),
        static_cast<size_t>(attention_tiles::cls_shared_bytes(m.p.heads, m.chunk)), stream, m);
}

}  // namespace
}  // namespace attention_cuda_detail

cudaError_t cls_attention_cuda(const ClsAttentionParams& p, cudaStream_t stream) {
    using namespace attention_cuda_detail;
    if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
    if (p.batch == 0 || p.keys == 0) return cudaSuccess;
    if (p.batch > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    device::Chip chip;
    const cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    ClsArgs m{p, static_cast<float>(p.scale * 1.4426950408889634),
              attention_tiles::cls_chunk(p.heads, p.keys, chip.shared_per_block)};
    if (m.chunk == 0) return cudaErrorInvalidConfiguration;
    const auto fits = [&](const void* data, int64_t batch, int64_t head, int64_t token) {
        return attention_tiles::vectors_fit(reinterpret_cast<uintptr_t>(data), batch, head, token,
                                            p.dim, element_size(p.dtype));
    };
    const bool vector = fits(p.q, p.q_stride_batch, p.q_stride_head, 0) &&
                        fits(p.k, p.k_strides.batch, p.k_strides.head, p.k_strides.token);
    const int threads = attention_tiles::cls_threads(p.batch, chip.multiprocessors);
    switch (p.dtype) {
        case DType::kFloat16:
            return launch_cls<device::Half>(m, vector, threads, stream);
        case DType::kBFloat16:
            return launch_cls<device::BFloat>(m, vector, threads, stream);
        default:
            return launch_cls<float>(m, vector, threads, stream);
    }
}

}  // namespace tome
