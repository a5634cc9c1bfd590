// merge_add_norm_cuda in the emulator, against plain loops in double precision.

#include "emulator.h"
#include "helpers.h"
#include "merge_add_norm_oracle.h"
#include "tiles.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

namespace tiles = tome::tiles;

const MergeAddNormKind& kind(const char* name) {
    for (const MergeAddNormKind& k : kMergeAddNormKinds) {
        if (std::string(name) == k.name) return k;
    }
    throw std::invalid_argument(name);
}

void run_and_compare(const MergeAddNormInputs& in) {
    SCOPED_TRACE(::testing::Message() << in.kind.name << " C" << in.shape.channels);
    MergeAddNormOutputs got = in.outputs();
    const tome::MergeAddNormParams p = in.params(got);
    ASSERT_LAUNCHED(tome::merge_add_norm_cuda(p, nullptr));
    expect_merge_add_norm(p);
}

class CudaMergeAddNorm : public PerDType {};

INSTANTIATE_TEST_SUITE_P(DTypes, CudaMergeAddNorm, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(CudaMergeAddNorm, AgreesWithPlainLoops) {
    for (const MergeAddNormShape& shape : kMergeAddNormShapes) {
        for (const MergeAddNormKind& k : kMergeAddNormKinds) {
            if (shape.channels > 300 && !(k.sized && k.scaled && k.biased))
                continue;  // to be quick
            run_and_compare(MergeAddNormInputs(GetParam(), shape, k));
            if (HasFatalFailure()) return;
        }
    }
}

// Every kernel: rows that fill its registers, that leave a lane idle, and that leave a vector.
TEST_P(CudaMergeAddNorm, EveryLengthOfRow) {
    for (int64_t channels : {8, 248, 256, 264, 512, 520, 768, 1000, 1024, 1032, 1280, 2048, 2056}) {
        for (const char* name : {"block", "block with LayerScale", "norms kept"}) {
            run_and_compare(MergeAddNormInputs(GetParam(), {2, 7, 5, channels}, kind(name)));
            if (HasFatalFailure()) return;
        }
    }
}

// One address off 16 bytes, whichever it is, and vectors would be misaligned.
TEST_P(CudaMergeAddNorm, AnyArrayMayBeUnaligned) {
    const MergeAddNormInputs in(GetParam(), {2, 9, 5, 64}, kind("block with LayerScale"));
    MergeAddNormOutputs want = in.outputs();
    ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(want), nullptr));
    const auto moved = [&](const Array& from) {
        Array to(GetParam(), from.count() + 1);
        for (int64_t i = 0; i < from.count(); ++i) to.set(i + 1, from[i]);
        return to;
    };
    const Array x = moved(in.x.memory), branch = moved(in.branch.memory);
    const Array scale = moved(in.scale), weight = moved(in.weight), bias = moved(in.bias);
    for (int which = 0; which < 7; ++which) {
        SCOPED_TRACE(which);
        MergeAddNormOutputs got = in.outputs();
        Array out(GetParam(), got.out.count() + 1), normed(GetParam(), got.normed.count() + 1);
        tome::MergeAddNormParams p = in.params(got);
        const int64_t element = tome::element_size(GetParam());
        if (which == 0) p.x = x.at(1);
        if (which == 1) p.branch = branch.at(1);
        if (which == 2) p.scale = scale.at(1);
        if (which == 3) p.weight = weight.at(1);
        if (which == 4) p.bias = bias.at(1);
        if (which == 5) p.out = static_cast<char*>(out.data()) + element;
        if (which == 6) p.normed = static_cast<char*>(normed.data()) + element;
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(p, nullptr));
        expect_merge_add_norm(p);
        if (HasFatalFailure()) return;
    }
}

TEST_P(CudaMergeAddNorm, ManyMembers) {
    // Rows of more members than a warp has lanes.
    for (int64_t channels : {40, 41}) {
        for (const char* name : {"strided", "norms kept, strided"}) {
            MergeAddNormInputs in(GetParam(), {1, 200, 2, channels}, kind(name));
            std::vector<int32_t> assign;
            for (int32_t n = 0; n < 200; ++n) assign.push_back(n % 7 == 0 ? 1 : 0);
            in.plan = plan_of(assign, 1, 200, 2);
            run_and_compare(in);
        }
    }
}

