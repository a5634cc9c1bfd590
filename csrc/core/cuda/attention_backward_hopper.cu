// The gradient of attention of 64-channel heads on Hopper's warpgroups, for float16 and bfloat16:
// attention_backward.cu's two launches, first for queries, then for keys, with the same formulas.
//
// A warpgroup owns 64 rows, and meets columns 64 at a time. All four operands lie in shared memory
// as products want them (device_hopper.h), the columns read along for logits, across for sums:
//
//                  64 columns
//              +--------------+     s  = first * first^T      p  = exp2(..)
//   64 rows    |   s, then p  |     dP = second * second^T    ds = p (dP - delta)
//              |  dP, then ds |     sums += ds * first,  p * second (of keys only)
//              +--------------+
//
// A block waits for its products twice a step; the other blocks of the multiprocessor compute
// meanwhile. Starting the next logits beside the sums would take more registers than there are.
#include <limits>
#include <type_traits>

#include "attention_backward_kernels.h"
#include "attention_tiles.h"
#include "hopper_tile.cuh"
#include "tome_core/cuda.h"

namespace tome::attention_backward_detail {
namespace {

using attention_cuda_detail::copy_tile;
using attention_cuda_detail::kLog2E;
using attention_tiles::kHopperDim;
using attention_tiles::kHopperKeys;
using attention_tiles::kHopperRows;
using attention_tiles::kHopperStages;
using device::kWarpgroup;
using device::TileRows;

constexpr int kSteps = kHopperDim / 16;
constexpr int kColumns = kHopperKeys;
constexpr int kTileBytes = kHopperRows * device::kTileRowBytes;

struct HopperWork {
    Pair rows, columns;  // queries: q, grad; keys: k, v; one is rows, the other columns
    unsigned heads, blocks_per_head;
    float scale;
    const float* size;               // (batch, keys) or nullptr
    const float* lse;                // (batch, heads, queries)
    const void* out;                 // (batch, queries, heads, 64)
    float* delta;                    // (batch, heads, queries), out for queries
    void *grad_first, *grad_second;  // (batch, count, heads, 64) out; the second for keys only
};

// What a query and a key bring to a logit (x, in units of log2) and to dP (y); as in
// attention_backward.cu.
struct Side {
    float x, y;
};

// The sum over channels of grad * out of a row, in both of two neighbouring lanes, which take every
// other 16 bytes.
//   grad, out (64)
template <class T>
__device__ __forceinline__ float dot_row(const T* grad, const T* out) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHopperDim / 16; ++i) {
        const auto at = static_cast<int>(i * 16 + threadIdx.x % 2u * 8);
        const auto a = device::load_vector<T, 8>(grad + at),
                   b = device::load_vector<T, 8>(out + at);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += device::widen(a.v[j]) * device::widen(b.v[j]);
    }
    return sum + __shfl_xor_sync(device::kFullMask, sum, 1);
}

// s = rows * columns^T for 64 columns, both operands with channels side by side.
template <class T>
__device__ __forceinline__ void start_logits(float (&s)[32], uint64_t rows, uint64_t columns) {
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
        device::product<T, TileRows::kAreColumns, TileRows::kAreColumns>(
            s, rows + device::operand_channels(16 * d), columns + device::operand_channels(16 * d),
            d > 0);
    }
}

// sums += weights * columns for kCount columns.
template <class T, int kCount>
__device__ __forceinline__ void start_sums(float (&sums)[32], const uint32_t (&weights)[4][4],
                                           uint64_t columns) {
#pragma unroll
    for (int n = 0; n < kCount / 16; ++n) {
        device::product<T, TileRows::kAreSummed>(sums, weights[n],
                                                 columns + device::operand_rows(16 * n), 1);
    }
}

