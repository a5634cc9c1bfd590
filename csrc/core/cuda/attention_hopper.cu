// Attention of 64-channel heads on Hopper's warpgroups, for float16 and bfloat16.
//
// At the lengths of Vision Transformers reading and writing takes longer than all products: what
// counts is that each byte passes once, and that copies, products and exponentials of different
// blocks go on at the same time. A warpgroup owns 64 queries, whose products with 64 keys at a time
// (device_hopper.h) read keys and values where they were copied to:
//
//                 64 keys                  64
//              +---------+            +----------+
//   64 rows    |  q k^T  | -> p,  x   |  values  | 64 keys     p in the registers where q k^T was,
//              +---------+            +----------+             outputs in 32 more
//
// The next logits are on their way while the outputs of these are added. The softmax is
// attention.cu's: online, sizes as log2 added to logits, rows scaled anew only when they rise far.
#include <limits>

#include "attention_kernels.h"
#include "hopper_tile.cuh"

namespace tome::attention_cuda_detail {
namespace {

using attention_tiles::kHopperDim;
using attention_tiles::kHopperKeys;
using attention_tiles::kHopperRows;
using attention_tiles::kHopperStages;
using device::kWarpgroup;
using device::TileRows;

constexpr int kSteps = kHopperDim / 16;  // of a product over all channels

// What a lane keeps of its rows g and g + 8 of the warp's 16 (g = lane / 4).
struct RowState {
    float out[32];  // sum of weight * v: out[4 n + 2 half + j] is column 8 n + 2 t + j
    float top[2];   // what weights are relative to: near the largest logit so far
    float sum[2];   // of the weights of this lane's columns
};

struct HopperArgs {
    AttentionArgs m;
    int tiles_per_block;  // of 64 queries
};

// The warp's 16 queries, straight into registers; zeros behind the last.
//   q (count, 64) strided: the warp's first row
template <class T>
__device__ __forceinline__ void load_queries(const T* q, int64_t stride, int64_t count,
                                             uint32_t (&out)[kSteps][4]) {
    const unsigned lane = threadIdx.x % device::kWarp;
    const T* from = q + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool valid = static_cast<int>(lane / 4) + 8 * half < count;
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
            out[n / 2][n % 2 * 2 + half] =
                valid ? device::load_word<T, 2>(from + 8 * half * stride + n * 8) : 0;
        }
    }
}

// s = q k^T for 64 keys.
//   k (64, 64) operand
template <class T>
__device__ __forceinline__ void start_logits(float (&s)[32], const uint32_t (&q)[kSteps][4],
                                             uint64_t k) {
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
        device::product<T, TileRows::kAreColumns>(s, q[d], k + device::operand_channels(16 * d),
                                                  d > 0);
    }
}

// out += p v for kKeys keys.
//   v (kKeys, 64) operand
template <class T, int kKeys>
__device__ __forceinline__ void start_outputs(float (&out)[32], const uint32_t (&p)[4][4],
                                              uint64_t v) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
        device::product<T, TileRows::kAreSummed>(out, p[n], v + device::operand_rows(16 * n), 1);
    }
}

// From logits to weights, rounded to T as the next product's operand, for kKeys keys.
//   bias (kKeys) shared: log2 of the sizes, at the lane's columns
template <class T, int kKeys>
__device__ __forceinline__ void weigh(float (&s)[32], RowState& rows, const float* bias,
                                      float scale_log2, uint32_t (&p)[4][4]) {
    // Two chains for each row: what one waits for, the other does meanwhile.
    float tops[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
        const auto sizes = device::load_vector<float, 2>(bias + n * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& logit = s[4 * n + i];
            logit = logit * scale_log2 + sizes.v[i % 2];
            tops[i % 2][i / 2] = fmaxf(tops[i % 2][i / 2], logit);
        }
    }
    float top[2];
    bool rises = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = max_over_row(fmaxf(tops[0][half], tops[1][half]));
        rises |= top[half] > rows.top[half] + kRise;
    }
    if (__any_sync(device::kFullMask, rises)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float now = fmaxf(rows.top[half], top[half]);
            const float factor = device::exp2_approx(rows.top[half] - now);
            rows.top[half] = now;
            rows.sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                rows.out[4 * n + 2 * half] *= factor;
                rows.out[4 * n + 2 * half + 1] *= factor;
            }
        }
    }
    float sums[2] = {0.0f, 0.0f};  // of the odd columns
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weight[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                weight[j] = device::exp2_approx(s[4 * n + 2 * half + j] - rows.top[half]);
            }
            rows.sum[half] += weight[0];
            sums[half] += weight[1];
            p[n / 2][n % 2 * 2 + half] = round_pair<T>(weight[0], weight[1]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.sum[half] += sums[half];
}

