// match on tensor cores, for float32, float16 and bfloat16: from rows, staged here or by
// match_stage.cu, to the plan.
#include "match_blocks.cuh"
#include "match_kernels.h"
#include "match_rows.cuh"

namespace tome::match_cuda_detail {
namespace {

using match_tiles::kRowStep;
using match_tiles::kShortDim;
using match_tiles::kThreads;

constexpr int kWarps = kThreads / device::kWarp;

// What a warp scores at once: 16 rows of A with 8 * kSteps columns of B.
//
//                 8 * kSteps columns          acc[s][0, 1]: row g,     columns 8 s + 2 t + {0, 1}
//             +--------+--------+--           acc[s][2, 3]: row g + 8, the same columns
//   16 rows   | acc[0] | acc[1] | ..          with g = lane / 4, t = lane % 4
//             +--------+--------+--
//
// Three products make one of split values: high * low + low * high + high * high. Every score is
// the same chain of operations wherever its tile lies, so equal tokens score equally. Unusable
// tokens' scores are NaN, which no comparison takes for the larger.
//   rows_a   (slots) shared: a group
//   rows_b   (kSteps / 2, slots) shared: groups
//   best     (16) shared, out: packed best column of each row; column_0 is the index of rows_b[0]
template <int kSteps>
__device__ __forceinline__ void score_unit(int steps, const Record* rows_a, const Record* rows_b,
                                           int32_t column_0, Packed* best) {
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp;
    const int g = lane / 4, t = lane % 4;
    const int group = steps * 4 * kRowStep;
    float acc[kSteps][4] = {};
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
        const Record high = rows_a[slot(k, 0, lane)], low = rows_a[slot(k, 1, lane)];
        const uint32_t a[4] = {high.x, high.y, high.z, high.w};
        const uint32_t a_rest[4] = {low.x, low.y, low.z, low.w};
        Record columns[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            columns[s] = rows_b[s / 2 * group + slot(k, s % 2, lane)];
        }
        // One product for all columns, then the next: none waits for the one before it.
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t b_rest[2] = {columns[s].z, columns[s].w};
            device::mma_m16n8k16<Half>(acc[s], a, b_rest);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t b[2] = {columns[s].x, columns[s].y};
            device::mma_m16n8k16<Half>(acc[s], a_rest, b);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t b[2] = {columns[s].x, columns[s].y};
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
                const float score = acc[s][2 * half + j];
                // Strictly greater: among equals the earlier column stays.
                if (score > top_score) {
                    top_score = score;
                    top_column = s * 8 + 2 * t + j;
                }
            }
        }
        const Packed top = best_of_lanes(top_score, column_0 + top_column);
        if (t == 0) best[g + 8 * half] = top;
    }
}

// A tile: all units of groups of A with groups of B, dealt out to the warps.
//   best (units across, rows of A) shared, out; returns the units across
__device__ __forceinline__ int score_tile(const MatchArgs& m, const Record* rows_a, int groups_a,
                                          const Record* rows_b, int groups_b, int64_t column_0,
                                          Packed* best) {
    const int group = m.steps * 4 * kRowStep;
    // Wide units load fewer records per product; narrow ones keep all warps busy in small tiles.
    const int width = groups_a * ((groups_b + 1) / 2) >= kWarps ? 2 : 1;  // in groups
    const int across = (groups_b + width - 1) / width;
    for (int unit = static_cast<int>(threadIdx.x) / device::kWarp; unit < groups_a * across;
         unit += kWarps) {
        const int row = unit % groups_a, column = unit / groups_a * width;
        const Record* a = rows_a + row * group;
        const Record* b = rows_b + column * group;
        Packed* out = best + unit / groups_a * m.tiles.rows_a + row * kRowStep;
        const auto first = static_cast<int32_t>(column_0) + column * kRowStep;
        if (width == 2 && column + 1 < groups_b) {
            score_unit<4>(m.steps, a, b, first, out);
        } else {
            score_unit<2>(m.steps, a, b, first, out);
        }
    }
    return across;
}

// Thread i's share of what score_tile left: the best of row i.
__device__ __forceinline__ Packed best_of_row(const MatchArgs& m, const Packed* best, int across) {
    Packed top = 0;
    for (int unit = 0; unit < across; ++unit) {
        top = larger(top, best[unit * m.tiles.rows_a + static_cast<int>(threadIdx.x)]);
    }
    return top;
}

__device__ __forceinline__ int groups_of_tile(const MatchArgs& m, int tile) {
    const int most = m.tiles.rows_b / kRowStep, left = m.groups_b - tile * most;
    return left < most ? left : most;
}

