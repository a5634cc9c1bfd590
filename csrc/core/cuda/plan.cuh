// Grouping the tokens of an image by output row, by one block: a stable counting sort.
#pragma once

#include "device.h"
#include "tiles.h"

namespace tome::device {

// The exclusive sum of `value` over the block's threads, and the sum of all; `scratch` is shared,
// (kWarp + 1) ints. Every thread of the block calls it.
__device__ __forceinline__ int block_exclusive_sum(int value, int* total, int* scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
    int sum = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const int below = __shfl_up_sync(kFullMask, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == kWarp - 1) scratch[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        int all = lane < warps ? scratch[lane] : 0;
        for (int step = 1; step < kWarp; step *= 2) {
            const int below = __shfl_up_sync(kFullMask, all, step);
            if (lane >= step) all += below;
        }
        scratch[lane] = all;
    }
    __syncthreads();
    *total = scratch[warps - 1];
    const int before = warp == 0 ? 0 : scratch[warp - 1];
    __syncthreads();  // scratch may be used again
    return before + sum - value;
}

// A row's place in the sort: its index, or -1 for a token that is dropped or points outside.
__device__ __forceinline__ int row_or_dropped(int32_t row, int64_t rows) {
    return row >= 0 && row < rows ? row : -1;
}

// Called by every thread of a block of whole warps.
//   assign  (tokens)        as PlanParams; may be written by other threads before a barrier
//   members (tokens) out    offsets (rows + 1) out
//   cursor  (rows)          shared memory, or offsets + 1
//   scratch (kWarp + 1)     shared memory
//
//   count:   cursor[m] = tokens of row m
//   scan:    cursor[m] = begin of row m = offsets[m]
//   place:   warp 0 takes 32 tokens at a time, in order. Lanes of one row find each other; the
//            lowest one moves the row's cursor on by their number. cursor[m] ends as end of row m,
//            which is why it may be offsets[m + 1].
__device__ inline void plan_image(const int32_t* assign, int64_t tokens, int64_t rows,
                                  int32_t* members, int32_t* offsets, int32_t* cursor,
                                  int* scratch) {
    const auto thread = static_cast<int64_t>(threadIdx.x);
    const auto threads = static_cast<int64_t>(blockDim.x);
    const bool in_place = cursor == offsets + 1;

    for (int64_t m = thread; m < rows; m += threads) cursor[m] = 0;
    __syncthreads();
    for (int64_t n = thread; n < tokens; n += threads) {
        const int row = row_or_dropped(assign[n], rows);
        if (row >= 0) atomicAdd(&cursor[row], 1);
    }
    __syncthreads();

    int begin = 0;
    for (int64_t first = 0; first < rows; first += threads) {
        const int64_t m = first + thread;
        int total = 0;
        const int before = block_exclusive_sum(m < rows ? cursor[m] : 0, &total, scratch);
        if (m < rows) {
            cursor[m] = begin + before;
            if (!in_place) offsets[m] = begin + before;
        }
        begin += total;
    }
    if (thread == 0) {
        if (in_place) offsets[0] = 0;
        if (!in_place || rows == 0) offsets[rows] = begin;
    }
    __syncthreads();

    if (thread >= kWarp) return;
    const auto lane = static_cast<unsigned>(thread);
    int dropped = begin;
    for (int64_t first = 0; first < tokens; first += kWarp) {
        const int64_t n = first + lane;
        const int row = n < tokens ? row_or_dropped(assign[n], rows) : -2;
        const unsigned peers = __match_any_sync(kFullMask, row);
        const int rank = __popc(peers & ((1u << lane) - 1));
        int at = dropped + rank;
        if (row >= 0) at = cursor[row] + rank;
        __syncwarp();
        if (row >= 0 && rank == 0) cursor[row] += __popc(peers);
        if (row > -2) members[at] = static_cast<int32_t>(n);
        dropped += __popc(__ballot_sync(kFullMask, row == -1));
        __syncwarp();
    }
}

// How many of a block's warps may place tokens, each with cursors of its own in `bytes` of shared
// memory: plan_image_by_warps. With 1 plan_image serves as well.
__device__ __forceinline__ int warps_that_place(int64_t tokens, int64_t rows, int warps,
                                                int64_t bytes) {
    if (tokens >= 65536) return 1;  // a cursor has 16 bits
    while (warps > 1 && warps * (rows + 1) * int64_t{sizeof(uint16_t)} > bytes) warps /= 2;
    return warps;
}

// The same as plan_image, faster: `warps` of the block place tokens, each a share of them that lie
// side by side.
//   cursors (warps, rows + 1) shared; tokens below 65536
//
//   count:   cursors[w][m] = tokens of row m in warp w's share; row `rows` is of dropped tokens
//   scan:    cursors[w][m] = where those begin: rows in order, and of a row one share after another
//   place:   as in plan_image; warps in step with nobody, since their cursors are their own
__device__ inline void plan_image_by_warps(const int32_t* assign, int64_t all_tokens,
                                           int64_t all_rows, int32_t* members, int32_t* offsets,
                                           int warps, uint16_t* cursors, int* scratch) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % kWarp, warp = thread / kWarp;
    const int tokens = static_cast<int>(all_tokens), rows = static_cast<int>(all_rows);
    const int pitch = rows + 1;
    const int share = (tokens + warps * kWarp - 1) / (warps * kWarp) * kWarp;
    const int first = warp < warps ? warp * share : tokens;
    const int past = first + share < tokens ? first + share : tokens;
    uint16_t* mine = cursors + (warp < warps ? warp : 0) * pitch;

    // each(token, place) for the warp's tokens; moves its cursors on.
    const auto pass = [&](const auto& each) {
        int32_t next = first + lane < past ? assign[first + lane] : 0;
        for (int begin = first; begin < past; begin += kWarp) {
            const int n = begin + lane;
            const int known = row_or_dropped(next, rows);
            if (n + kWarp < past) next = assign[n + kWarp];  // on its way during this turn
            const int row = n >= past ? -1 : known >= 0 ? known : rows;
            const unsigned peers = __match_any_sync(kFullMask, row);
            const int rank = __popc(peers & ((1u << lane) - 1));
            const int at = row >= 0 ? mine[row] : 0;
            __syncwarp();
            if (row >= 0 && rank == 0) mine[row] = static_cast<uint16_t>(at + __popc(peers));
            if (row >= 0) each(n, at + rank);
            __syncwarp();
        }
    };

    for (int i = thread; i < warps * pitch; i += threads) cursors[i] = 0;
    __syncthreads();
    pass([](int, int) {});
    __syncthreads();

    int begin = 0;
    for (int base = 0; base < pitch; base += threads) {
        const int m = base + thread;
        int count = 0;
        for (int w = 0; m < pitch && w < warps; ++w) count += cursors[w * pitch + m];
        int total = 0;
        int at = begin + block_exclusive_sum(count, &total, scratch);
        if (m < pitch) offsets[m] = at;
        for (int w = 0; m < pitch && w < warps; ++w) {
            const int of_share = cursors[w * pitch + m];
            cursors[w * pitch + m] = static_cast<uint16_t>(at);
            at += of_share;
        }
        begin += total;
    }
    __syncthreads();
    pass([&](int n, int at) { members[at] = n; });
}

}  // namespace tome::device