__device__ __forceinline__ void begin_rows(RowState& rows) {
#pragma unroll
    for (float& x : rows.out) x = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        rows.top[half] = kLowest;
        rows.sum[half] = 0.0f;
    }
}

// The warp's outputs and lse, as in attention.cu.
template <class T>
__device__ __forceinline__ void end_rows(const AttentionParams& p, int64_t image, int64_t head,
                                         int64_t query, RowState& rows) {
    const unsigned lane = threadIdx.x % device::kWarp;
    float factor[2];
    float* lse =
        static_cast<float*>(p.lse) + (image * p.heads + head) * p.queries + query + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = sum_over_row(rows.sum[half]);
        const bool seen = !(sum == 0.0f);  // NaN stays NaN
        factor[half] = seen ? device::reciprocal(sum) : 0.0f;
        if (lane % 4 == 0 && query + lane / 4 + 8 * half < p.queries) {
            lse[8 * half] = seen ? (rows.top[half] + log2f(sum)) * kLn2 : 0.0f;
        }
    }
    T* out = static_cast<T*>(p.out) + ((image * p.queries + query) * p.heads + head) * kHopperDim;
    write_rows<T>(rows.out, factor, out, p.heads * kHopperDim, p.queries - query);
}

// Which queries are a block's.
struct Place {
    unsigned image, head;
    unsigned block;  // of the head's
};

__device__ __forceinline__ Place place_of(const HopperArgs& args, unsigned block) {
    const unsigned head_of_all = block / args.m.query_tiles;
    const auto heads = static_cast<unsigned>(args.m.p.heads);
    return {head_of_all / heads, head_of_all % heads, block % args.m.query_tiles};
}

__device__ __forceinline__ int warp_of(unsigned thread) {
    return static_cast<int>(thread / device::kWarp);
}

template <class T>
__device__ __forceinline__ const T* head_of(const void* data, const HeadStrides& s, int64_t image,
                                            int64_t head) {
    return static_cast<const T*>(data) + image * s.batch + head * s.head;
}

// --- all keys at once --------------------------------------------------------------------------

// This thread is done with its part of tile `tile` of tiles 0 to `last`, a group of copies each: a
// barrier must follow.
__device__ __forceinline__ void wait_for_copies(int last, int tile) {
    switch (last - tile) {
        case 0:
            device::cp_async_wait<0>();
            break;
        case 1:
            device::cp_async_wait<1>();
            break;
        case 2:
            device::cp_async_wait<2>();
            break;
        default:
            device::cp_async_wait<3>();
    }
    device::share_with_products();
}

// Returns when that tile is there for all.
__device__ __forceinline__ void wait_for_tile(int last, int tile) {
    wait_for_copies(last, tile);
    __syncthreads();
}