// Sizes that are all 0, in rows of one member and of several: a plain mean, also where a value is
// infinite, which a weight of 0 would make NaN.
TEST_P(CudaMergeAddNorm, ZeroSizesGiveTheEvenMean) {
    for (int64_t channels : {24, 25}) {
        MergeAddNormInputs in(GetParam(), {1, 7, 3, channels}, kind("block"));
        in.plan = plan_of({0, 1, 1, 2, 2, 2, -1}, 1, 7, 3);
        in.size.assign(7, 0.0f);
        run_and_compare(in);
        in.x.memory.set(1 * channels + 3, kInf);
        MergeAddNormOutputs got = in.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        EXPECT_EQ(got.out[1 * channels + 3], kInf);
    }
}

TEST_P(CudaMergeAddNorm, EmptyRowsAreTheBias) {
    for (int64_t channels : {24, 25}) {
        MergeAddNormInputs in(GetParam(), {1, 2, 3, channels}, kind("block"));
        in.plan = plan_of({0, 0}, 1, 2, 3);
        MergeAddNormOutputs got = in.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        for (int64_t i = channels; i < 3 * channels; ++i) {
            ASSERT_EQ(got.out[i], 0.0);
            ASSERT_TRUE(got.normed.same(i, in.bias, i % channels));
        }
        EXPECT_EQ(got.size[1], 0.0f);
    }
}

TEST_P(CudaMergeAddNorm, NaNAndInfinityStayInTheirRows) {
    const int64_t channels = 40;
    for (const char* name : {"block", "norms kept"}) {
        MergeAddNormInputs in(GetParam(), {1, 8, 4, channels}, kind(name));
        in.plan = plan_of({0, 0, 1, 1, 2, 2, 3, -1}, 1, 8, 4);
        in.x.memory.set(0 * channels + 3, kNaN);
        in.branch.memory.set(2 * channels + 18, kInf);
        MergeAddNormOutputs got = in.outputs();
        in.size.assign(8, 1.0f);
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        for (int64_t i = 0; i < 4 * channels; ++i) {
            EXPECT_EQ(std::isnan(got.out[i]), i == 3) << i;
            EXPECT_EQ(std::isinf(got.out[i]), i == channels + 18) << i;
            EXPECT_EQ(std::isnan(got.normed[i]), i < 2 * channels) << i;  // inf - inf
        }
    }
}

// Tokens that cancel out have no direction to stretch, and those too long to measure no length.
TEST_P(CudaMergeAddNorm, NormsThatCannotBeKeptAreLeft) {
    for (int64_t channels : {24, 25}) {
        MergeAddNormInputs in(GetParam(), {1, 4, 2, channels}, kind("norms kept"));
        in.kind.scaled = in.kind.sized = false;
        in.plan = plan_of({0, 0, 1, 1}, 1, 4, 2);
        for (int64_t i = 0; i < 4 * channels; ++i) {
            const bool last = i >= 2 * channels;
            in.x.memory.set(i, i < channels ? 2.0 : last ? 3.0 : -2.0);
            in.branch.memory.set(i, 0.0);
        }
        MergeAddNormOutputs got = in.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        for (int64_t c = 0; c < channels; ++c) {
            EXPECT_EQ(got.out[c], 0.0);
            EXPECT_NEAR(got.out[channels + c], 3.0, 1e-5);
        }
        if (GetParam() == DType::kFloat16) continue;  // whose squares do not overflow
        const double huge = GetParam() == DType::kFloat64 ? std::ldexp(1.0, 600) : 0x1p100;
        for (int64_t i = 0; i < 4 * channels; ++i) in.x.memory.set(i, i % 2 ? huge : -huge);
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        for (int64_t c = 0; c < channels; ++c) {
            EXPECT_EQ(std::fabs(got.out[channels + c]), channels % 2 ? 0.0 : huge);
        }
    }
}

