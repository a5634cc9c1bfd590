// What blocks of match's kernels on tensor cores share: their place, the end of their work, and the
// launch where there is one kernel only.
#pragma once

#include "launch.h"
#include "match_finish.cuh"

namespace tome::match_cuda_detail {

using match_tiles::kRowStep;

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
struct Place {
    int64_t image;
    int first_group_a, count_a, groups_a;  // of A, in the image and in the block
    int first_tile, past_tile;             // of B

    __device__ explicit Place(const MatchArgs& m, unsigned block = blockIdx.x) {
        const auto per_image = static_cast<unsigned>(m.blocks_per_image);
        const auto of_image = static_cast<int>(block % per_image);
        const auto splits = static_cast<int>(m.tiles.splits_b);
        image = block / per_image;
        const int64_t begin_a = int64_t{of_image / splits} * m.tiles.rows_a;
        const int64_t left_a = m.sets.num_a - begin_a;
        first_group_a = static_cast<int>(begin_a / kRowStep);
        count_a = static_cast<int>(left_a < m.tiles.rows_a ? left_a : m.tiles.rows_a);
        groups_a = (count_a + kRowStep - 1) / kRowStep;
        const int64_t share = of_image % splits;
        first_tile = static_cast<int>(share * m.tiles_b / splits);
        past_tile = static_cast<int>((share + 1) * m.tiles_b / splits);
    }
};

// The end of a block's work: `mine` is the best of thread's row.
template <bool kListed>
__device__ __forceinline__ void finish_block(const MatchArgs& m, const Place& place, Packed mine,
                                             unsigned char* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    if (!kListed && m.blocks_per_image == 1) {
        __syncthreads();  // what follows takes the same memory
        finish_small_image(m, place.image, shared, [&](int64_t) { return mine; });
        return;
    }
    if (thread < place.count_a) {
        Packed* to = m.best + place.image * m.sets.num_a + place.first_group_a * kRowStep + thread;
        if (m.tiles.splits_b == 1) {
            *to = mine;
        } else {
            atomicMax(to, mine);
        }
    }
    if (!last_block_of_image(m, place.image, shared)) return;
    if constexpr (kListed) {
        finish_listed_image<float>(m, place.image, shared);
    } else {
        finish_image<float>(m, place.image, shared);
    }
}

// Launches the only kernel of a match: the ordinary way behind a clear of the workspace, which is
// no kernel. See match.cu.
template <class Kernel>
cudaError_t launch_only_kernel(Kernel kernel, const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const auto bytes = static_cast<size_t>(m.tiles.shared_bytes);
    return m.blocks_per_image > 1
               ? device::launch(kernel, grid, dim3(kThreads), bytes, stream, m)
               : device::launch_overlapping(kernel, grid, dim3(kThreads), bytes, stream, m);
}

}  // namespace tome::match_cuda_detail
