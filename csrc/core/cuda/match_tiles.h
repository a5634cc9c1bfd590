// How match is cut into blocks and tiles: pure functions, covered by C++ tests, with the reasons.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tome::match_tiles {

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// --- the kernels on tensor cores ---------------------------------------------------------------

// 8 warps: enough loads in flight while rows are staged, and two blocks still fit the registers of
// a multiprocessor at 128 each.
constexpr int kThreads = 256;

// Rows are staged and multiplied in groups of 16: the m of mma.m16n8k16, and twice its n.
constexpr int kRowStep = 16;

// Lanes that stage one token. 8 x 16 bytes are a whole line of 128 for 16-bit keys, and the heads
// of a packed qkv are mostly 64 channels, one such line. A warp stages four rows of a group, and a
// block of the staging kernel one group: blocks so small that a single image (N = 197) gives 14,
// and that no place on a multiprocessor waits long for a block's slowest load.
constexpr int kLanesPerRow = 8;
constexpr int kStageThreads = kRowStep * kLanesPerRow;

// Vectors of 16 bytes that a lane loads before it adds up the first. All of ViT-B's 12 heads: one
// latency of memory, not three. 48 registers, which neither kernel misses.
constexpr int kVectorsInFlight = 12;

// A lane stages 8 channels a turn; up to this many channels one turn does, and the row stays in
// registers.
constexpr int64_t kShortDim = kLanesPerRow * 8;

// Rows past this bring little (the keys of 128 x 128 scores are read once for 128 scores each) and
// take shared memory from the second block of the multiprocessor.
constexpr int kMostRows = 128;

// With fewer rows a block passes over B too often for its scores, with fewer columns its warps have
// too little to do between barriers; then one block per multiprocessor with larger tiles is better
// than two.
constexpr int kGoodRows = 64, kGoodColumns = 32;

// From this many A tokens on, keys of one head are staged as well: one kernel would read each key,
// and split it, once for every 128 A tokens. Measured on an H100 with 2048 and 8192 A tokens, where
// it takes half the time; below 1024 the blocks that repeat it are few.
constexpr int64_t kManyRows = 1024;

// Units of 16 x 32 scores that a warp works through one after another, above which it is worth the
// wait for one another to divide an image of up to 128 x 128 among blocks of kFewRows.
constexpr int64_t kUnitsInTurn = 2;
constexpr int kFewRows = 32;

// A record is 4 channels of a token, split: 16 bytes. A step is k = 16 of mma.
constexpr int64_t steps_of(int64_t dim) { return ceil_div(dim, 16); }
constexpr int64_t group_records(int64_t dim) { return steps_of(dim) * 4 * kRowStep; }

// Where things lie in shared memory, in bytes from its start:
//   rows of A | rows of B, once per buffer | best of A's rows, one array per 16 columns
struct Layout {
    int64_t rows_b, best, total;
};

constexpr Layout layout(int64_t dim, int64_t rows_a, int64_t rows_b, int64_t buffers) {
    const int64_t row_bytes = steps_of(dim) * 64;
    const int64_t b = rows_a * row_bytes;
    const int64_t best = b + buffers * rows_b * row_bytes;
    return {b, best, best + rows_b / kRowStep * rows_a * 8};
}

// What the finishing block needs at least, up to kCountingRank A tokens: a score, a column and a
// place in the list of merged tokens for each, a bit for each, and the sums of a scan. Up to so
// many, counting beats four radix passes and a serial placing of members.
constexpr int64_t kCountingRank = 512;
constexpr int64_t kFinishBytes = kCountingRank * 12 + 256;

struct Device {
    int multiprocessors;
    int64_t shared_per_block;  // the most a block may ask for

    // Every chip has 1 KiB more than that per multiprocessor, and takes 1 KiB of it per block.
    constexpr int64_t shared_for_two() const { return (shared_per_block + 1024) / 2 - 1024; }
};

// The four ways to a plan; see match.cu and choose().
enum class Form {
    kPlain,   // without tensor cores
    kSingle,  // one kernel for one head, of which nothing is staged
    kDirect,  // one kernel, whose blocks stage the rows they need in shared memory
    kStaged,  // one kernel stages rows in the workspace, a second one scores them
};

struct Tiles {
    Form form;
    int rows_a, rows_b;  // a block owns rows_a of A, and passes over B rows_b at a time
    int buffers;         // of rows_b: with two, one is filled while the other is scored. Of parts
                         // of a tile for Form::kSingle
    int64_t blocks_a;    // blocks along A
    int64_t splits_b;    // blocks along B: the tiles of B are dealt out evenly
    int64_t shared_bytes;

    constexpr int64_t blocks_per_image() const { return blocks_a * splits_b; }
    constexpr bool operator==(const Tiles&) const = default;
};

