// match on tensor cores, for float32, float16 and bfloat16: one launch from the keys to the plan.
#include "launch.h"
#include "match_finish.cuh"
#include "match_kernels.h"
#include "match_rows.cuh"

namespace tome::match_cuda_detail {
namespace {

using match_tiles::kRowStep;
using match_tiles::kThreads;

// What a warp scores at once: 16 rows of A with 8 * kSteps columns of B.
//
//                 8 * kSteps columns          acc[s][0, 1]: row g,     columns 8 s + 2 t + {0, 1}
//             +--------+--------+--           acc[s][2, 3]: row g + 8, the same columns
//   16 rows   | acc[0] | acc[1] | ..          with g = lane / 4, t = lane % 4
//             +--------+--------+--
//
// Three products make one of split values: high * high + high * low + low * high. Every score is
// the same chain of operations wherever its tile lies, so equal tokens score equally.
//   rows_a   (16, row_records) shared
//   rows_b   (8 * kSteps, row_records) shared
//   usable_b (8 * kSteps) shared
//   best     (16) shared, out: packed best column of each row; column_0 is the index of rows_b[0]
template <int kSteps>
__device__ __forceinline__ void score_unit(const MatchArgs& m, const Record* rows_a,
                                           const Record* rows_b, const unsigned char* usable_b,
                                           int32_t column_0, Packed* best) {
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp;
    const int g = lane / 4, t = lane % 4;
    const Record* a_low = rows_a + g * m.stride + t;
    const Record* a_high = a_low + 8 * m.stride;
    const Record* b_row = rows_b + g * m.stride + t;
    float acc[kSteps][4] = {};
    for (int k = 0; k < m.records; k += 4) {
        const Record low = a_low[k], high = a_high[k];
        const uint32_t a[4] = {low.x, high.x, low.y, high.y};
        const uint32_t a_rest[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const Record column = b_row[s * 8 * m.stride + k];
            const uint32_t b[2] = {column.x, column.y}, b_rest[2] = {column.z, column.w};
            device::mma_m16n8k16<Half>(acc[s], a, b_rest);
            device::mma_m16n8k16<Half>(acc[s], a_rest, b);
            device::mma_m16n8k16<Half>(acc[s], a, b);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top_score = -INFINITY;
        int top_column = 0;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int column = s * 8 + 2 * t + j;
                const float score = acc[s][2 * half + j];
                // Strictly greater: among equals the earlier column stays.
                if (usable_b[column] && score > top_score) {
                    top_score = score;
                    top_column = column;
                }
            }
        }
        Packed top = top_score == -INFINITY ? 0 : pack_score(top_score, column_0 + top_column);
        top = larger(top, __shfl_xor_sync(kFullMask, top, 1));
        top = larger(top, __shfl_xor_sync(kFullMask, top, 2));
        if (t == 0) best[g + 8 * half] = top;
    }
}

// A block owns up to rows_a tokens of one image's set A and one share of its set B, and passes over
// that share rows_b tokens at a time. Warps deal out the units of a tile; then thread i joins row
// i's maxima, and keeps the best in a register from tile to tile.
//
//                  share 0              share 1                 block = (image, rows of A, share)
//              +-------+-------+   +-------+-------+
//   A rows     | tile  | tile  |   |       |       |            of a tile, per unit: maxima only;
//   of block   |       |  --> next |       |       |            no score leaves the registers
//              +-------+-------+   +-------+-------+
//
// The last block of an image to finish ranks its A tokens and writes its plan.
template <class In, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    match_tile_kernel(const __grid_constant__ MatchArgs m) {
    device::let_next_kernel_begin();  // merge: see match.cu
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / device::kWarp;
    const int64_t image = blockIdx.x / m.blocks_per_image;
    const int of_image = static_cast<int>(blockIdx.x) % m.blocks_per_image;
    const int splits = static_cast<int>(m.tiles.splits_b);
    const int64_t begin_a = int64_t{of_image / splits} * m.tiles.rows_a;
    const int64_t share = of_image % splits;
    const int64_t begin_b = share * m.tiles_b / splits * m.tiles.rows_b;
    const int64_t past_b = (share + 1) * m.tiles_b / splits * m.tiles.rows_b;
    const int64_t end_b = past_b < m.sets.num_b ? past_b : m.sets.num_b;

    unsigned char* shared = device::dynamic_shared();
    auto* rows_a = reinterpret_cast<Record*>(shared);
    auto* rows_b = reinterpret_cast<Record*>(shared + m.layout.rows_b);
    auto* unit_best = reinterpret_cast<Packed*>(shared + m.layout.best);
    unsigned char* usable_a = shared + m.layout.usable;
    unsigned char* usable_b = usable_a + m.tiles.rows_a;

    const In* metric = static_cast<const In*>(m.p.metric) + image * m.p.stride_batch;
    const int64_t left_a = m.sets.num_a - begin_a;
    const int count_a = static_cast<int>(left_a < m.tiles.rows_a ? left_a : m.tiles.rows_a);
    const int units_a = (count_a + kRowStep - 1) / kRowStep;
    stage_rows<In, kVector>(m, metric, m.sets.first_a + 2 * begin_a, count_a, units_a * kRowStep,
                            rows_a, usable_a);
    // Wide units load fewer records per product; narrow ones keep all warps busy in small tiles.
    const bool wide = m.tiles.rows_b % 32 == 0 &&
                      m.tiles.rows_a / kRowStep * m.tiles.rows_b / 32 >= kThreads / device::kWarp;
    const int width = wide ? 32 : 16;
    Packed best = 0;
    for (int64_t tile = begin_b; tile < end_b; tile += m.tiles.rows_b) {
        const int64_t left_b = end_b - tile;
        const int count_b = static_cast<int>(left_b < m.tiles.rows_b ? left_b : m.tiles.rows_b);
        const int units_b = (count_b + width - 1) / width;
        stage_rows<In, kVector>(m, metric, m.sets.first_b + 2 * tile, count_b, units_b * width,
                                rows_b, usable_b);
        __syncthreads();
        for (int unit = warp; unit < units_a * units_b; unit += kThreads / device::kWarp) {
            const int row = unit % units_a * kRowStep, column = unit / units_a * width;
            const Record* a = rows_a + row * m.stride;
            const Record* b = rows_b + column * m.stride;
            Packed* out = unit_best + unit / units_a * m.tiles.rows_a + row;
            const auto column_0 = static_cast<int32_t>(tile) + column;
            if (wide) {
                score_unit<4>(m, a, b, usable_b + column, column_0, out);
            } else {
                score_unit<2>(m, a, b, usable_b + column, column_0, out);
            }
        }
        __syncthreads();
        if (thread < count_a) {
            for (int unit = 0; unit < units_b; ++unit) {
                best = larger(best, unit_best[unit * m.tiles.rows_a + thread]);
            }
        }
    }
    if (thread < count_a) {
        Packed* to = m.best + image * m.sets.num_a + begin_a + thread;
        const Packed value = usable_a[thread] ? best : 0;
        if (m.blocks_per_image == 1) {
            *to = value;
        } else {
            atomicMax(to, value);
        }
    }
    if (last_block_of_image(m, image, shared)) finish_image<float>(m, image, shared);
}

template <class In>
cudaError_t launch_of(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const auto whole = [](int64_t stride) { return stride * int64_t{sizeof(In)} % 16 == 0; };
    const bool vector = m.p.dim % 8 == 0 && whole(m.p.stride_batch) && whole(m.p.stride_head) &&
                        whole(m.p.stride_token) &&
                        reinterpret_cast<uintptr_t>(m.p.metric) % 16 == 0;
    const auto kernel = vector ? match_tile_kernel<In, true> : match_tile_kernel<In, false>;
    return device::launch(kernel, grid, dim3(kThreads), static_cast<size_t>(m.tiles.shared_bytes),
                          stream, m);
}

}  // namespace

cudaError_t launch_match_tile(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    switch (m.p.dtype) {
        case DType::kFloat32:
            return launch_of<float>(m, grid, stream);
        case DType::kFloat16:
            return launch_of<Half>(m, grid, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(m, grid, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome::match_cuda_detail