// From s and dP to p and ds, rounded to T as operands of the sums, for kCount columns.
//   x, y (kCount) shared: what columns bring, at the lane's columns; y for keys only
template <class T, bool kOfKeys, int kCount>
__device__ __forceinline__ void weigh(const float (&s)[32], const float (&dp)[32],
                                      const Side (&row)[2], const float* x, const float* y,
                                      float scale, uint32_t (&p)[4][4], uint32_t (&ds)[4][4]) {
#pragma unroll
    for (int n = 0; n < kCount / 8; ++n) {
        // Else the compiler loads what all columns bring at once, which costs registers it lacks.
        if (n > 0 && n % 4 == 0) __syncwarp();
        const auto of_column = device::load_vector<float, 2>(x + n * 8);
        device::Vector<float, 2> delta{};
        if constexpr (kOfKeys) delta = device::load_vector<float, 2>(y + n * 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weight[2], slope[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int i = 4 * n + 2 * half + j;
                weight[j] = device::exp2_approx(s[i] * scale + (row[half].x + of_column.v[j]));
                slope[j] = weight[j] * (dp[i] - (kOfKeys ? delta.v[j] : row[half].y));
            }
            const int at = n % 2 * 2 + half;
            if constexpr (kOfKeys) {
                p[n / 2][at] = attention_cuda_detail::round_pair<T>(weight[0], weight[1]);
            }
            ds[n / 2][at] = attention_cuda_detail::round_pair<T>(slope[0], slope[1]);
        }
    }
}

// Which rows a warpgroup owns.
struct Place {
    unsigned image, head;
    int first_row, left_rows;  // none left, or less, if it has no work
};

template <int kGroups>
__device__ __forceinline__ Place place_of(const HopperWork& w, unsigned block, unsigned thread) {
    const unsigned head_of_all = block / w.blocks_per_head;
    const auto first_row =
        static_cast<int>((block % w.blocks_per_head * kGroups + thread / kWarpgroup) * kHopperRows);
    return {head_of_all / w.heads, head_of_all % w.heads, first_row, w.rows.count - first_row};
}

