// plan(): grouping tokens by output row, and refusing what points outside.

#include "helpers.h"

namespace tome_test {
namespace {

struct Result {
    tome::Status status;
    std::vector<int32_t> members, offsets;
};

constexpr int32_t kPoison = 0x5a5a5a5a;

Result run_plan(const std::vector<int32_t>& assign, int64_t batch, int64_t tokens, int64_t rows,
                const Threads& threads) {
    Result out;
    out.members.assign(static_cast<size_t>(batch * tokens), kPoison);
    out.offsets.assign(static_cast<size_t>(batch * (rows + 1)), kPoison);
    out.status = tome::plan(
        {assign.data(), batch, tokens, rows, out.members.data(), out.offsets.data()}, threads);
    return out;
}

TEST(Plan, AgreesWithPlainLoops) {
    const int64_t shapes[][3] = {{1, 1, 1},  {2, 7, 3},   {3, 50, 49},
                                 {4, 5, 40}, {1, 200, 1}, {40, 300, 200}};
    for (const auto& [batch, tokens, rows] : shapes) {
        const Plan want = random_plan(batch, tokens, rows, 1);
        for (const Threads& threads : {Threads::serial(), pool()}) {
            const Result got = run_plan(want.assign, batch, tokens, rows, threads);
            EXPECT_TRUE(got.status);
            EXPECT_EQ(got.members, want.members);
            EXPECT_EQ(got.offsets, want.offsets);
        }
    }
}

TEST(Plan, TakesEmptyShapes) {
    EXPECT_TRUE(run_plan({}, 0, 5, 3, pool()).status);
    const Result no_tokens = run_plan({}, 2, 0, 3, pool());
    EXPECT_TRUE(no_tokens.status);
    EXPECT_EQ(no_tokens.offsets, std::vector<int32_t>(8, 0));
    const Result no_rows = run_plan({-1, -1, -1}, 1, 3, 0, pool());
    EXPECT_TRUE(no_rows.status);
    EXPECT_EQ(no_rows.members, (std::vector<int32_t>{0, 1, 2}));
    EXPECT_EQ(no_rows.offsets, std::vector<int32_t>{0});
}

TEST(Plan, RefusesRowsOutsideTheOutput) {
    for (int32_t bad :
         {3, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
        std::vector<int32_t> assign = {0, 1, 2, -1, 2, 1};
        assign[4] = bad;
        assign[5] = bad;
        for (const Threads& threads : {Threads::serial(), pool()}) {
            const Result got = run_plan(assign, 2, 3, 3, threads);
            EXPECT_EQ(got.status.code, tome::Status::kAssignOutOfRange);
            EXPECT_EQ(got.status.batch, 1);
            EXPECT_EQ(got.status.index, 1);
            EXPECT_EQ(got.status.value, bad);
            EXPECT_EQ(got.members, std::vector<int32_t>(6, kPoison)) << "wrote before refusing";
            EXPECT_EQ(got.offsets, std::vector<int32_t>(8, kPoison)) << "wrote before refusing";
        }
    }
}

}  // namespace
}  // namespace tome_test
