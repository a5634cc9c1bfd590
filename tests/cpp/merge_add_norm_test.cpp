// merge_add_norm() against plain loops in double precision.

#include "merge_add_norm_oracle.h"

namespace tome_test {
namespace {

using tome::Status;

class MergeAddNormTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, MergeAddNormTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

MergeAddNormOutputs run(const MergeAddNormInputs& inputs, const Threads& threads) {
    MergeAddNormOutputs got = inputs.outputs();
    EXPECT_TRUE(tome::merge_add_norm(inputs.params(got), threads));
    return got;
}

TEST_P(MergeAddNormTest, AgreesWithOracle) {
    for (const MergeAddNormShape& shape : kMergeAddNormShapes) {
        for (const MergeAddNormKind& kind : kMergeAddNormKinds) {
            SCOPED_TRACE(::testing::Message()
                         << kind.name << " " << ::testing::PrintToString(shape));
            const MergeAddNormInputs inputs(GetParam(), shape, kind);
            for_each_isa([&] {
                MergeAddNormOutputs got = run(inputs, Threads::serial());
                expect_merge_add_norm(inputs.params(got));
                EXPECT_EQ(run(inputs, pool()), got);
            });
            if (HasFatalFailure()) return;
        }
    }
}

TEST_P(MergeAddNormTest, HoldsWithManyRowsPerThread) {
    const MergeAddNormInputs inputs(GetParam(), {3, 400, 350, 257}, kMergeAddNormKinds[2]);
    for_each_isa([&] {
        MergeAddNormOutputs got = run(inputs, pool());
        expect_merge_add_norm(inputs.params(got));
        EXPECT_EQ(run(inputs, Threads::serial()), got);
    });
}

TEST_P(MergeAddNormTest, RowsOfManyMembers) {
    for (const size_t i : {2, 8}) {
        const MergeAddNormKind& kind = kMergeAddNormKinds[i];
        SCOPED_TRACE(kind.name);
        const MergeAddNormInputs inputs(GetParam(), {1, 9000, 1, 67}, kind);
        for_each_isa([&] {
            MergeAddNormOutputs got = run(inputs, pool());
            expect_merge_add_norm(inputs.params(got));
        });
    }
}

TEST_P(MergeAddNormTest, AnImageDoesNotDependOnItsBatch) {
    const MergeAddNormShape shape{4, 61, 33, 70};
    const MergeAddNormInputs inputs(GetParam(), shape, kMergeAddNormKinds[5]);
    for_each_isa([&] {
        const MergeAddNormOutputs all = run(inputs, pool());
        for (int64_t b = 0; b < shape.batch; ++b) {
            MergeAddNormOutputs alone = inputs.outputs();
            tome::MergeAddNormParams p = inputs.params(alone);
            p.batch = 1;
            p.x = inputs.x.memory.at(inputs.x.pad + b * p.x_stride_batch);
            p.branch = inputs.branch.memory.at(inputs.branch.pad + b * p.branch_stride_batch);
            p.size += b * shape.tokens;
            p.members += b * shape.tokens;
            p.offsets += b * (shape.rows + 1);
            ASSERT_TRUE(tome::merge_add_norm(p, Threads::serial()));
            for (int64_t i = 0; i < shape.rows * shape.channels; ++i) {
                const int64_t j = b * shape.rows * shape.channels + i;
                ASSERT_TRUE(alone.out.same(i, all.out, j));
                ASSERT_TRUE(alone.normed.same(i, all.normed, j));
            }
        }
    });
}

TEST_P(MergeAddNormTest, AveragesPaddingEvenlyAndNormsEmptyRowsToTheBias) {
    // Rows of total size 0: {0, 1} evenly, {2} as it is, {} zero.
    MergeAddNormInputs inputs(GetParam(), {1, 3, 3, 2}, kMergeAddNormKinds[1]);
    inputs.plan = plan_of({0, 0, 1}, 1, 3, 3);
    inputs.size = std::vector<float>(3, 0.0f);
    for (int64_t i = 0; i < 6; ++i) {
        inputs.x.memory.set(i, double(i));
        inputs.branch.memory.set(i, 1.0);
    }
    for_each_isa([&] {
        MergeAddNormOutputs got = run(inputs, Threads::serial());
        const double want[] = {2, 3, 5, 6, 0, 0};
        for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(got.out[i], want[i]);
        EXPECT_EQ(got.size, std::vector<float>(3, 0.0f));
        for (int64_t c = 0; c < 2; ++c) EXPECT_TRUE(got.normed.same(4 + c, inputs.bias, c));
        expect_merge_add_norm(inputs.params(got));
    });
}

TEST_P(MergeAddNormTest, KeepsNonFiniteValuesInTheirRow) {
    const int64_t channels = 19;
    MergeAddNormInputs inputs(GetParam(), {1, 6, 3, channels}, kMergeAddNormKinds[1]);
    inputs.plan = plan_of({0, 0, 1, 1, 2, 2}, 1, 6, 3);
    inputs.size = std::vector<float>(6, 2.0f);
    inputs.x.memory.set(0 * channels + 3, kNaN);
    inputs.branch.memory.set(2 * channels + 18, kInf);
    for (const bool keep_norms : {false, true})
        for_each_isa([&] {
            inputs.kind.keep_norms = keep_norms;
            const MergeAddNormOutputs got = run(inputs, Threads::serial());
            EXPECT_TRUE(std::isnan(got.out[3]));
            EXPECT_EQ(got.out[channels + 18], kInf);
            for (int64_t i = 0; i < 3 * channels; ++i) {
                EXPECT_EQ(std::isfinite(got.out[i]), i != 3 && i != channels + 18) << i;
                EXPECT_EQ(std::isfinite(got.normed[i]), i >= 2 * channels) << i;
            }
        });
}

// Tokens that cancel out have no direction to stretch, and those too long to measure no length.
TEST_P(MergeAddNormTest, NormsThatCannotBeKeptAreLeft) {
    const int64_t channels = 24;
    MergeAddNormInputs inputs(GetParam(), {1, 4, 2, channels}, kMergeAddNormKinds[0]);
    inputs.kind.keep_norms = true;
    inputs.plan = plan_of({0, 0, 1, 1}, 1, 4, 2);
    const auto fill = [&](const auto& value) {
        for (int64_t i = 0; i < 4 * channels; ++i) {
            inputs.x.memory.set(i, value(i));
            inputs.branch.memory.set(i, 0.0);
        }
    };
    for_each_isa([&] {
        fill([&](int64_t i) { return i < channels ? 2.0 : i < 2 * channels ? -2.0 : 3.0; });
        MergeAddNormOutputs got = run(inputs, Threads::serial());
        for (int64_t c = 0; c < channels; ++c) {
            EXPECT_EQ(got.out[c], 0.0);
            EXPECT_NEAR(got.out[channels + c], 3.0, 1e-5);
        }
        if (GetParam() == DType::kFloat16) return;  // whose squares do not overflow
        const double huge = GetParam() == DType::kFloat64 ? std::ldexp(1.0, 600) : 0x1p100;
        fill([&](int64_t i) { return i % 2 ? huge : -huge; });
        got = run(inputs, Threads::serial());
        for (int64_t i = 0; i < 2 * channels; ++i) EXPECT_EQ(std::fabs(got.out[i]), huge);
    });
}

TEST_P(MergeAddNormTest, RefusesABadPlanAndWritesNothing) {
    for (const bool bad_member : {true, false}) {
        MergeAddNormInputs inputs(GetParam(), {2, 5, 3, 4}, kMergeAddNormKinds[1]);
        if (bad_member) {
            inputs.plan.members[7] = 5;
        } else {
            inputs.plan.offsets[7] = 6;
        }
        for (const Threads& threads : {Threads::serial(), pool()}) {
            MergeAddNormOutputs got = inputs.outputs();
            const Status status = tome::merge_add_norm(inputs.params(got), threads);
            EXPECT_EQ(status.code,
                      bad_member ? Status::kMemberOutOfRange : Status::kOffsetsNotOrdered);
            EXPECT_TRUE(got.out.untouched());
            EXPECT_TRUE(got.normed.untouched());
            EXPECT_EQ(got.size, inputs.outputs().size);
        }
    }
}

}  // namespace
}  // namespace tome_test