//   kTail: columns in the last 64, rounded up to a multiple of 16
template <class T, bool kOfKeys, int kTail>
__global__ void __launch_bounds__(
    device::warpgroup_bound(attention_tiles::hopper_backward_groups(kOfKeys)),
    attention_tiles::hopper_backward_blocks(kOfKeys))
    attention_backward_hopper_kernel(const __grid_constant__ HopperWork w) {
    if constexpr (device::kHasWarpgroups) {
        constexpr int kGroups = attention_tiles::hopper_backward_groups(kOfKeys);
        constexpr int kThreads = kGroups * kWarpgroup;
        const int thread = static_cast<int>(threadIdx.x);
        const int group = thread / kWarpgroup;
        const Place place = place_of<kGroups>(w, blockIdx.x, threadIdx.x);
        const int64_t image = place.image, head = place.head;
        const int first_row = place.first_row, left_rows = place.left_rows;
        const int queries = kOfKeys ? w.columns.count : w.rows.count;
        const int keys = kOfKeys ? w.rows.count : w.columns.count;
        const int64_t of_head = (image * w.heads + head) * queries;
        const float* lse = w.lse + of_head;
        float* delta = w.delta + of_head;
        const float* size = w.size == nullptr ? nullptr : w.size + image * keys;
        const auto base = [&](const void* data, const HeadStrides& s) {
            return static_cast<const T*>(data) + image * s.batch + head * s.head;
        };

        unsigned char* own = device::dynamic_shared() + group * 2 * kTileBytes;
        unsigned char* stages = device::dynamic_shared() + kGroups * 2 * kTileBytes;
        auto* sides_x = reinterpret_cast<float*>(stages + kHopperStages * 2 * kTileBytes);
        float* sides_y = sides_x + kHopperStages * kColumns;

        {
            const int from = left_rows > 0 ? first_row : 0;
            const Pair& r = w.rows;
            copy_tile<T, kWarpgroup, kHopperRows>(
                own, base(r.first, r.first_strides) + from * r.first_strides.token,
                r.first_strides.token, left_rows, r.first);
            copy_tile<T, kWarpgroup, kHopperRows>(
                own + kTileBytes, base(r.second, r.second_strides) + from * r.second_strides.token,
                r.second_strides.token, left_rows, r.second);
        }
        const Pair& c = w.columns;
        // Starts the copies of 64 columns, and returns what this thread's one brings. Image and
        // head are kept in two registers, where pointers would take eight.
        const auto start_tile = [&](int tile, int stage) {
            unsigned char* to = stages + stage * 2 * kTileBytes;
            const int64_t of_image = device::forget_origin(place.image);
            const int64_t of_heads = device::forget_origin(place.head);
            const int first = tile * kColumns;
            const auto copy = [&](unsigned char* to, const void* data, const HeadStrides& s) {
                copy_tile<T, kThreads, kColumns>(to,
                                                 static_cast<const T*>(data) + of_image * s.batch +
                                                     of_heads * s.head + first * s.token,
                                                 s.token, c.count - first, data);
            };
            copy(to, c.first, c.first_strides);
            copy(to + kTileBytes, c.second, c.second_strides);
            device::cp_async_commit();
            const int column = first + thread;
            Side side{1.0f, 0.0f};
            if (thread < kColumns && column < c.count) {
                if constexpr (kOfKeys) {
                    const int64_t at = (of_image * w.heads + of_heads) * c.count + column;
                    side = {w.lse[at], w.delta[at]};
                } else if (w.size != nullptr) {
                    side.x = w.size[of_image * c.count + column];
                }
            }
            return side;
        };
        // Behind the copies, when what was loaded has come.
        const auto write_side = [&](int tile, int stage, Side side) {
            if (thread >= kColumns) return;
            const bool exists = tile * kColumns + thread < c.count;
            float x = -INFINITY;
            if (exists) x = kOfKeys ? -kLog2E * side.x : log2f(side.x);
            sides_x[stage * kColumns + thread] = x;
            if constexpr (kOfKeys) sides_y[stage * kColumns + thread] = side.y;
        };

        const int last = (c.count - 1) / kColumns;
        static_assert(kHopperStages == 3, "two on their way beside the one that is due");
        write_side(0, 0, start_tile(0, 0));
        if (last > 0) {
            write_side(1, 1, start_tile(1, 1));
        } else {
            device::cp_async_commit();
        }

        // The rows' sides: of row r of the warpgroup, in lanes 2 r and 2 r + 1 at first.
        const int64_t stride = int64_t{w.heads} * kHopperDim;
        Side row[2];
        if constexpr (!kOfKeys) {
            const int in_group = thread % kWarpgroup / 2;
            const int query = first_row + in_group;
            const bool exists = in_group < left_rows;
            const int64_t at = exists ? query : 0;
            const Pair& r = w.rows;
            const float of_row = dot_row<T>(
                base(r.second, r.second_strides) + at * r.second_strides.token,
                static_cast<const T*>(w.out) + (image * queries + at) * stride + head * kHopperDim);
            if (exists && thread % 2 == 0) delta[query] = of_row;
            const float x = exists ? -kLog2E * lse[query] : -INFINITY;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Lane 4 g + t wants row g + 8 half of the warp, of which lane 2 (g + 8 half)
                // knows.
                const int from = thread % device::kWarp / 4 * 2 + 16 * half;
                row[half] = {__shfl_sync(device::kFullMask, x, from),
                             __shfl_sync(device::kFullMask, of_row, from)};
            }
        } else {
            const int in_group =
                thread % kWarpgroup / device::kWarp * 16 + thread % device::kWarp / 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row[half] = {
                    attention_cuda_detail::log2_size(size, first_row + in_group + 8 * half, keys),
                    0.0f};
            }
        }

        float sums_1[32], sums_2[32];  // the second for keys only
