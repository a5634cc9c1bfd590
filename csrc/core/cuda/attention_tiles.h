// How attention is cut into blocks, warps and tiles: pure functions, covered by C++ tests, with the
// reasons.
#pragma once

#include <cstddef>
#include <cstdint>

// What kernels, too, compute their constants with.
#ifdef __CUDACC__
#define TOME_HOST_DEVICE __host__ __device__
#else
#define TOME_HOST_DEVICE
#endif

namespace tome::attention_tiles {

TOME_HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t by) {
    return (value + by - 1) / by;
}

// --- tiles of (tokens, dim) in shared memory ---------------------------------------------------

// The dims there are kernels for. A head of another dim takes the next one, its tail zeros.
inline constexpr int kDims[] = {32, 64, 80, 96, 128};

// 0 where none is large enough.
constexpr int padded_dim(int64_t dim) {
    for (int padded : kDims) {
        if (dim <= padded) return padded;
    }
    return 0;
}

// Elements (of 16 bits) from a staged row to the next: an odd number of 16-byte steps, so that the
// 8 rows that ldmatrix reads at once lie in different banks. A swizzle would save the padding, but
// works for powers of two only, and 80 and 96 are none.
TOME_HOST_DEVICE constexpr int pitch(int padded) { return padded + 8; }

// 16-byte copies serve where every row of every head begins at a multiple of 16 bytes.
constexpr bool vectors_fit(uint64_t address, int64_t stride_batch, int64_t stride_head,
                           int64_t stride_token, int64_t dim, int64_t element_bytes) {
    const auto bytes = [=](int64_t count) { return static_cast<uint64_t>(count * element_bytes); };
    const uint64_t all =
        address | bytes(stride_batch) | bytes(stride_head) | bytes(stride_token) | bytes(dim);
    return dim > 0 && all % 16 == 0;
}

// --- forward on tensor cores -------------------------------------------------------------------

// Rows of m = 16 that a warp holds one below the other. What is loaded of k and v serves all of
// them: with one, a 512-byte ldmatrix feeds two mma, which costs shared memory as many cycles as an
// A100's tensor cores take for them; with two it is half. At 128 channels two would take more than
// the 255 registers of a thread (32 x 128 outputs, and 32 x 128 of q: 192 of them).
TOME_HOST_DEVICE constexpr int row_blocks(int padded) { return padded <= 96 ? 2 : 1; }
TOME_HOST_DEVICE constexpr int rows_per_warp(int padded) { return 16 * row_blocks(padded); }

// Keys between two looks at the rows' maxima, each key a register of logits per 32 rows and lane.
// 32 keys would be a register or ten too many at 64 channels, which are to leave room for a third
// block. Where no more than 16 keys are left they are a step of their own, so N = 197 costs 208
// columns.
TOME_HOST_DEVICE constexpr int step_keys(int padded) { return padded == 64 ? 16 : 32; }

// Keys per copy from global memory, of which the next is under way while one is worked on. 64 of 64
// channels leave room for four blocks in an A100's 164 KiB; 32 of 128 for three, and one fits
// Turing's 64 KiB.
TOME_HOST_DEVICE constexpr int tile_keys(int padded) { return padded <= 96 ? 64 : 32; }

// Most warps in a block: 128 rows share the staged keys, and several blocks still fit the registers
// of a multiprocessor, so that some compute while others wait for their first keys.
inline constexpr int kMaxWarps = 4;
// A thread brings a key's size: as many threads as keys in a tile.
inline constexpr int kMinWarps = 2;

// Blocks whose registers a multiprocessor must hold. Three leave a thread 168.
TOME_HOST_DEVICE constexpr int resident_blocks(int padded) {
    return padded <= 64 || padded == 128 ? 3 : 2;
}

// Whether a thread finds its place in k and v anew for every tile, 40 instructions or so, instead
// of holding two pointers to it: at 128 channels they are four registers too many.
TOME_HOST_DEVICE constexpr bool finds_tiles_anew(int padded) { return padded == 128; }