// A block is one warpgroup. It brings all keys and values of its head, and takes its share of the
// head's queries in turn.
//   kTail: keys in the last tile, rounded up to a multiple of 16
template <class T, int kTail>
__global__ void __launch_bounds__(device::warpgroup_bound(1), 4)
    attention_resident_kernel(const __grid_constant__ HopperArgs args) {
    if constexpr (device::kHasWarpgroups) {
        const AttentionParams& p = args.m.p;
        const Place place = place_of(args, blockIdx.x);
        const int64_t image = place.image, head = place.head;
        const int keys = static_cast<int>(p.keys);
        const int padded = (keys + 15) / 16 * 16;
        const int last = (padded - kTail) / kHopperKeys;  // the last tile

        unsigned char* k_tile = device::dynamic_shared();
        unsigned char* v_tile = k_tile + padded * device::kTileRowBytes;
        auto* biases = reinterpret_cast<float*>(v_tile + padded * device::kTileRowBytes);

        // The sizes of this thread's keys first: behind the copies, waiting for them was 9% of all.
        constexpr int kOwnKeys = attention_tiles::kHopperResident / kWarpgroup;
        float own_size[kOwnKeys];
#pragma unroll
        for (int i = 0; i < kOwnKeys; ++i) {
            const int key = static_cast<int>(threadIdx.x) + i * kWarpgroup;
            own_size[i] = p.size != nullptr && key < keys ? p.size[image * keys + key] : 1.0f;
        }
        constexpr int kTileBytes = kHopperKeys * device::kTileRowBytes;
        const T* k = head_of<T>(p.k, p.k_strides, image, head);
        const T* v = head_of<T>(p.v, p.v_strides, image, head);
        const int64_t k_stride = p.k_strides.token, v_stride = p.v_strides.token;
        for (int tile = 0; tile < last; ++tile) {
            const int first = tile * kHopperKeys;
            copy_tile<T, kWarpgroup, kHopperKeys>(k_tile + tile * kTileBytes, k + first * k_stride,
                                                  k_stride, keys - first, p.k);
            copy_tile<T, kWarpgroup, kHopperKeys>(v_tile + tile * kTileBytes, v + first * v_stride,
                                                  v_stride, keys - first, p.v);
            device::cp_async_commit();
        }
        const int first_of_last = last * kHopperKeys;
        copy_tile<T, kWarpgroup, kTail>(k_tile + last * kTileBytes, k + first_of_last * k_stride,
                                        k_stride, keys - first_of_last, p.k);
        copy_tile<T, kWarpgroup, kTail>(v_tile + last * kTileBytes, v + first_of_last * v_stride,
                                        v_stride, keys - first_of_last, p.v);
        device::cp_async_commit();

        bool hides = false;  // whether one of this thread's keys is hidden
#pragma unroll
        for (int i = 0; i < kOwnKeys; ++i) {
            const int key = static_cast<int>(threadIdx.x) + i * kWarpgroup;
            if (key < padded) biases[key] = key < keys ? log2f(own_size[i]) : -INFINITY;
            hides |= own_size[i] == 0.0f;
        }

        const uint64_t k_operand = device::operand_of(k_tile);
        const uint64_t v_operand = device::operand_of(v_tile);
        const float* bias_0 = biases + threadIdx.x % 4u * 2;
        // The queries of the warp, loaded while those before are finished.
        uint32_t q_operand[kSteps][4];
        const auto load = [&](int query) {
            const int64_t own = query + warp_of(threadIdx.x) * 16;
            const T* q = head_of<T>(p.q, p.q_strides, device::forget_origin(place.image),
                                    device::forget_origin(place.head));
            load_queries<T>(q + own * p.q_strides.token, p.q_strides.token, p.queries - own,
                            q_operand);
        };
        const int block_queries = args.tiles_per_block * kHopperRows;
        const int first = static_cast<int>(place.block) * block_queries;
        const int end =
            static_cast<int>(p.queries - first < block_queries ? p.queries : first + block_queries);
        load(first);
        // Whether all tiles are known to be there; before, they are waited for one by one.
        bool all_there = false;
        wait_for_copies(last, 0);
        // Hidden keys become zeros (sync_shown of attention_tile.cuh), in all tiles at once.
        if (__syncthreads_or(hides)) {
            device::cp_async_wait<0>();
            __syncthreads();
#pragma unroll 1
            for (int key = static_cast<int>(threadIdx.x); key < keys; key += kWarpgroup) {
                if (biases[key] == -INFINITY) clear_pair(k_tile, v_tile, key);
            }
            device::share_with_products();
            __syncthreads();
            all_there = true;
        }
#pragma unroll 1
        for (int query = first; query < end; query += kHopperRows) {
            const int own = query + warp_of(threadIdx.x) * 16;
            // Of the last 64 rows often few exist. Warps without any take part in products only.
            const bool has_rows = own < p.queries;
            RowState rows;
            begin_rows(rows);

            float s[32];
            uint32_t weights[4][4] = {};
            device::pin(rows.out);
            device::products_begin();
            start_logits<T>(s, q_operand, k_operand);
            device::products_commit();
#pragma unroll 1
            for (int j = 0; j < last; ++j) {
                device::products_wait<0>();
                device::pin(s);
                device::pin(rows.out);
                if (has_rows) {
                    weigh<T, kHopperKeys>(s, rows, bias_0 + j * kHopperKeys, args.m.scale_log2,
                                          weights);
                }
                if (!all_there) wait_for_tile(last, j + 1);
                device::pin(s);
                device::pin(rows.out);
                device::products_begin();
                start_outputs<T, kHopperKeys>(rows.out, weights,
                                              v_operand + device::operand_rows(j * kHopperKeys));
                start_logits<T>(s, q_operand,
                                k_operand + device::operand_rows((j + 1) * kHopperKeys));
                device::products_commit();
            }
            device::products_wait<0>();
            device::pin(s);
            device::pin(rows.out);
            if (query + kHopperRows < end) load(query + kHopperRows);
            if (has_rows) {
                weigh<T, kTail>(s, rows, bias_0 + last * kHopperKeys, args.m.scale_log2, weights);
            }
            device::pin(rows.out);
            device::products_begin();
            start_outputs<T, kTail>(rows.out, weights,
                                    v_operand + device::operand_rows(last * kHopperKeys));
            device::products_commit();
            all_there = true;
            device::products_wait<0>();
            device::pin(rows.out);
            if (has_rows) {
                end_rows<T>(p, device::forget_origin(place.image),
                            device::forget_origin(place.head), own, rows);
            }
        }
    }
}

