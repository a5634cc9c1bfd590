// select(): against its definition, for every kind of score.

#include "select_oracle.h"

namespace tome_test {
namespace {

class Select : public ::testing::TestWithParam<SelectShape> {};

TEST_P(Select, AgreesWithItsDefinition) {
    for_each_selection(GetParam(), [&](const ScoreRows& scores, bool fuse) {
        const Plan want = select_oracle(scores, GetParam(), fuse);
        for (const Threads& threads : {Threads::serial(), pool()}) {
            EXPECT_EQ(run_select(scores, GetParam(), fuse,
                                 [&](const auto& p) { tome::select(p, threads); }),
                      want);
        }
    });
}

INSTANTIATE_TEST_SUITE_P(Shapes, Select, ::testing::ValuesIn(kSelectShapes));

TEST(SelectThreads, SplitsManyImagesAmongThreads) {
    const SelectShape shape{200, 60, 20, 1};
    const ScoreRows scores(DType::kFloat32, shape, Scores::kDistinct, 0, 1);
    EXPECT_EQ(run_select(scores, shape, true, [&](const auto& p) { tome::select(p, pool()); }),
              select_oracle(scores, shape, true));
}

}  // namespace
}  // namespace tome_test