// A stage is a tile of keys and one of values; their sizes lie behind both stages.
//   k 0 | v 0 | k 1 | v 1 | log2 sizes 0 | log2 sizes 1
// The outputs of all warps, on their way to 16-byte stores, take the place of a stage.
TOME_HOST_DEVICE constexpr int stage_elements(int padded) {
    return 2 * tile_keys(padded) * pitch(padded);
}
constexpr int64_t shared_bytes(int padded) {
    return 2 * (2 * int64_t{stage_elements(padded)} + 4 * tile_keys(padded));
}

struct Tiles {
    int warps;            // of a block, each with rows_per_warp rows
    int64_t query_tiles;  // blocks per head

    constexpr bool operator==(const Tiles&) const = default;
};

// Even tiles: of 7 warps' rows 4 and 3, not 4, and of 5 warps' 3 and 2. A warp without rows waits
// at barriers only, so what a tile has too much costs registers but no time of the tensor cores.
constexpr Tiles choose(int64_t batch_heads, int64_t queries, int padded, int multiprocessors) {
    const int64_t units = ceil_div(queries, rows_per_warp(padded));
    int64_t tiles = ceil_div(units, kMaxWarps);
    int64_t warps = tiles == 0 ? kMinWarps : ceil_div(units, tiles);
    // Little work altogether: smaller tiles, so that more multiprocessors have one. Each reads all
    // keys again, but from L2.
    while (warps > kMinWarps && batch_heads * tiles < multiprocessors) {
        --warps;
        tiles = ceil_div(units, warps);
    }
    if (warps < kMinWarps) warps = kMinWarps;
    return {static_cast<int>(warps), ceil_div(units, warps)};
}

// --- forward on Hopper's warpgroups: attention_hopper.cu -----------------------------------------

// Channels of the heads it takes: rows of 128 bytes, which its tiles are made of.
inline constexpr int kHopperDim = 64;

// A warpgroup's product has 64 rows: queries. Keys pass 64 at a time, so that logits (32
// registers), weights (16), queries (16) and outputs (32) fit the 128 registers with which four
// warpgroups share a multiprocessor; the last keys are cut to a multiple of 16.
inline constexpr int kHopperRows = 64, kHopperKeys = 64;

// Up to so many keys, all keys and values of a head lie in shared memory at once: they are read
// once, and a block of one warpgroup takes the queries in turn. Blocks are as independent as can be
// then: while one waits for its keys, three others compute. Above, two warpgroups share what passes
// through three stages, or L2 would have to bring all keys to every 64 queries.
inline constexpr int64_t kHopperResident = 256;
inline constexpr int kHopperStages = 3, kHopperStageKeys = 128;

constexpr int64_t hopper_padded_keys(int64_t keys) { return ceil_div(keys, 16) * 16; }

//   keys | values | log2 sizes; or stages of keys | values, then log2 sizes of all stages
// Logits are always made of 64 keys, also where fewer are left: what is read behind them may be
// anything, since their columns are not used, but must be there.
constexpr int64_t hopper_shared_bytes(int64_t keys) {
    const int64_t rows =
        keys <= kHopperResident ? hopper_padded_keys(keys) : kHopperStages * kHopperStageKeys;
    const int64_t bytes = rows * (2 * 128 + 4), read = kHopperKeys * 128;
    return bytes < read ? read : bytes;
}

struct HopperCut {
    int warpgroups;           // of a block
    int64_t tiles_per_block;  // of 64 queries
    int64_t blocks;           // per head

    constexpr bool operator==(const HopperCut&) const = default;
};

constexpr HopperCut cut_hopper(int64_t batch_heads, int64_t queries, int64_t keys,
                               int multiprocessors) {
    const int64_t tiles = ceil_div(queries, kHopperRows);
    if (keys > kHopperResident) return {2, 2, ceil_div(tiles, 2)};
    // Few heads: more blocks each, until there are four for every multiprocessor.
    int64_t blocks = batch_heads > 0 ? ceil_div(4 * int64_t{multiprocessors}, batch_heads) : 1;
    if (blocks > tiles) blocks = tiles;
    if (batch_heads >= 2 * int64_t{multiprocessors}) blocks = 1;
    const int64_t per_block = ceil_div(tiles, blocks);
    return {1, per_block, ceil_div(tiles, per_block)};
}