// --- keys in stages ----------------------------------------------------------------------------

// A block's warpgroups, two, own 64 queries each, and share the keys and values that pass, in
// stages of 128 keys. While one is worked on, the next is being copied; the third place is that of
// the stage before, whose last outputs are still being added when that copy starts. Warpgroups wait
// for each other once a stage.
template <class T, int kTail>
__global__ void __launch_bounds__(device::warpgroup_bound(2), 2)
    attention_staged_kernel(const __grid_constant__ HopperArgs args) {
    if constexpr (device::kHasWarpgroups) {
        constexpr int kThreads = 2 * kWarpgroup;
        constexpr int kStageKeys = attention_tiles::kHopperStageKeys;
        constexpr int kStageBytes = kStageKeys * device::kTileRowBytes;  // of keys, or values
        static_assert(kStageKeys == 2 * kHopperKeys && kStageKeys <= kThreads);
        const AttentionParams& p = args.m.p;
        const Place place = place_of(args, blockIdx.x);
        const int64_t image = place.image, head = place.head;
        const int keys = static_cast<int>(p.keys);
        const int last = (keys - 1) / kHopperKeys;  // the last 64 keys
        const int thread = static_cast<int>(threadIdx.x);

        unsigned char* stages = device::dynamic_shared();
        auto* biases = reinterpret_cast<float*>(stages + kHopperStages * 2 * kStageBytes);

        // Starts the copies of keys `first` to `first` + 127, and returns the size of this
        // thread's.
        const auto start_stage = [&](int first, int stage) {
            unsigned char* to = stages + stage * 2 * kStageBytes;
            const int64_t of_image = device::forget_origin(place.image);
            const int64_t of_heads = device::forget_origin(place.head);
            const auto copy = [&](unsigned char* to, const void* data, const HeadStrides& s) {
                copy_tile<T, kThreads, kStageKeys>(
                    to, head_of<T>(data, s, of_image, of_heads) + first * s.token, s.token,
                    keys - first, data);
            };
            copy(to, p.k, p.k_strides);
            copy(to + kStageBytes, p.v, p.v_strides);
            device::cp_async_commit();
            const int key = first + thread;
            return p.size != nullptr && thread < kStageKeys && key < keys
                       ? p.size[of_image * keys + key]
                       : 1.0f;
        };
        const auto write_bias = [&](int first, int stage, float key_size) {
            if (thread >= kStageKeys) return;
            biases[stage * kStageKeys + thread] =
                first + thread < keys ? log2f(key_size) : -INFINITY;
        };

        // A barrier, behind which a stage is there for all, without what hidden keys hold.
        const auto sync_stage = [&](int stage, float key_size) {
            const bool hides = key_size == 0.0f;
            device::share_with_products();
            if (!__syncthreads_or(hides)) return;
            if (hides) {
                unsigned char* of_stage = stages + stage * 2 * kStageBytes;
                clear_pair(of_stage, of_stage + kStageBytes, thread);
            }
            device::share_with_products();
            __syncthreads();
        };

        const float first_size = start_stage(0, 0);
        write_bias(0, 0, first_size);
        float next_size = kStageKeys < keys ? start_stage(kStageKeys, 1) : 1.0f;

        const int64_t own = (int64_t{place.block} * 8 + warp_of(threadIdx.x)) * 16;
        const bool has_rows = own < p.queries;
        uint32_t q_operand[kSteps][4];
        load_queries<T>(head_of<T>(p.q, p.q_strides, image, head) + own * p.q_strides.token,
                        p.q_strides.token, p.queries - own, q_operand);
        RowState rows;
        begin_rows(rows);

        float s[32];
        uint32_t weights[4][4] = {};
        const uint64_t operands = device::operand_of(stages);
        // Tile 0 or 1 of a stage.
        const auto k_of = [&](int stage, int tile) {
            return operands + device::operand_rows(stage * 2 * kStageKeys + tile * kHopperKeys);
        };
        const float* bias_0 = biases + thread % 4 * 2;

        if (kStageKeys < keys) {
            device::cp_async_wait<1>();
        } else {
            device::cp_async_wait<0>();
        }
        sync_stage(0, first_size);
        device::pin(rows.out);
        device::products_begin();
        start_logits<T>(s, q_operand, k_of(0, 0));
        device::products_commit();
        int stage = 0;
#pragma unroll 1
        for (int j = 0; j < last; ++j) {
            const int tile = j % 2;
            int next = stage;
            if (tile == 1) {
                next = stage == kHopperStages - 1 ? 0 : stage + 1;
                write_bias((j + 1) * kHopperKeys, next, next_size);
            }
            device::products_wait<0>();
            device::pin(s);
            device::pin(rows.out);
            if (tile == 1) {
                // Behind this, the next stage is there for all, and nobody is at the one before
                // this any more, whose place the one after takes.
                device::cp_async_wait<0>();
                sync_stage(next, next_size);
                const int first = (j + 1) * kHopperKeys + kStageKeys;
                const int after = next == kHopperStages - 1 ? 0 : next + 1;
                if (first < keys) next_size = start_stage(first, after);
            }
            if (has_rows) {
                weigh<T, kHopperKeys>(s, rows, bias_0 + stage * kStageKeys + tile * kHopperKeys,
                                      args.m.scale_log2, weights);
            }
            device::pin(s);
            device::pin(rows.out);
            device::products_begin();
            start_outputs<T, kHopperKeys>(rows.out, weights,
                                          k_of(stage, tile) + device::operand_rows(kStageKeys));
            start_logits<T>(s, q_operand, k_of(next, 1 - tile));
            device::products_commit();
            stage = next;
        }
        const int tile = last % 2;
        device::products_wait<0>();
        device::pin(s);
        device::pin(rows.out);
        if (has_rows) {
            weigh<T, kTail>(s, rows, bias_0 + stage * kStageKeys + tile * kHopperKeys,
                            args.m.scale_log2, weights);
        }
        device::pin(rows.out);
        device::products_begin();
        start_outputs<T, kTail>(rows.out, weights,
                                k_of(stage, tile) + device::operand_rows(kStageKeys));
        device::products_commit();
        device::products_wait<0>();
        device::pin(rows.out);
        if (has_rows) {
            // Worked out again, not kept in registers all the while.
            const Place end = place_of(args, device::forget_origin(blockIdx.x));
            const int64_t query = (int64_t{end.block} * 8 + warp_of(threadIdx.x)) * 16;
            end_rows<T>(p, end.image, end.head, query, rows);
        }
    }
}