// A second buffer of B's rows, unless they are all in the first.
constexpr int buffers_for(int64_t num_b, int rows_b) { return num_b > rows_b ? 2 : 1; }

// Halves the larger part until the tile fits.
constexpr void shrink_to_fit(int64_t dim, int64_t budget, int64_t num_b, int& rows_a, int& rows_b) {
    const auto buffers = [&] { return buffers_for(num_b, rows_b); };
    while (layout(dim, rows_a, rows_b, buffers()).total > budget &&
           (rows_a > kRowStep || rows_b > kRowStep)) {
        int& larger = rows_b * buffers() >= rows_a && rows_b > kRowStep ? rows_b : rows_a;
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
    const int64_t blocks = ceil_div(num_a, kPlainRows);
    return {Form::kPlain, kPlainRows, kPlainRows, 1, blocks, 1, plain_shared_bytes(element_bytes)};
}

constexpr int64_t enough(int64_t bytes) { return bytes > kFinishBytes ? bytes : kFinishBytes; }

// Even parts of at most kMostRows: 288 tokens are three times 96, not 128, 128 and 32.
constexpr int even_part(int64_t rows, int64_t parts) {
    return static_cast<int>(round_up(ceil_div(rows, parts), kRowStep));
}
constexpr int most_rows(int64_t rows) { return even_part(rows, ceil_div(rows, kMostRows)); }

// The largest tile of which two blocks fit a multiprocessor, one to compute while the other waits;
// or where that would be small, of which one does.
constexpr void fit(int64_t dim, const Device& device, int64_t num_b, int64_t good_columns,
                   int& rows_a, int& rows_b) {
    int a = rows_a, b = rows_b;
    shrink_to_fit(dim, device.shared_for_two(), num_b, a, b);
    const bool good = (a >= kGoodRows || a == rows_a) && (b >= good_columns || b == rows_b);
    if (good) {
        rows_a = a, rows_b = b;
    } else {
        shrink_to_fit(dim, device.shared_per_block, num_b, rows_a, rows_b);
    }
}

constexpr Tiles direct(int64_t batch, int64_t num_a, int64_t num_b, int64_t dim,
                       const Device& device) {
    int rows_a = most_rows(num_a), rows_b = most_rows(num_b);
    fit(dim, device, 0, kGoodRows, rows_a, rows_b);  // 0: one buffer
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
    const int64_t bytes = enough(layout(dim, rows_a, rows_b, 1).total);
    return {Form::kDirect, rows_a, rows_b, 1, ceil_div(num_a, rows_a), splits, bytes};
}

// Into how many shares tiles of B are dealt out, so that every multiprocessor has its blocks: as
// many as there are places, and tiles, for.
constexpr int64_t dealt_out(int64_t tiles_b, int64_t places) {
    return places < 1 ? 1 : places < tiles_b ? places : tiles_b;
}

constexpr Tiles staged(int64_t batch, int64_t num_a, int64_t num_b, int64_t dim,
                       const Device& device) {
    // Two blocks per multiprocessor.
    const int64_t wanted = 2 * int64_t{device.multiprocessors}, images = batch > 0 ? batch : 1;
    int rows_b = most_rows(num_b), rows_a = most_rows(num_a);
    // Blocks of an image have to meet, which takes about as long as most scores of an image of up
    // to 128 x 128: there one block does it all, unless it would be long at it while others have
    // nothing to do (N = 197, one image, on an H100: 8.0 us in four blocks, 8.8 us in one).
    if (num_a <= kMostRows) {
        const int64_t units = ceil_div(num_a, kRowStep) * ceil_div(num_b, 2 * kRowStep);
        const bool is_long = units > kUnitsInTurn * (kThreads / 32);
        if (is_long && images * ceil_div(num_a, kFewRows) <= device.multiprocessors) {
            rows_a = kFewRows;
        }
    } else {
        const int divided = even_part(num_a, images < wanted ? wanted / images : 1);
        const int least = divided < kGoodRows ? kGoodRows : divided;
        rows_a = least < rows_a ? least : rows_a;
    }
    fit(dim, device, num_b, kGoodColumns, rows_a, rows_b);
    const bool two = layout(dim, rows_a, rows_b, 2).total <= device.shared_per_block;
    const int buffers = two ? buffers_for(num_b, rows_b) : 1;
    const int64_t blocks_a = ceil_div(num_a, rows_a);
    const int64_t splits = dealt_out(ceil_div(num_b, rows_b), wanted / (blocks_a * images));
    const int64_t bytes = enough(layout(dim, rows_a, rows_b, buffers).total);
    return {Form::kStaged, rows_a, rows_b, buffers, blocks_a, splits, bytes};
}

// --- one head ------------------------------------------------------------------------------------

// Tiles of kLargeRows or kSmallRows of each set pass over the channels in parts of 128 bytes a row,
// of which some are in shared memory at a time. Large ones read a row from L2 for every 128 others;
// small ones are there for as many blocks as multiprocessors.
constexpr int kSingleRowBytes = 128;
constexpr int kLargeRows = 128, kLargeParts = 3;
constexpr int kSmallRows = 64, kSmallParts = 5;

// Shared memory, in bytes from its start:
//   parts (of A's rows | of B's) | best of A's rows, by each of four columns of warps and of all |
//   token, 1 / length and scale of every row
struct SingleLayout {
    int64_t best, tokens, inverse, scale, total;
};
constexpr SingleLayout single_layout(int rows, int parts) {
    const int64_t best = int64_t{parts} * 2 * rows * kSingleRowBytes;
    const int64_t tokens = best + int64_t{5} * rows * 8;
    const int64_t each = int64_t{2} * rows * 4;
    return {best, tokens, tokens + each, tokens + 2 * each, tokens + 3 * each};
}

constexpr Tiles single(int64_t batch, int64_t num_a, int64_t num_b, const Device& device) {
    const int64_t blocks = batch * ceil_div(num_a, kLargeRows) * ceil_div(num_b, kLargeRows);
    const bool large = (num_a > kSmallRows || num_b > kSmallRows) &&
                       blocks >= device.multiprocessors &&
                       single_layout(kLargeRows, kLargeParts).total <= device.shared_per_block;
    const int most = large ? kLargeRows : kSmallRows, parts = large ? kLargeParts : kSmallParts;
    const int rows_a = even_part(num_a, ceil_div(num_a, most));
    const int rows_b = even_part(num_b, ceil_div(num_b, most));
    // Two blocks per multiprocessor.
    const int64_t wanted = 2 * int64_t{device.multiprocessors}, images = batch > 0 ? batch : 1;
    const int64_t blocks_a = ceil_div(num_a, rows_a);
    const int64_t splits = dealt_out(ceil_div(num_b, rows_b), wanted / (blocks_a * images));
    const int64_t bytes = enough(single_layout(most, parts).total);
    return {Form::kSingle, rows_a, rows_b, parts, blocks_a, splits, bytes};
}

// num_a and num_b are 1 or more; `listed`: the sets are, see MatchArgs.
constexpr Tiles choose(int64_t batch, int64_t heads, int64_t num_a, int64_t num_b, int64_t dim,
                       int64_t element_bytes, const Device& device, bool listed = false) {
    // Tensor cores give no double; and a row of very many channels would leave no room for a tile.
    if (element_bytes == 8) return plain(num_a, 8);
    // Nothing to sum, so nothing to gain by staging rows.
    if (heads == 1 && single_layout(kSmallRows, kSmallParts).total <= device.shared_per_block) {
        return single(batch, num_a, num_b, device);
    }
    if (layout(dim, kRowStep, kRowStep, 1).total > device.shared_per_block) return plain(num_a, 4);

    // One of the two forms is enough for listed sets: each is a dozen kernels.
    if (listed) return staged(batch, num_a, num_b, dim, device);

    // Staged rows take 4 bytes a channel: at most half of what the keys do in all heads. Of fewer
    // heads the keys themselves are as quickly read again, unless very often, and take no further
    // memory.
    if (heads * element_bytes < 8 && num_a < kManyRows) {
        return direct(batch, num_a, num_b, dim, device);
    }
    // An image per multiprocessor, each in one tile: nothing would be read twice, and rows need no
    // way through L2.
    if (batch >= device.multiprocessors && num_a <= kMostRows && num_b <= kMostRows) {
        const Tiles whole = direct(batch, num_a, num_b, dim, device);
        if (whole.blocks_per_image() == 1 && whole.shared_bytes <= device.shared_for_two()) {
            return whole;
        }
    }
    return staged(batch, num_a, num_b, dim, device);
}

// --- memory ------------------------------------------------------------------------------------

// Beside the outputs: staged rows, 4 bytes a channel; one packed best per A token and a counter per
// image. float64 scores leave no room for the column, which then has an array of its own.
//   rows (batch, groups, group_records) of 16 bytes | best (batch, num_a) uint64 |
//   tickets (batch) uint32 | columns (batch, num_a) int32 for float64
struct Workspace {
    int64_t best, tickets, columns, total;
};

constexpr int64_t groups_of(int64_t rows) { return ceil_div(rows, kRowStep); }

constexpr Workspace workspace(Form form, int64_t batch, int64_t num_a, int64_t num_b, int64_t dim,
                              bool is_double) {
    const int64_t groups = form == Form::kStaged ? groups_of(num_a) + groups_of(num_b) : 0;
    const int64_t best = batch * groups * group_records(dim) * 16;
    const int64_t tickets = best + batch * num_a * 8;
    const int64_t columns = tickets + batch * 4;
    return {best, tickets, columns, columns + (is_double ? batch * num_a * 4 : 0)};
}

}  // namespace tome::match_tiles