// --- backward: attention_backward.cu -----------------------------------------------------------

// Warps per block: four share what is copied per stage, and with the registers a warp needs, larger
// blocks would leave part of a multiprocessor empty.
inline constexpr int kBackwardWarps = 4;

// Rows of m = 16 (queries, or keys) that a warp holds one below the other. As in the forward, what
// is loaded of the columns serves all of them, and so do their sides. Sums, left operands and
// logits of 32 rows take 4 dim + 64 registers / 32 for keys, whose sums are two; that is what a
// thread of two blocks can have up to 64 channels, and up to 80 for queries.
TOME_HOST_DEVICE constexpr int backward_row_blocks(int padded, int64_t element_bytes,
                                                   bool of_keys) {
    return element_bytes == 2 && padded <= (of_keys ? 64 : 80) ? 2 : 1;
}
TOME_HOST_DEVICE constexpr int backward_rows(int padded, int64_t element_bytes, bool of_keys) {
    return 16 * backward_row_blocks(padded, element_bytes, of_keys);
}

// Blocks on a multiprocessor that the compiler has to leave registers for: 168 a thread, or 255.
// Keys of 32 channels would spill at 168 on some chips.
TOME_HOST_DEVICE constexpr int backward_blocks(int padded, int64_t element_bytes, bool of_keys) {
    return padded <= (element_bytes == 4 ? 64 : of_keys ? 0 : 32) ? 3 : 2;
}

// Whether a warp of keys holds its rows of both k and v in registers. At 128 channels they would
// be 64, beside 128 for the two sums, and what is left of a thread's 255 was seen to spill.
TOME_HOST_DEVICE constexpr bool backward_keeps_both(int padded, bool of_keys) {
    return !of_keys || padded < 128;
}
// Whether rows come straight from global memory into registers, with no place in shared memory.
TOME_HOST_DEVICE constexpr bool backward_from_global(int padded, int64_t element_bytes,
                                                     bool of_keys) {
    return element_bytes == 2 && backward_keeps_both(padded, of_keys);
}

// Whether a thread leaves 16 bytes of what it needs now and then in shared memory, behind the
// stages, to have a few registers more: where the two sums of keys take all that it may have.
TOME_HOST_DEVICE constexpr bool backward_parks(int padded, bool of_keys) {
    return of_keys && padded == 64;
}

// Columns (keys, or queries) in a stage, of which two are in flight: as many as leave room for two
// blocks in 100 KiB, which is what some chips have.
TOME_HOST_DEVICE constexpr int backward_stage(int padded, int64_t element_bytes) {
    return element_bytes == 2 ? padded <= 80 ? 64 : 32 : 16;
}

// A row is padded by 16 bytes, like pitch.
TOME_HOST_DEVICE constexpr int64_t backward_row_bytes(int padded, int64_t element_bytes) {
    return padded * element_bytes + 16;
}

// A stage: columns of two tensors, then 8 bytes of a column's bias and delta.
TOME_HOST_DEVICE constexpr int64_t backward_sides(int padded, int64_t element_bytes) {
    return 2 * backward_stage(padded, element_bytes) * backward_row_bytes(padded, element_bytes);
}
TOME_HOST_DEVICE constexpr int64_t backward_stage_bytes(int padded, int64_t element_bytes) {
    return backward_sides(padded, element_bytes) + 8 * backward_stage(padded, element_bytes);
}

// Two tensors' rows, unless they are in registers; then two stages, whose place a warp's results
// take on their way out if it has no rows there.
constexpr int64_t backward_shared_bytes(int warps, int padded, int64_t element_bytes,
                                        bool of_keys) {
    const int64_t rows = backward_rows(padded, element_bytes, of_keys) * warps *
                         backward_row_bytes(padded, element_bytes);
    return (backward_from_global(padded, element_bytes, of_keys) ? 0 : 2 * rows) +
           2 * backward_stage_bytes(padded, element_bytes) +
           (backward_parks(padded, of_keys) ? 16 * 32 * warps : 0);
}

