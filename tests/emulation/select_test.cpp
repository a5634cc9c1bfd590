// select_cuda in the emulator: against its definition, for every kind of score.

#include "emulator.h"
#include "select_oracle.h"
#include "tiles.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

Plan select_on_cuda(const ScoreRows& scores, const SelectShape& shape, bool fuse) {
    return run_select(scores, shape, fuse,
                      [](const auto& p) { EXPECT_LAUNCHED(tome::select_cuda(p, nullptr)); });
}

class CudaSelect : public ::testing::TestWithParam<SelectShape> {};

TEST_P(CudaSelect, AgreesWithItsDefinition) {
    for_each_selection(GetParam(), [&](const ScoreRows& scores, bool fuse) {
        EXPECT_EQ(select_on_cuda(scores, GetParam(), fuse),
                  select_oracle(scores, GetParam(), fuse));
    });
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaSelect, ::testing::ValuesIn(kSelectShapes));

TEST(CudaSelectOrder, OfThreadsDoesNotMatter) {
    const SelectShape shape{3, 300, 150, 1};
    for (Scores kind : {Scores::kDistinct, Scores::kTied}) {
        const ScoreRows scores(DType::kFloat32, shape, kind, 0, 5);
        const Plan want = select_oracle(scores, shape, true);
        for (uint32_t seed : {1u, 2u, 3u}) {
            const tome_emulation::UseOptions use({.seed = seed});
            EXPECT_EQ(select_on_cuda(scores, shape, true), want);
        }
    }
}

TEST(CudaSelectGrid, MoreImagesThanAGridTakes) {
    const SelectShape shape{tome::tiles::kMaxImages + 3, 2, 1, 0};
    const ScoreRows scores(DType::kFloat32, shape, Scores::kDistinct, 0, 7);
    EXPECT_EQ(select_on_cuda(scores, shape, true), select_oracle(scores, shape, true));
}

}  // namespace
}  // namespace tome_test
