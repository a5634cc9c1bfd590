// attention without tensor cores, for float32: products of TF32 would be a thousand times less
// exact than what float32 callers get elsewhere.
#include <limits>

#include "attention_kernels.h"
#include "attention_tile.cuh"
#include "launch.h"

namespace tome::attention_cuda_detail {
namespace {

using attention_tiles::kPlainKeys;
using attention_tiles::kPlainRows;
using attention_tiles::kPlainThreads;
using attention_tiles::kPlainWeights;

constexpr int kSide = 16;  // threads are a square
static_assert(kSide * kSide == kPlainThreads);
constexpr int kRows = kPlainRows / kSide;  // of a thread
constexpr int kKeys = kPlainKeys / kSide;  // of a thread, per tile

// Over the 16 lanes that share a row.
__device__ __forceinline__ float max_over_side(float x) {
    for (int by = kSide / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, by));
    return x;
}
__device__ __forceinline__ float sum_over_side(float x) {
    for (int by = kSide / 2; by > 0; by /= 2) x += __shfl_xor_sync(kFullMask, x, by);
    return x;
}

// Logits of the thread's rows and keys, without scale and size.
//   q (kPlainRows, kPitch), k (kPlainKeys, kPitch) shared
template <int kPitch>
__device__ __forceinline__ void multiply_keys(const float* q, const float* k, int dim,
                                              float (&s)[kRows][kKeys]) {
    const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
#pragma unroll 2
    for (int d = 0; d < dim; d += 4) {  // past dim there are zeros
        device::Vector<float, 4> a[kRows], b[kKeys];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            a[i] = device::load_vector<float, 4>(q + (y + i * kSide) * kPitch + d);
        }
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            b[j] = device::load_vector<float, 4>(k + (x + j * kSide) * kPitch + d);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) s[i][j] += a[i].v[c] * b[j].v[c];
            }
        }
    }
}

// Adds weights * values to the thread's outputs.
//   weights (kPlainRows, kPlainWeights), v (kPlainKeys, kPitch) shared
template <int kPitch, int kPairs>
__device__ __forceinline__ void add_values(const float* weights, const float* v,
                                           float (&out)[kRows][kPairs][2]) {
    const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
#pragma unroll 2
    for (int key = 0; key < kPlainKeys; key += 4) {
        device::Vector<float, 4> w[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            w[i] = device::load_vector<float, 4>(weights + (y + i * kSide) * kPlainWeights + key);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                const auto values = device::load_vector<float, 2>(v + (key + c) * kPitch +
                                                                  pair * 2 * kSide + 2 * x);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    out[i][pair][0] += w[i].v[c] * values.v[0];
                    out[i][pair][1] += w[i].v[c] * values.v[1];
                }
            }
        }
    }
}

