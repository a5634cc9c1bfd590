// Every choice of tile and launch of merge, merge_add_norm, plan and select, with its reason;
// match_tiles.h has match's. Plain C++: tests/cpp covers it. The reasons come from counting bytes,
// registers and blocks, and from what ptxas reports; where one was measured against another, that
// is said.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace tome::tiles {

// --- merge, merge_backward, unmerge
// ---------------------------------------------------------------

// One warp works on one chunk of one row: kUnroll vectors of up to 16 bytes per lane.
//
// Four loads in flight per lane are to hide the latency of memory behind one another. More would
// cost registers (eight float32 sums per vector), and with them warps, which hide it as well. A
// chunk is 2 KiB at most: one row of ViT-L's 1024 channels in 16-bit floats.
inline constexpr int kUnroll = 4;

// Warps per block. With four, the limit of blocks on a multiprocessor (16 to 32) keeps none of its
// places for warps (32 to 64) empty, and a single image (N - r = 184 rows) still makes 46 blocks,
// each of which may have a multiprocessor of its own.
inline constexpr int kWarpsPerBlock = 4;

// Blocks of the merge kernel that must fit on a multiprocessor. Seven leave a thread 72 registers,
// with which ptxas spills nothing on any architecture (with eight it does on sm_80). They are 28
// warps with up to 2 KiB each on their way, 56 KiB; the 3.35 TB/s of an H100's data sheet ask one
// of its 132 multiprocessors for 25 KiB per microsecond of latency.
inline constexpr int kBlocksResident = 7;

// Whether warps of the merge kernel take two rows each, which must be one chunk. A row of three
// vectors per lane, ViT-B's 768 channels in 16-bit floats, leaves a warp too few loads on their
// way: two to a warp took 58.7 us instead of 61.4 on an H100, at B = 256 and N = 197. A full chunk
// has enough (1024 channels: 56.9 us and 56.6). And they halve the number of warps, which is slower
// where they would all have a place at once anyway (4.5 us and 3.4 at B = 1): only from four times
// as many rows on as the multiprocessors hold.
constexpr bool pairs_serve(int64_t rows, int64_t row_bytes, int multiprocessors) {
    const int64_t held = int64_t{2} * kWarpsPerBlock * kBlocksResident * multiprocessors;
    return row_bytes <= int64_t{3} * 32 * 16 && rows >= 4 * held;
}

// Vectors of 16 bytes serve where every address they'd have is a multiple of 16.
constexpr bool vectors_fit(uint64_t from, uint64_t to, int64_t stride_batch_bytes,
                           int64_t stride_row_bytes, int64_t row_bytes) {
    return (from | to | static_cast<uint64_t>(stride_batch_bytes) |
            static_cast<uint64_t>(stride_row_bytes) | static_cast<uint64_t>(row_bytes)) %
               16 ==
           0;
}

// Chunks in a row of `channels` elements, `per_vector` to a vector. None in an empty row.
constexpr int64_t chunks_per_row(int64_t channels, int64_t per_vector) {
    const int64_t chunk = int64_t{32} * kUnroll * per_vector;
    return (channels + chunk - 1) / chunk;
}

// Blocks for `items` warps of work. Beyond 2^20 blocks, which no GPU holds at once, warps take
// several items: then the grid fits any launch.
constexpr unsigned blocks_for(int64_t items) {
    const int64_t blocks = (items + kWarpsPerBlock - 1) / kWarpsPerBlock;
    return static_cast<unsigned>(blocks < (int64_t{1} << 20) ? blocks : (int64_t{1} << 20));
}

// Images side by side in a grid. More than a GPU holds at once; beyond, blocks take several.
inline constexpr int64_t kMaxImages = 4096;

// --- merge_add_norm
// --------------------------------------------------------------------------------

// A warp holds a whole row in registers: so many float32 per lane, the fewest of these that serve.
// 8 to 32 are 256, 512, 768 and 1024 channels, ViT-T to ViT-L without waste; ViT-H and ViT-g share
// 64, up to 2048. 0 for longer rows, which do not fit. Every further step is three more kernels.
constexpr int norm_elements(int64_t channels) {
    for (int count : {8, 16, 24, 32, 64}) {
        if (channels <= int64_t{32} * count) return count;
    }
    return 0;
}

// Vectors, and elements where vectors don't serve, of a group of a row that is not held as a whole.
inline constexpr int kNormVectors = 4, kNormElements = 8;

// Blocks that must fit on a multiprocessor, for rows of so many values per lane (0: not held). The
// registers this leaves a thread, 80 to 255, are just enough not to spill from sm_80 on; float32,
// whose data takes twice the registers on its way, needs more of them, and so does what keeps norms
// of rows that are not held. 64 values ask for as many as there are: 8 warps at least fit even so,
// with up to 16 KiB each on their way.
constexpr int norm_blocks_resident(int elements, bool float32, bool keep_norms) {
    const int blocks = elements == 64 ? 2 : elements == 32 ? 4 : elements % 24 == 0 ? 5 : 6;
    return float32 || (keep_norms && elements == 0) ? blocks - 1 : blocks;
}

// --- plan
// -----------------------------------------------------------------------------------------

// One block sorts an image. Eight warps count and scan; one places, since members of a row keep
// their order, and the others then have nothing to do.
inline constexpr int kPlanThreads = 256;

// Up to this many rows, their cursors lie in shared memory, so that the placing warp does not wait
// for global memory in every turn; above, in the output. 40 KiB are had without asking.
inline constexpr int64_t kPlanSharedRows = 10 * 1024;

// --- select
// ---------------------------------------------------------------------------------------

// One block takes an image: a thread for each value of a digit, of which float32 scores have four.
inline constexpr int kSelectThreads = 256;

}  // namespace tome::tiles