// --- launches ----------------------------------------------------------------------------------

template <class T, int kTail>
cudaError_t launch_tail(const HopperArgs& args, dim3 grid, int warpgroups, size_t shared_bytes,
                        cudaStream_t stream) {
    const dim3 threads(static_cast<unsigned>(warpgroups * kWarpgroup));
    return warpgroups == 1 ? device::launch(attention_resident_kernel<T, kTail>, grid, threads,
                                            shared_bytes, stream, args)
                           : device::launch(attention_staged_kernel<T, kTail>, grid, threads,
                                            shared_bytes, stream, args);
}

template <class T>
cudaError_t launch_of(const HopperArgs& args, dim3 grid, int warpgroups, size_t shared_bytes,
                      cudaStream_t stream) {
    switch ((args.m.p.keys - 1) % kHopperKeys / 16) {
        case 0:
            return launch_tail<T, 16>(args, grid, warpgroups, shared_bytes, stream);
        case 1:
            return launch_tail<T, 32>(args, grid, warpgroups, shared_bytes, stream);
        case 2:
            return launch_tail<T, 48>(args, grid, warpgroups, shared_bytes, stream);
        default:
            return launch_tail<T, 64>(args, grid, warpgroups, shared_bytes, stream);
    }
}

}  // namespace

bool has_hopper_kernels(const device::Chip& chip) {
    return chip.capability == 90 &&
           device::takes_blocks_of(attention_resident_kernel<device::BFloat, kHopperKeys>,
                                   kWarpgroup);
}

