// The CUDA launches' arithmetic.

#include "../../csrc/core/cuda/tiles.h"

#include <gtest/gtest.h>

#include <iterator>

#include "../../csrc/core/cuda/attention_tiles.h"

namespace tome_test {
namespace {

namespace tiles = tome::tiles;

TEST(Tiles, ChunksCoverARow) {
    EXPECT_EQ(tiles::chunks_per_row(0, 8), 0);
    EXPECT_EQ(tiles::chunks_per_row(1, 8), 1);
    EXPECT_EQ(tiles::chunks_per_row(1024, 8), 1) << "ViT-L in 16 bits is one chunk";
    EXPECT_EQ(tiles::chunks_per_row(1025, 8), 2);
    EXPECT_EQ(tiles::chunks_per_row(129, 1), 2);
}

TEST(Tiles, VectorsNeedEveryAddressAligned) {
    EXPECT_TRUE(tiles::vectors_fit(256, 512, 1600, 160, 160));
    EXPECT_TRUE(tiles::vectors_fit(256, 512, -1600, 0, 160)) << "any multiple, either way";
    EXPECT_FALSE(tiles::vectors_fit(258, 512, 1600, 160, 160));
    EXPECT_FALSE(tiles::vectors_fit(256, 520, 1600, 160, 160));
    EXPECT_FALSE(tiles::vectors_fit(256, 512, 1602, 160, 160));
    EXPECT_FALSE(tiles::vectors_fit(256, 512, 1600, 162, 160));
    EXPECT_FALSE(tiles::vectors_fit(256, 512, 1600, 160, 74));
}

TEST(Tiles, BlocksCoverTheItemsUpToALimit) {
    EXPECT_EQ(tiles::blocks_for(1), 1u);
    EXPECT_EQ(tiles::blocks_for(184), 46u);
    EXPECT_EQ(tiles::blocks_for(185), 47u);
    EXPECT_EQ(tiles::blocks_for(int64_t{1} << 40), 1u << 20);
}

TEST(Tiles, MergeTakesRowsInPairsWhereTheyAreManyAndShort) {
    EXPECT_TRUE(tiles::pairs_serve(256 * 184, 2 * 768, 132));
    EXPECT_FALSE(tiles::pairs_serve(64 * 554, 2 * 1024, 132)) << "a full chunk";
    EXPECT_FALSE(tiles::pairs_serve(8 * 184, 2 * 768, 132)) << "all rows have a place at once";
    EXPECT_EQ(tiles::chunks_per_row(768, 8), 1) << "a pair's rows are one chunk each";
}

// --- attention ---------------------------------------------------------------------------------

namespace attention = tome::attention_tiles;

TEST(AttentionTiles, HeadsArePaddedToTheNextDimThereIsAKernelFor) {
    EXPECT_EQ(attention::padded_dim(0), 32);
    EXPECT_EQ(attention::padded_dim(64), 64);
    EXPECT_EQ(attention::padded_dim(65), 80);
    EXPECT_EQ(attention::padded_dim(72), 80);
    EXPECT_EQ(attention::padded_dim(88), 96);
    EXPECT_EQ(attention::padded_dim(128), 128);
    EXPECT_EQ(attention::padded_dim(129), 0);
    for (int padded : attention::kDims) {
        EXPECT_EQ(attention::pitch(padded) * 2 / 16 % 2, 1) << "rows in different banks";
    }
}

TEST(AttentionTiles, FitTheMachines) {
    constexpr int64_t kTuring = 64 * 1024, kAmpere = 163 * 1024, kAda = 99 * 1024;
    for (int padded : attention::kDims) {
        const int64_t bytes = attention::shared_bytes(padded);
        EXPECT_LE(bytes, kTuring) << padded;
        EXPECT_LE(bytes, kAda) << padded;
        EXPECT_LE(attention::resident_blocks(padded) * (bytes + 1024), kAmpere + 1024) << padded;
        EXPECT_EQ(attention::tile_keys(padded) % attention::step_keys(padded), 0);
    }
    for (int64_t dim : {0, 1, 32, 33, 64, 80, 128}) {
        const int padded = attention::plain_padded_dim(dim);
        EXPECT_GE(padded, dim);
        EXPECT_EQ(padded % 32, 0);
        EXPECT_LE(attention::plain_shared_bytes(padded), kTuring);
    }
}

TEST(AttentionTiles, ResideAsTheDocumentationSays) {
    // Blocks for which a multiprocessor of 100 KiB (8.6, 8.9, 12.x), 164 (8.0), 228 (9.0, 10.x) has
    // shared memory. A block takes 1 KiB more than it asks for.
    const auto resident = [](int64_t kib, int64_t bytes) { return kib * 1024 / (bytes + 1024); };
    const auto forward = [&](int64_t kib, int padded) {
        return resident(kib, attention::shared_bytes(padded));
    };
    const auto backward = [&](int64_t kib, int padded, bool of_keys) {
        return resident(
            kib, attention::backward_shared_bytes(attention::kBackwardWarps, padded, 2, of_keys));
    };
    constexpr int64_t kForward[] = {4, 2, 2, 1, 2};
    constexpr int64_t kQueries[] = {4, 2, 2, 3, 2}, kKeys[] = {4, 2, 2, 3, 1};
    for (size_t i = 0; i < std::size(attention::kDims); ++i) {
        const int padded = attention::kDims[i];
        SCOPED_TRACE(padded);
        EXPECT_EQ(forward(100, padded), kForward[i]);
        EXPECT_EQ(backward(100, padded, false), kQueries[i]);
        EXPECT_EQ(backward(100, padded, true), kKeys[i]);
        for (int64_t kib : {164, 228}) {
            EXPECT_GE(forward(kib, padded), attention::resident_blocks(padded));
            for (bool of_keys : {false, true}) {
                EXPECT_GE(backward(kib, padded, of_keys),
                          attention::backward_blocks(padded, 2, of_keys));
            }
        }
    }
}

// The emulator does not know __launch_bounds__; a GPU refuses a block of more threads.
TEST(AttentionTiles, BlocksKeepToTheThreadsTheirKernelsAreCompiledFor) {
    for (int64_t heads : {1, 12, 3072}) {
        for (int64_t rows : {1, 16, 50, 80, 150, 197, 577, 2000, 100000}) {
            for (int padded : attention::kDims) {
                for (int64_t bytes : {2, 4}) {
                    for (int64_t shared : {64, 99, 163, 227}) {
                        for (bool of_keys : {false, true}) {
                            const attention::BackwardCut cut = attention::cut_backward(
                                heads, rows, padded, bytes, of_keys, 132, shared * 1024);
                            EXPECT_GE(cut.warps, 1);
                            EXPECT_LE(cut.warps, attention::kBackwardWarps);
                        }
                    }
                }
            }
        }
    }
}

TEST(AttentionTiles, OfHopperCoverTheQueriesAndFitTheMultiprocessor) {
    constexpr int64_t kMultiprocessor = 228 * 1024, kBlock = 227 * 1024;
    for (int64_t heads : {1, 12, 96, 3072}) {
        for (int64_t keys : {1, 16, 50, 80, 150, 197, 208, 256, 257, 577, 4096}) {
            const int64_t bytes = attention::hopper_shared_bytes(keys);
            for (int64_t queries : {int64_t{1}, int64_t{64}, int64_t{65}, keys}) {
                const attention::HopperCut cut = attention::cut_hopper(heads, queries, keys, 132);
                SCOPED_TRACE(::testing::Message() << heads << " " << queries << " " << keys);
                EXPECT_GE(cut.blocks * cut.tiles_per_block * attention::kHopperRows, queries);
                EXPECT_LT((cut.blocks - 1) * cut.tiles_per_block * attention::kHopperRows, queries);
                EXPECT_EQ(cut.warpgroups, keys <= attention::kHopperResident ? 1 : 2);
                EXPECT_LE(bytes, kBlock);
                // Four warpgroups share a multiprocessor, or three from 209 keys to 256.
                const int64_t blocks = kMultiprocessor / (bytes + 1024);
                EXPECT_GE(blocks * cut.warpgroups, keys > 208 && keys <= 256 ? 3 : 4);
            }
        }
    }
    // A full batch: keys once for each head. A single image: a block for every 64 queries.
    EXPECT_EQ(attention::cut_hopper(3072, 197, 197, 132), (attention::HopperCut{1, 4, 1}));
    EXPECT_EQ(attention::cut_hopper(12, 197, 197, 132), (attention::HopperCut{1, 1, 4}));
    EXPECT_EQ(attention::cut_hopper(1024, 577, 577, 132), (attention::HopperCut{2, 2, 5}));
    for (bool of_keys : {false, true}) {
        const int groups = attention::hopper_backward_groups(of_keys);
        EXPECT_GE(kMultiprocessor / (attention::hopper_backward_shared_bytes(groups) + 1024),
                  attention::hopper_backward_blocks(of_keys));
    }
}

TEST(AttentionTiles, CoverTheQueriesEvenly) {
    for (int padded : attention::kDims) {
        const int rows = attention::rows_per_warp(padded);
        for (int64_t heads : {1, 12, 3072}) {
            for (int64_t queries : {1, 16, 50, 80, 150, 197, 577, 2000, 100000}) {
                const attention::Tiles t = attention::choose(heads, queries, padded, 132);
                SCOPED_TRACE(::testing::Message() << padded << " " << heads << " " << queries);
                EXPECT_GE(t.warps, attention::kMinWarps);
                EXPECT_LE(t.warps, attention::kMaxWarps);
                EXPECT_GE(t.query_tiles * t.warps * rows, queries);
                EXPECT_LT((t.query_tiles - 1) * t.warps * rows, queries) << "no tile is empty";
            }
        }
    }
    using attention::Tiles;
    // ViT-B, a full batch: 197 rows are 7 warps', 150 are 5, 80 are 3.
    EXPECT_EQ(attention::choose(3072, 197, 64, 132), (Tiles{4, 2}));
    EXPECT_EQ(attention::choose(3072, 150, 64, 132), (Tiles{3, 2}));
    EXPECT_EQ(attention::choose(3072, 80, 64, 132), (Tiles{3, 1}));
    EXPECT_EQ(attention::choose(1024, 577, 64, 132), (Tiles{4, 5}));
    // One image: more, smaller blocks.
    EXPECT_EQ(attention::choose(12, 197, 64, 132), (Tiles{2, 4}));
    EXPECT_EQ(attention::choose(12, 0, 64, 132).query_tiles, 0);
}

TEST(AttentionTiles, VectorsNeedEveryAddressAligned) {
    EXPECT_TRUE(attention::vectors_fit(256, 9216, 64, 2304, 64, 2));
    EXPECT_TRUE(attention::vectors_fit(256, 0, 72, 2304, 72, 2)) << "an expanded batch";
    EXPECT_FALSE(attention::vectors_fit(258, 9216, 64, 2304, 64, 2));
    EXPECT_FALSE(attention::vectors_fit(256, 9216, 64, 2308, 64, 2));
    EXPECT_FALSE(attention::vectors_fit(256, 9216, 68, 2304, 64, 2));
    EXPECT_FALSE(attention::vectors_fit(256, 9216, 64, 2304, 60, 2));
    EXPECT_TRUE(attention::vectors_fit(256, 9216, 60, 2304, 60, 4));
    EXPECT_FALSE(attention::vectors_fit(256, 0, 0, 0, 0, 2)) << "nothing to address";
}

}  // namespace
}  // namespace tome_test