// Stages the rows it needs.
template <class In, bool kVector, bool kShort>
__global__ void __launch_bounds__(kThreads, 2)
    match_direct_kernel(const __grid_constant__ MatchArgs m) {
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();  // merge: see match.cu
    const Place place(m);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / device::kWarp;
    unsigned char* shared = device::dynamic_shared();
    auto* rows_a = reinterpret_cast<Record*>(shared);
    auto* rows_b = reinterpret_cast<Record*>(shared + m.layout.rows_b);
    auto* best = reinterpret_cast<Packed*>(shared + m.layout.best);
    const int group_records = m.steps * 4 * kRowStep;

    const In* metric = static_cast<const In*>(m.p.metric) + place.image * m.p.stride_batch;
    for (int i = warp; i < 4 * place.groups_a; i += kWarps) {
        const int64_t row = int64_t{place.first_group_a + i / 4} * kRowStep;
        stage_rows<In, kVector, kShort, true>(m, metric, Rows(m, place.image, true, row),
                                              m.sets.num_a - row, i % 4,
                                              rows_a + i / 4 * group_records);
    }
    Packed mine = 0;
    for (int tile = place.first_tile; tile < place.past_tile; ++tile) {
        const int groups_b = groups_of_tile(m, tile);
        for (int i = warp; i < 4 * groups_b; i += kWarps) {
            const int64_t row = int64_t{tile} * m.tiles.rows_b + i / 4 * kRowStep;
            stage_rows<In, kVector, kShort, false>(m, metric, Rows(m, place.image, false, row),
                                                   m.sets.num_b - row, i % 4,
                                                   rows_b + i / 4 * group_records);
        }
        __syncthreads();
        const int across = score_tile(m, rows_a, place.groups_a, rows_b, groups_b,
                                      int64_t{tile} * m.tiles.rows_b, best);
        __syncthreads();
        if (thread < place.count_a) mine = larger(mine, best_of_row(m, best, across));
    }
    finish_block<false>(m, place, mine, shared);
}

// Starts copies of `groups` staged groups, for the whole block.
__device__ __forceinline__ void copy_groups(const Record* from, int groups, int group_records,
                                            Record* to) {
    for (int i = static_cast<int>(threadIdx.x); i < groups * group_records; i += kThreads) {
        device::cp_async_16(to + i, from + i);
    }
}

// Takes rows that match_stage.cu staged; copies a tile while the one before it is scored.
template <bool kListed>
__global__ void __launch_bounds__(kThreads, 2)
    match_score_kernel(const __grid_constant__ MatchArgs m) {
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();  // merge: see match.cu
    const Place place(m);
    const int thread = static_cast<int>(threadIdx.x);
    unsigned char* shared = device::dynamic_shared();
    auto* rows_a = reinterpret_cast<Record*>(shared);
    auto* rows_b = reinterpret_cast<Record*>(shared + m.layout.rows_b);
    auto* best = reinterpret_cast<Packed*>(shared + m.layout.best);
    const int group_records = m.steps * 4 * kRowStep;
    const int tile_records = m.tiles.rows_b / kRowStep * group_records;

    const Record* staged = m.rows + place.image * (m.groups_a + m.groups_b) * group_records;
    const Record* staged_b = staged + int64_t{m.groups_a} * group_records;
    const bool two = m.tiles.buffers == 2;
    const auto buffer_of = [&](int tile) {
        return rows_b + (two && (tile - place.first_tile) % 2 != 0 ? tile_records : 0);
    };
    const auto start_copy = [&](int tile) {
        copy_groups(staged_b + int64_t{tile} * tile_records, groups_of_tile(m, tile), group_records,
                    buffer_of(tile));
    };

    copy_groups(staged + int64_t{place.first_group_a} * group_records, place.groups_a,
                group_records, rows_a);
    start_copy(place.first_tile);
    device::cp_async_commit();
    Packed mine = 0;
    for (int tile = place.first_tile; tile < place.past_tile; ++tile) {
        if (two) {
            if (tile + 1 < place.past_tile) start_copy(tile + 1);
            device::cp_async_commit();
            device::cp_async_wait<1>();
        } else {
            device::cp_async_wait<0>();
        }
        __syncthreads();
        const int across =
            score_tile(m, rows_a, place.groups_a, buffer_of(tile), groups_of_tile(m, tile),
                       int64_t{tile} * m.tiles.rows_b, best);
        __syncthreads();
        if (!two && tile + 1 < place.past_tile) {
            start_copy(tile + 1);
            device::cp_async_commit();
        }
        if (thread < place.count_a) mine = larger(mine, best_of_row(m, best, across));
    }
    finish_block<kListed>(m, place, mine, shared);
}

template <class In>
cudaError_t launch_direct_of(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const bool is_short = m.p.dim <= kShortDim;
    const auto kernel = vectors_serve<In>(m.p) ? is_short ? match_direct_kernel<In, true, true>
                                                          : match_direct_kernel<In, true, false>
                        : is_short ? match_direct_kernel<In, false, true>
                                               : match_direct_kernel<In, false, false>;
    return launch_only_kernel(kernel, m, grid, stream);
}

}  // namespace

cudaError_t launch_match_direct(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    switch (m.p.dtype) {
        case DType::kFloat32:
            return launch_direct_of<float>(m, grid, stream);
        case DType::kFloat16:
            return launch_direct_of<Half>(m, grid, stream);
        case DType::kBFloat16:
            return launch_direct_of<BFloat>(m, grid, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_match_score(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const auto kernel = m.listed() ? match_score_kernel<true> : match_score_kernel<false>;
    return device::launch_overlapping(kernel, grid, dim3(kThreads),
                                      static_cast<size_t>(m.tiles.shared_bytes), stream, m);
}

}  // namespace tome::match_cuda_detail