#pragma unroll
        for (int i = 0; i < 32; ++i) sums_1[i] = sums_2[i] = 0.0f;
        float s[32], dp[32];
        uint32_t p[4][4], ds[4][4];
        const uint64_t operands = device::operand_of(stages);
        const auto first_of = [&](int stage) {
            return operands + device::operand_rows(stage * 2 * kColumns);
        };
        const auto second_of = [&](int stage) {
            return operands + device::operand_rows((stage * 2 + 1) * kColumns);
        };
        const float* x_0 = sides_x + thread % 4 * 2;
        const float* y_0 = sides_y + thread % 4 * 2;
        const float scale = w.scale * kLog2E;
        // The columns of the stage that is due, kCount of them.
        const auto meet = [&](int stage, auto count) {
            constexpr int kCount = decltype(count)::value;
            // Worked out each time: else all its steps along the channels stay in registers.
            const unsigned of_group = device::forget_origin(threadIdx.x) / kWarpgroup;
            const uint64_t own_1 =
                device::operand_of(device::dynamic_shared() + of_group * 2 * kTileBytes);
            const uint64_t own_2 = own_1 + device::operand_rows(kHopperRows);
            device::pin(s);
            device::pin(dp);
            device::products_begin();
            start_logits<T>(s, own_1, first_of(stage));
            start_logits<T>(dp, own_2, second_of(stage));
            device::products_commit();
            device::products_wait<0>();
            device::pin(s);
            device::pin(dp);
            weigh<T, kOfKeys, kCount>(s, dp, row, x_0 + stage * kColumns, y_0 + stage * kColumns,
                                      scale, p, ds);
            device::pin(sums_1);
            if constexpr (kOfKeys) device::pin(sums_2);
            device::products_begin();
            if constexpr (kOfKeys) start_sums<T, kCount>(sums_2, p, second_of(stage));
            start_sums<T, kCount>(sums_1, ds, first_of(stage));
            device::products_commit();
            device::products_wait<0>();
            device::pin(sums_1);
            if constexpr (kOfKeys) device::pin(sums_2);
        };
        // Behind this, the columns that are due, `count` of them, are there for all, and nobody is
        // at the ones before any more. Hidden keys are zeros, as by sync_shown of
        // attention_tile.cuh.
        const auto wait_for_stage = [&](int stage, int count) {
            device::cp_async_wait<1>();
            device::share_with_products();
            if constexpr (kOfKeys) {
                __syncthreads();
            } else {
                // What this thread wrote itself.
                const bool hides = thread < kColumns && thread < count &&
                                   sides_x[stage * kColumns + thread] == -INFINITY;
                if (!__syncthreads_or(hides)) return;
                unsigned char* columns = stages + stage * 2 * kTileBytes;
                if (hides) {
                    attention_cuda_detail::clear_pair(columns, columns + kTileBytes, thread);
                }
                device::share_with_products();
                __syncthreads();
            }
        };

        int now = 0;
#pragma unroll 1
        for (int j = 0; j < last; ++j) {
            wait_for_stage(now, kColumns);
            const int after = now == 0 ? kHopperStages - 1 : now - 1;  // the one before, and next
            Side side{};
            if (j + 2 <= last) {
                side = start_tile(j + 2, after);
            } else {
                device::cp_async_commit();  // a group all the same, so that waiting counts right
            }
            meet(now, std::integral_constant<int, kColumns>());
            if (j + 2 <= last) write_side(j + 2, after, side);
            now = now == kHopperStages - 1 ? 0 : now + 1;
        }
        wait_for_stage(now, c.count - last * kColumns);
        meet(now, std::integral_constant<int, kTail>());

        if constexpr (kOfKeys) {  // a NaN in a hidden row of k or v has reached its sums
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if (row[i / 2 % 2].x == -INFINITY) sums_1[i] = sums_2[i] = 0.0f;
            }
        }
        // Worked out again, not kept in registers all the while.
        const unsigned self = device::forget_origin(threadIdx.x);
        const Place end = place_of<kGroups>(w, device::forget_origin(blockIdx.x), self);
        const auto of_warp = static_cast<int>(self % kWarpgroup / device::kWarp * 16);
        const int count = end.left_rows - of_warp;
        if (count <= 0) return;
        const int64_t to = (int64_t{end.image} * w.rows.count + end.first_row + of_warp) * stride +
                           int64_t{end.head} * kHopperDim;
        const float by_scale[2] = {w.scale, w.scale};
        attention_cuda_detail::write_rows<T>(sums_1, by_scale, static_cast<T*>(w.grad_first) + to,
                                             stride, count);
        if constexpr (kOfKeys) {
            const float ones[2] = {1.0f, 1.0f};
            attention_cuda_detail::write_rows<T>(sums_2, ones, static_cast<T*>(w.grad_second) + to,
                                                 stride, count);
        }
    }
}

