// The CUDA launches' arithmetic.

#include "../../csrc/core/cuda/tiles.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace tome_test