bool hopper_takes(const AttentionArgs& m, const device::Chip& chip) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 4 * kHopperKeys;
    return has_hopper_kernels(chip) && m.p.dim == kHopperDim && m.p.keys > 0 && m.p.keys <= kMost &&
           m.p.queries <= kMost && m.vector_q && m.vector_k && m.vector_v && m.vector_out;
}

cudaError_t launch_attention_hopper(const AttentionArgs& m, const device::Chip& chip,
                                    cudaStream_t stream) {
    HopperArgs args{m, 0};
    const int64_t heads = m.p.batch * m.p.heads;
    const attention_tiles::HopperCut cut =
        attention_tiles::cut_hopper(heads, m.p.queries, m.p.keys, chip.multiprocessors);
    if (cut.blocks > std::numeric_limits<int32_t>::max() / heads) {
        return cudaErrorInvalidConfiguration;
    }
    args.m.query_tiles = static_cast<unsigned>(cut.blocks);
    args.tiles_per_block = static_cast<int>(cut.tiles_per_block);
    const dim3 grid(static_cast<unsigned>(heads * cut.blocks));
    const auto bytes = static_cast<size_t>(attention_tiles::hopper_shared_bytes(m.p.keys));
    return m.p.dtype == DType::kFloat16
               ? launch_of<device::Half>(args, grid, cut.warpgroups, bytes, stream)
               : launch_of<device::BFloat>(args, grid, cut.warpgroups, bytes, stream);
}

}  // namespace tome::attention_cuda_detail