TEST_P(CudaMergeAddNorm, TheOrderOfThreadsDoesNotMatter) {
    for (int64_t channels : {72, 73, 2056}) {
        const MergeAddNormInputs in(GetParam(), {2, 17, 9, channels},
                                    kind("block with LayerScale"));
        MergeAddNormOutputs first = in.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(first), nullptr));
        for (uint32_t seed : {1u, 2u, 3u}) {
            const tome_emulation::UseOptions use({.seed = seed});
            MergeAddNormOutputs again = in.outputs();
            ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(again), nullptr));
            EXPECT_EQ(again, first);
        }
    }
}

// Every thread waits for earlier kernels, of which the emulator makes sure, whatever it has to do.
TEST_P(CudaMergeAddNorm, MayBeginBeforeMatchHasEnded) {
    for (int64_t channels : {24, 25, 2056}) {
        const MergeAddNormInputs in(GetParam(), {2, 9, 5, channels}, kind("block"));
        MergeAddNormOutputs got = in.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        EXPECT_TRUE(tome_emulation::neighbours().overlapping);
        // What follows may count on all before this kernel being over when this kernel is.
        EXPECT_EQ(tome_emulation::neighbours().releasing_blocks, 0u);
    }
}

// What points outside is skipped: AddressSanitizer would see it followed.
TEST_P(CudaMergeAddNorm, NoPlanLeadsOutside) {
    const int32_t wild[] = {-1,
                            61,
                            1 << 30,
                            -(1 << 30),
                            std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
    for (int64_t channels : {40, 41}) {
        MergeAddNormInputs in(GetParam(), {2, 61, 33, channels}, kind("block with LayerScale"));
        const Plan good = in.plan;
        for (int32_t bad : wild) {
            for (size_t at : {size_t{0}, size_t{5}, size_t{33}}) {
                in.plan = good;
                in.plan.members[at] = in.plan.members[61 + at] = bad;
                in.plan.offsets[at] = in.plan.offsets[34 + at] = bad;
                MergeAddNormOutputs got = in.outputs();
                ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
            }
        }
        // A member that is skipped is as good as none.
        in.plan = good;
        for (int32_t& token : in.plan.members) {
            if (token % 5 == 0) token = 61;
        }
        std::vector<int32_t> assign = good.assign;
        for (size_t i = 0; i < assign.size(); ++i) {
            if (i % 61 % 5 == 0) assign[i] = -1;
        }
        MergeAddNormInputs fewer(GetParam(), in.shape, in.kind);
        fewer.plan = plan_of(assign, 2, 61, 33);
        MergeAddNormOutputs got = in.outputs(), want = fewer.outputs();
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(in.params(got), nullptr));
        ASSERT_LAUNCHED(tome::merge_add_norm_cuda(fewer.params(want), nullptr));
        EXPECT_EQ(got.size, want.size);
        for (int64_t row = 0; row < 2 * 33; ++row) {
            const int64_t at = row / 33 * 34 + row % 33;
            const int32_t* offsets = fewer.plan.offsets.data() + at;
            if (offsets[1] - offsets[0] < 2) continue;  // of which one is rounded differently
            for (int64_t i = row * channels; i < (row + 1) * channels; ++i) {
                ASSERT_TRUE(got.out.same(i, want.out, i)) << row;
            }
        }
    }
}

TEST(CudaMergeAddNormGrid, MoreImagesThanAGridTakes) {
    const int64_t batch = tiles::kMaxImages + 3;
    run_and_compare(MergeAddNormInputs(DType::kFloat32, {batch, 1, 1, 2}, kind("plain")));
}

TEST(CudaMergeAddNormTiles, RowsFitTheRegistersOfTheirKernel) {
    for (int64_t channels = 0; channels <= 2048; ++channels) {
        ASSERT_GE(32 * tiles::norm_elements(channels), std::max<int64_t>(channels, 1));
    }
    EXPECT_EQ(tiles::norm_elements(384), 16);
    EXPECT_EQ(tiles::norm_elements(768), 24);
    EXPECT_EQ(tiles::norm_elements(1024), 32);
    EXPECT_EQ(tiles::norm_elements(1025), 64);
    EXPECT_EQ(tiles::norm_elements(2049), 0);
}

}  // namespace
}  // namespace tome_test