// --- launches ----------------------------------------------------------------------------------

template <class T, bool kOfKeys>
cudaError_t launch_one(HopperWork w, int64_t batch, cudaStream_t stream) {
    if (w.rows.count == 0) return cudaSuccess;
    constexpr int kGroups = attention_tiles::hopper_backward_groups(kOfKeys);
    const int64_t per_head = attention_tiles::ceil_div(w.rows.count, kGroups * kHopperRows);
    const int64_t blocks = batch * w.heads * per_head;
    if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    w.blocks_per_head = static_cast<unsigned>(per_head);
    const auto go = [&](auto kernel) {
        return device::launch(
            kernel, dim3(static_cast<unsigned>(blocks)), dim3(kGroups * kWarpgroup),
            static_cast<size_t>(attention_tiles::hopper_backward_shared_bytes(kGroups)), stream, w);
    };
    switch ((w.columns.count - 1) % kColumns / 16) {
        case 0:
            return go(attention_backward_hopper_kernel<T, kOfKeys, 16>);
        case 1:
            return go(attention_backward_hopper_kernel<T, kOfKeys, 32>);
        case 2:
            return go(attention_backward_hopper_kernel<T, kOfKeys, 48>);
        default:
            return go(attention_backward_hopper_kernel<T, kOfKeys, 64>);
    }
}

template <class T>
cudaError_t launch_both(HopperWork w, const Pair& queries, const Pair& keys,
                        const AttentionBackwardParams& p, cudaStream_t stream) {
    w.rows = queries;
    w.columns = keys;
    w.grad_first = p.grad_q;
    const cudaError_t error = launch_one<T, false>(w, p.batch, stream);
    if (error != cudaSuccess) return error;
    w.rows = keys;
    w.columns = queries;
    w.grad_first = p.grad_k;
    w.grad_second = p.grad_v;
    return launch_one<T, true>(w, p.batch, stream);
}

}  // namespace

bool hopper_takes(const AttentionBackwardParams& p, const device::Chip& chip) {
    if (chip.capability != 90 || p.dim != kHopperDim || p.queries == 0 || p.keys == 0 ||
        (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)) {
        return false;
    }
    if (!device::takes_blocks_of(attention_backward_hopper_kernel<device::BFloat, true, kColumns>,
                                 kWarpgroup)) {
        return false;
    }
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 4 * kHopperRows;
    return p.queries <= kMost && p.keys <= kMost && vectors_fit(p);
}

cudaError_t launch_attention_backward_hopper(const AttentionBackwardParams& p, float* delta,
                                             cudaStream_t stream) {
    HopperWork w{};
    w.heads = static_cast<unsigned>(p.heads);
    w.scale = static_cast<float>(p.scale);
    w.size = p.size;
    w.lse = static_cast<const float*>(p.lse);
    w.out = p.out;
    w.delta = delta;
    const Pair queries{p.q, p.grad, p.q_strides, p.grad_strides, static_cast<int>(p.queries)};
    const Pair keys{p.k, p.v, p.k_strides, p.v_strides, static_cast<int>(p.keys)};
    return p.dtype == DType::kFloat16 ? launch_both<device::Half>(w, queries, keys, p, stream)
                                      : launch_both<device::BFloat>(w, queries, keys, p, stream);
}

}  // namespace tome::attention_backward_detail