// A block owns 64 queries of one head and passes over all keys, 32 at a time. Thread (y, x) owns
// rows y, y + 16, y + 32, y + 48; of a tile's keys x and x + 16; and of the channels the pairs 2x,
// 2x + 1 of every 32. So the 16 lanes of a half warp hold the whole of a row.
//
//             32 keys                     kDim
//           +--------+                 +--------+
//   64      | q k^T  |  -> weights, x  | values |  32 keys, where the keys were
//   queries +--------+     in shared   +--------+
template <int kDim>
__global__ void __launch_bounds__(kPlainThreads, 2)
    attention_plain_kernel(const __grid_constant__ AttentionArgs m) {
    constexpr int kPitch = kDim + 4;
    constexpr int kPairs = kDim / (2 * kSide);
    const AttentionParams& p = m.p;
    const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
    const unsigned head_of_all = blockIdx.x / m.query_tiles;
    const int64_t image = head_of_all / static_cast<unsigned>(p.heads);
    const int64_t head = head_of_all % static_cast<unsigned>(p.heads);
    const int64_t query = int64_t{blockIdx.x % m.query_tiles} * kPlainRows;
    const int64_t queries_left = p.queries - query;
    const int dim = static_cast<int>(p.dim);

    auto* q_tile = reinterpret_cast<float*>(device::dynamic_shared());
    float* tile = q_tile + kPlainRows * kPitch;
    float* weights = tile + kPlainKeys * kPitch;
    const float* q = static_cast<const float*>(p.q) + image * p.q_strides.batch +
                     head * p.q_strides.head + query * p.q_strides.token;
    const float* k =
        static_cast<const float*>(p.k) + image * p.k_strides.batch + head * p.k_strides.head;
    const float* v =
        static_cast<const float*>(p.v) + image * p.v_strides.batch + head * p.v_strides.head;
    const float* size = p.size == nullptr ? nullptr : p.size + image * p.keys;

    float out[kRows][kPairs][2] = {};
    float top[kRows], sum[kRows] = {};
#pragma unroll
    for (float& value : top) value = -INFINITY;
    stage_tile<float, kDim>(q_tile, kPlainRows, q, p.q_strides.token, queries_left, dim,
                            m.vector_q);
    for (int64_t key = 0; key < p.keys; key += kPlainKeys) {
        stage_tile<float, kDim>(tile, kPlainKeys, k + key * p.k_strides.token, p.k_strides.token,
                                p.keys - key, dim, m.vector_k);
        device::cp_async_commit();
        float bias[kKeys];
        bool hides = false;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            const int64_t own = key + x + j * kSide;
            bias[j] = log2_size(size, own, p.keys);
            hides |= own < p.keys && bias[j] == -INFINITY;
        }
        // Hidden keys become zeros, as by sync_shown of attention_tile.cuh.
        const auto clear_hidden = [&] {
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
                if (bias[j] != -INFINITY) continue;
                for (int d = y; d < dim; d += kSide) tile[(x + j * kSide) * kPitch + d] = 0.0f;
            }
            __syncthreads();
        };
        device::cp_async_wait<0>();
        const bool hidden = __syncthreads_or(hides) != 0;  // whether any of the tile is
        if (hidden) clear_hidden();
        float s[kRows][kKeys] = {};
        multiply_keys<kPitch>(q_tile, tile, dim, s);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float now = top[i];
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
                s[i][j] = s[i][j] * m.scale_log2 + bias[j];
                now = fmaxf(now, s[i][j]);
            }
            now = max_over_side(now);
            // -inf - -inf would be NaN; relative to 0, hidden keys weigh 0 as they should.
            const float base = now == -INFINITY ? 0.0f : now;
            const float factor = device::exp2_approx(top[i] - base);
            top[i] = now;
            sum[i] *= factor;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                out[i][pair][0] *= factor;
                out[i][pair][1] *= factor;
            }
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
                const float weight = device::exp2_approx(s[i][j] - base);
                sum[i] += weight;
                weights[(y + i * kSide) * kPlainWeights + x + j * kSide] = weight;
            }
        }
        __syncthreads();  // the keys have been read
        stage_tile<float, kDim>(tile, kPlainKeys, v + key * p.v_strides.token, p.v_strides.token,
                                p.keys - key, dim, m.vector_v);
        device::cp_async_commit();
        device::cp_async_wait<0>();
        __syncthreads();
        if (hidden) clear_hidden();
        add_values<kPitch, kPairs>(weights, tile, out);
        __syncthreads();  // the values have been read
    }
    device::cp_async_wait<0>();  // of the queries, if there was no key

    float* lse = static_cast<float*>(p.lse) + head_of_all * p.queries + query;
    float* to = static_cast<float*>(p.out) + ((image * p.queries + query) * p.heads + head) * p.dim;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = y + i * kSide;
        const float total = sum_over_side(sum[i]);
        const bool seen = !(total == 0.0f);  // NaN stays NaN
        const float factor = seen ? 1.0f / total : 0.0f;
        if (row >= queries_left) continue;
        if (x == 0) lse[row] = seen ? (top[i] + log2f(total)) * kLn2 : 0.0f;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            const int column = pair * 2 * kSide + 2 * x;
            float* at = to + row * p.heads * p.dim + column;
            const float first = seen ? out[i][pair][0] * factor : 0.0f;
            const float second = seen ? out[i][pair][1] * factor : 0.0f;
            if (m.vector_out && column < dim) {
                device::store_vector<float, 2>(at, {{first, second}});
            } else {
                if (column < dim) at[0] = first;
                if (column + 1 < dim) at[1] = second;
            }
        }
    }
}

template <int kDim>
cudaError_t launch_dim(const AttentionArgs& m, unsigned blocks, cudaStream_t stream) {
    return device::launch(attention_plain_kernel<kDim>, dim3(blocks), dim3(kPlainThreads),
                          static_cast<size_t>(attention_tiles::plain_shared_bytes(kDim)), stream,
                          m);
}

}  // namespace

cudaError_t launch_attention_plain(const AttentionArgs& args, cudaStream_t stream) {
    AttentionArgs m = args;
    const int64_t heads = m.p.batch * m.p.heads;
    const int64_t tiles = attention_tiles::ceil_div(m.p.queries, kPlainRows);
    if (tiles > std::numeric_limits<int32_t>::max() / heads) return cudaErrorInvalidConfiguration;
    m.query_tiles = static_cast<unsigned>(tiles);
    const auto blocks = static_cast<unsigned>(heads * tiles);
    switch (attention_tiles::plain_padded_dim(m.p.dim)) {
        case 32:
            return launch_dim<32>(m, blocks, stream);
        case 64:
            return launch_dim<64>(m, blocks, stream);
        case 96:
            return launch_dim<96>(m, blocks, stream);
        case 128:
            return launch_dim<128>(m, blocks, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome::attention_cuda_detail