struct BackwardCut {
    int warps;           // per block
    int64_t row_blocks;  // per head
    int64_t shared_bytes;
};

// `heads`: of all images.
constexpr BackwardCut cut_backward(int64_t heads, int64_t rows, int padded, int64_t element_bytes,
                                   bool of_keys, int multiprocessors, int64_t shared_per_block) {
    const auto shared = [=](int64_t warps) {
        return backward_shared_bytes(static_cast<int>(warps), padded, element_bytes, of_keys);
    };
    // A thread brings what belongs to a column.
    const int64_t fewest = ceil_div(backward_stage(padded, element_bytes), 32);
    int64_t most = kBackwardWarps;
    while (most > fewest && shared(most) > shared_per_block) --most;
    const int64_t tiles = ceil_div(rows, backward_rows(padded, element_bytes, of_keys));
    // Little work: smaller blocks, until each multiprocessor has one.
    while (most > fewest && heads * ceil_div(tiles, most) < multiprocessors) {
        most = ceil_div(most, 2);
    }
    // Even parts: 5 tiles are 3 and 2, not 4 and 1.
    const int64_t blocks = ceil_div(tiles, most);
    int64_t warps = blocks > 0 ? ceil_div(tiles, blocks) : fewest;
    if (warps < fewest) warps = fewest;
    return {static_cast<int>(warps), blocks, shared(warps)};
}

// --- backward on Hopper's warpgroups: attention_backward_hopper.cu
// --------------------------------

// Warpgroups of a block, 64 rows each, that share the columns which pass. A thread takes 128
// registers for queries, so four warpgroups share a multiprocessor, in two blocks; for keys, with
// two sums, it takes 168: three.
TOME_HOST_DEVICE constexpr int hopper_backward_groups(bool of_keys) { return of_keys ? 1 : 2; }
TOME_HOST_DEVICE constexpr int hopper_backward_blocks(bool of_keys) { return of_keys ? 3 : 2; }

//   rows of two tensors, for each warpgroup | stages of columns of two tensors | what columns bring
//   (two floats each), of all stages
TOME_HOST_DEVICE constexpr int64_t hopper_backward_shared_bytes(int groups) {
    return 2 * 64 * 128 * groups + kHopperStages * kHopperKeys * (2 * 128 + 8);
}

// --- forward without tensor cores, float32 -----------------------------------------------------

// A thread holds 4 rows, and every 16th key or pair of channels: 16 x 16 threads.
inline constexpr int kPlainThreads = 256;
inline constexpr int kPlainRows = 64;
// With these, 64 rows of 128 channels fit Turing's 64 KiB.
inline constexpr int kPlainKeys = 32;

TOME_HOST_DEVICE constexpr int plain_padded_dim(int64_t dim) {
    return dim <= 32 ? 32 : static_cast<int>(ceil_div(dim, 32) * 32);
}
// Floats from a row of weights to the next.
inline constexpr int kPlainWeights = kPlainKeys + 4;
//   q | keys, then values | weights
constexpr int64_t plain_shared_bytes(int padded) {
    return 4 *
           ((kPlainRows + kPlainKeys) * int64_t{padded + 4} + int64_t{kPlainRows} * kPlainWeights);
}

// --- cls_attention -----------------------------------------------------------------------------

// Groups of 16 keys that a warp multiplies by tensor cores: with two, each of the four lanes of a
// row ends with a key of its own, and a head of 64 channels is 8 loads of 16 bytes on their way.
inline constexpr int kClsGroups = 2;

// Small blocks, so that one image has many (12 heads of 197 keys: 21), and as many of them on a
// multiprocessor as leave a thread 80 registers: 96 KiB on their way, several times latency times
// bandwidth, since blocks that are starting or ending have no loads in flight.
inline constexpr int kClsWarps = 4, kClsBlocks = 6;

// A warp for each of up to 16 heads at once, then a thread for each key.
inline constexpr int kClsMeanThreads = 512;

}  // namespace tome::attention_tiles
