// How match is cut into blocks and tiles: pure functions, covered by C++ tests, with the reasons.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tome::match_tiles {

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// --- the kernel on tensor cores ----------------------------------------------------------------

// 8 warps: enough loads in flight while rows are staged, and two blocks still fit the registers of
// a multiprocessor at 128 each.
constexpr int kThreads = 256;

// Lanes that stage one token. 8 x 16 bytes are a whole line of 128 for 16-bit keys, and the heads
// of a packed qkv are mostly 64 channels, one such line.
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerWarp = 32 / kLanesPerRow;

// The step of rows in a tile: the m of mma.m16n8k16, and twice its n.
constexpr int kRowStep = 16;

// Rows past this bring little (the keys of 128 x 128 scores are read once for 128 scores each) and
// take shared memory from the second block of the multiprocessor.
constexpr int kMostRows = 128;

// Below this a tile reads its keys too often for its scores; then one block per multiprocessor with
// larger tiles is better than two.
constexpr int kGoodRows = 64;

// A record is 4 channels, 16 bytes. A row takes an odd number of 64-byte steps (one step is k = 16
// of mma), so that the 8 lanes of a quarter-warp, 4 records each from two rows, hit 32 banks.
constexpr int64_t row_records(int64_t dim) {
    const int64_t steps = ceil_div(dim, 16);
    return 4 * (steps + 1 - steps % 2);
}

// Where things lie in shared memory, in bytes from its start:
//   rows of A | rows of B | best of A's rows, one array per 16 columns | usable A | usable B
struct Layout {
    int64_t rows_b, best, usable, total;
};

constexpr Layout layout(int64_t dim, int64_t rows_a, int64_t rows_b) {
    const int64_t row_bytes = row_records(dim) * 16;
    const int64_t b = rows_a * row_bytes;
    const int64_t best = b + rows_b * row_bytes;
    const int64_t usable = best + rows_b / kRowStep * rows_a * 8;
    return {b, best, usable, usable + rows_a + rows_b};
}

// What the finishing block needs at least: 512 keys to rank, and the sums of a scan.
constexpr int64_t kCountingRank =
    512;  // up to this many A tokens, counting beats four radix passes
constexpr int64_t kFinishBytes = kCountingRank * 8 + 256;

struct Device {
    int multiprocessors;
    int64_t shared_per_block;  // the most a block may ask for

    // Every chip has 1 KiB more than that per multiprocessor, and takes 1 KiB of it per block.
    constexpr int64_t shared_for_two() const { return (shared_per_block + 1024) / 2 - 1024; }
};

struct Tiles {
    bool use_tensor_cores;  // else: the plain kernel
    int rows_a, rows_b;     // a block owns rows_a of A, and passes over B rows_b at a time
    int64_t blocks_a;       // blocks along A
    int64_t splits_b;       // blocks along B: the tiles of B are dealt out evenly
    int64_t shared_bytes;

    constexpr int64_t blocks_per_image() const { return blocks_a * splits_b; }
    constexpr bool operator==(const Tiles&) const = default;
};

// Halves the larger side until the tile fits.
constexpr void shrink_to_fit(int64_t dim, int64_t budget, int& rows_a, int& rows_b) {
    while (layout(dim, rows_a, rows_b).total > budget && (rows_a > kRowStep || rows_b > kRowStep)) {
        int& larger = rows_b >= rows_a ? rows_b : rows_a;
        larger = static_cast<int>(round_up(larger / 2, kRowStep));
    }
}

// The plain kernel: 16 x 16 pairs, one per thread; see match_plain.cu.
constexpr int kPlainRows = 16;
constexpr int kPlainDepth = 32;  // channels per step
constexpr int64_t plain_shared_bytes(int64_t element_bytes) {
    // The pad of one element keeps the 16 rows that a warp reads at once in different banks.
    const int64_t bytes = 2 * kPlainRows * (kPlainDepth + 1 + 2) * element_bytes + 2 * kPlainRows;
    return bytes > kFinishBytes ? bytes : kFinishBytes;
}

constexpr Tiles plain(int64_t num_a, int64_t element_bytes) {
    return {false,      kPlainRows,
            kPlainRows, ceil_div(num_a, kPlainRows),
            1,          plain_shared_bytes(element_bytes)};
}

constexpr Tiles choose(int64_t batch, int64_t num_a, int64_t num_b, int64_t dim, bool is_double,
                       const Device& device) {
    // Tensor cores give no double; and a row of very many channels would leave no room for a tile.
    if (is_double) return plain(num_a, 8);
    if (layout(dim, kRowStep, kRowStep).total > device.shared_per_block) return plain(num_a, 4);

    // Even parts: 288 tokens are three times 96, not 128, 128 and 32.
    const auto most = [](int64_t rows) {
        const int64_t parts = ceil_div(rows, kMostRows);
        return static_cast<int>(round_up(ceil_div(rows, parts), kRowStep));
    };
    int rows_a = most(num_a), rows_b = most(num_b);
    // Two blocks per multiprocessor: one computes while the other waits for its keys.
    shrink_to_fit(dim, device.shared_for_two(), rows_a, rows_b);
    const auto good = [](int rows, int64_t all) { return rows >= kGoodRows || rows >= all; };
    if (!good(rows_a, num_a) || !good(rows_b, num_b)) {
        rows_a = most(num_a), rows_b = most(num_b);
        shrink_to_fit(dim, device.shared_per_block, rows_a, rows_b);
    }

    int64_t splits = 1;
    const auto blocks = [&] { return batch * ceil_div(num_a, rows_a) * splits; };
    // Many tiles of B: deal them out until the last wave of blocks is a small part of all, but
    // leave 4 tiles to each block, so that staging its A rows stays a small part of its work.
    const int64_t wanted = 4 * int64_t{device.multiprocessors};
    const int64_t most_splits = ceil_div(num_b, rows_b) / 4;
    if (blocks() < wanted && most_splits > 1) {
        const int64_t even = ceil_div(wanted, blocks());
        splits = even < most_splits ? even : most_splits;
    }
    // Little work altogether: smaller tiles, every one a block, until each multiprocessor has one.
    while (batch > 0 && blocks() < device.multiprocessors &&
           (rows_a > kRowStep || rows_b > kRowStep)) {
        int& larger = rows_b > rows_a ? rows_b : rows_a;
        larger = static_cast<int>(round_up(larger / 2, kRowStep));
        splits = ceil_div(num_b, rows_b);
    }
    const int64_t bytes = layout(dim, rows_a, rows_b).total;
    return {true,   rows_a,
            rows_b, ceil_div(num_a, rows_a),
            splits, bytes > kFinishBytes ? bytes : kFinishBytes};
}

// --- memory ------------------------------------------------------------------------------------

// Beside the outputs: one packed best per A token and a counter per image; float64 scores leave no
// room for the column, which then has an array of its own. O(batch x tokens), whatever the sizes.
//   best (batch, num_a) uint64 | tickets (batch) uint32 | columns (batch, num_a) int32 for float64
struct Workspace {
    int64_t tickets, columns, total;
};

constexpr Workspace workspace(int64_t batch, int64_t num_a, bool is_double) {
    const int64_t tickets = batch * num_a * 8;
    const int64_t columns = tickets + batch * 4;
    return {tickets, columns, columns + (is_double ? batch * num_a * 4 : 0)};
}

}  // namespace tome::match_tiles
