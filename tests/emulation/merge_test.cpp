// merge_cuda, merge_backward_cuda, unmerge_cuda and plan_cuda in the emulator: against sums in
// double precision by plain loops, and against the CPU kernels where nothing is rounded.

#include <algorithm>

#include "emulator.h"
#include "helpers.h"
#include "tiles.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

using tome::Reduce;

// Rows of a (batch, rows, channels) array with any strides: `pad` elements before the first and
// after each one.
struct View {
    Array array;
    int64_t pad, rows, channels;

    View(DType dtype, int64_t batch, int64_t row_count, int64_t channel_count, int64_t padding,
         unsigned seed)
        : array(random_array(dtype, padding + batch * row_count * (channel_count + padding), seed)),
          pad(padding),
          rows(row_count),
          channels(channel_count) {}

    const void* data() const { return array.at(pad); }
    int64_t stride_row() const { return channels + pad; }
    int64_t stride_batch() const { return rows * stride_row(); }
    int64_t index(int64_t b, int64_t row, int64_t c) const {
        return pad + b * stride_batch() + row * stride_row() + c;
    }
};

struct Merged {
    Array out;
    std::vector<float> size;
};

Merged empty_merged(const View& x, const Plan& plan) {
    return {Array(x.array.dtype(), plan.batch * plan.rows * x.channels),
            std::vector<float>(static_cast<size_t>(plan.batch * plan.rows), -12345.0f)};
}

tome::MergeParams merge_params(const View& x, const Plan& plan, const float* size, Reduce reduce,
                               Merged& got) {
    return {x.data(),       x.array.dtype(),     plan.batch,          plan.tokens,
            plan.rows,      x.channels,          x.stride_batch(),    x.stride_row(),
            size,           plan.members.data(), plan.offsets.data(), reduce,
            got.out.data(), got.size.data()};
}

// Every element of a merge by its definition.
void expect_merged(const Merged& got, const View& x, const Plan& plan, const float* size,
                   Reduce reduce) {
    const DType dtype = x.array.dtype();
    for (int64_t b = 0; b < plan.batch; ++b) {
        for (int64_t row = 0; row < plan.rows; ++row) {
            const int64_t flat = b * plan.rows + row;
            std::vector<int64_t> tokens;
            double total = 0;
            for (int64_t n = 0; n < plan.tokens; ++n) {
                if (plan.assign[size_t(b * plan.tokens + n)] != row) continue;
                tokens.push_back(n);
                total += size == nullptr ? 1.0 : size[b * plan.tokens + n];
            }
            // Below float64 exact only for sizes whose sums float32 holds.
            ASSERT_EQ(got.size[size_t(flat)], static_cast<float>(total));
            const bool even = reduce == Reduce::kMean && total == 0;
            const double divisor = reduce != Reduce::kMean ? 1 : even ? tokens.size() : total;
            for (int64_t c = 0; c < x.channels; ++c) {
                double sum = 0, magnitude = 0, highest = -kInf;
                for (int64_t n : tokens) {
                    const double value = x.array[x.index(b, n, c)];
                    const double weight = size == nullptr || even ? 1.0 : size[b * plan.tokens + n];
                    sum += weight * value;
                    magnitude += std::fabs(weight * value);
                    highest = std::max(highest, value);
                }
                double want = tokens.empty() ? 0.0 : sum / divisor;
                double error =
                    roundoff_of(dtype) * std::fabs(want) +
                    double(tokens.size() + 4) * sum_roundoff_of(dtype) * magnitude / divisor +
                    std::ldexp(1.0, dtype == DType::kFloat16 ? -25 : -140);
                if (reduce == Reduce::kAmax && !tokens.empty()) want = highest;
                if (reduce == Reduce::kAmax || tokens.empty()) error = 0;
                const int64_t i = flat * x.channels + c;
                if (tokens.size() == 1 && reduce == Reduce::kMean) {
                    ASSERT_TRUE(got.out.same(i, x.array, x.index(b, tokens[0], c)));
                } else {
                    ASSERT_LE(std::fabs(got.out[i] - want), error)
                        << "b " << b << " row " << row << " c " << c;
                }
            }
        }
    }
}

class CudaMerge : public PerDType {
  protected:
    const Plan plan_ = random_plan(2, 61, 33, 7);
    const std::vector<float> sizes_ = random_sizes(2 * 61, 3);
};

INSTANTIATE_TEST_SUITE_P(DTypes, CudaMerge, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(CudaMerge, AgreesWithPlainLoops) {
    // Both sides of a vector, of a warp's vectors and of a chunk; with 16-byte rows and without.
    for (int64_t channels : {1, 3, 8, 64, 131, 256, 264, 1024, 1032}) {
        for (int64_t pad : {0, 1, 8}) {
            if (channels > 300 && pad == 1) continue;
            const View x(GetParam(), 2, 61, channels, pad, unsigned(channels));
            for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
                const float* size = reduce == Reduce::kAmax || pad == 1 ? nullptr : sizes_.data();
                Merged got = empty_merged(x, plan_);
                ASSERT_LAUNCHED(
                    tome::merge_cuda(merge_params(x, plan_, size, reduce, got), nullptr));
                expect_merged(got, x, plan_, size, reduce);
                if (HasFatalFailure()) return;
            }
        }
    }
}

TEST_P(CudaMerge, ManyRowsGoInPairs) {
    if (tome::element_size(GetParam()) != 2) return;
    // An odd number of rows, some of them empty; members near their row's number and far from it.
    Plan plan = random_plan(8, 61, 33, 19);
    std::vector<float> sizes = random_sizes(8 * 61, 5);
    for (size_t i = 0; i < sizes.size(); i += 3) sizes[i] = 1;
    const auto merged = [&](const View& x, const float* size, Reduce reduce, int multiprocessors) {
        const tome_emulation::UseOptions use({.multiprocessors = multiprocessors});
        EXPECT_EQ(tome::tiles::pairs_serve(8 * 33, 2 * x.channels, multiprocessors),
                  multiprocessors == 1);
        Merged got = empty_merged(x, plan);
        EXPECT_EQ(tome::merge_cuda(merge_params(x, plan, size, reduce, got), nullptr), cudaSuccess)
            << tome_emulation::last_failure();
        return got;
    };
    for (int64_t channels : {8, 264, 768}) {
        const View x(GetParam(), 8, 61, channels, 0, unsigned(channels));
        for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
            const float* size = channels == 264 ? nullptr : sizes.data();
            expect_merged(merged(x, size, reduce, 1), x, plan, size, reduce);
            if (HasFatalFailure()) return;
        }
    }
    // The same bits as the other kernel's, also where the plan leads outside.
    const View x(GetParam(), 8, 61, 40, 0, 1);
    for (int32_t bad : {-1, 61, 1 << 30, std::numeric_limits<int32_t>::min()}) {
        for (size_t at : {size_t{0}, size_t{5}, size_t{32}, size_t{33}}) {
            plan.members[at] = plan.members[61 + at] = bad;
            plan.offsets[at] = plan.offsets[34 + at] = bad;
            const Merged pairs = merged(x, sizes.data(), Reduce::kMean, 1);
            const Merged want = merged(x, sizes.data(), Reduce::kMean, 132);
            EXPECT_EQ(pairs.out, want.out);
            EXPECT_EQ(pairs.size, want.size);
        }
    }
}

TEST_P(CudaMerge, ManyMembers) {
    // Rows of more members than a warp has lanes.
    std::vector<int32_t> assign;
    for (int32_t n = 0; n < 200; ++n) assign.push_back(n % 7 == 0 ? 1 : 0);
    const Plan plan = plan_of(assign, 1, 200, 2);
    const std::vector<float> sizes = random_sizes(200, 5);
    const View x(GetParam(), 1, 200, 40, 0, 1);
    for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
        Merged got = empty_merged(x, plan);
        ASSERT_LAUNCHED(
            tome::merge_cuda(merge_params(x, plan, sizes.data(), reduce, got), nullptr));
        expect_merged(got, x, plan, sizes.data(), reduce);
    }
}

// Sums of sizes that float32 does not hold: in double they differ from float32's by more than the
// results may.
TEST(CudaMergeFloat64, SumsSizesInDouble) {
    const Plan plan = random_plan(2, 61, 7, 3);
    std::vector<float> sizes = random_sizes(2 * 61, 8);
    for (float& size : sizes) size += 0x1p-22f * size;
    const View x(DType::kFloat64, 2, 61, 9, 0, 2), grad(DType::kFloat64, 2, 7, 9, 0, 3);
    for (Reduce reduce : {Reduce::kMean, Reduce::kSum}) {
        Merged got = empty_merged(x, plan);
        ASSERT_LAUNCHED(
            tome::merge_cuda(merge_params(x, plan, sizes.data(), reduce, got), nullptr));
        expect_merged(got, x, plan, sizes.data(), reduce);
        Array back(DType::kFloat64, 2 * 61 * 9), want(DType::kFloat64, 2 * 61 * 9);
        tome::MergeBackwardParams p{grad.data(),
                                    DType::kFloat64,
                                    2,
                                    61,
                                    7,
                                    9,
                                    grad.stride_batch(),
                                    grad.stride_row(),
                                    sizes.data(),
                                    plan.members.data(),
                                    plan.offsets.data(),
                                    reduce,
                                    back.data()};
        ASSERT_LAUNCHED(tome::merge_backward_cuda(p, nullptr));
        p.out = want.data();
        ASSERT_TRUE(tome::merge_backward(p, Threads::serial()));
        for (int64_t i = 0; i < back.count(); ++i) {
            ASSERT_LE(std::fabs(back[i] - want[i]), 4 * 0x1p-53 * std::fabs(want[i]));
        }
    }
}

// Every thread waits for earlier kernels, of which the emulator makes sure, whatever it has to do;
// and unmerge, which follows kernels of a host's model, is launched the ordinary way.
TEST_P(CudaMerge, MayBeginBeforeMatchHasEnded) {
    const View x(GetParam(), 2, 61, 24, 0, 9);
    Merged got = empty_merged(x, plan_);
    ASSERT_LAUNCHED(tome::merge_cuda(merge_params(x, plan_, nullptr, Reduce::kMean, got), nullptr));
    EXPECT_TRUE(tome_emulation::neighbours().overlapping);
    // What follows may count on all before merge being over when merge is.
    EXPECT_EQ(tome_emulation::neighbours().releasing_blocks, 0u);
    const View rows(GetParam(), 2, 33, 24, 0, 5);
    Array back(GetParam(), 2 * 61 * 24);
    ASSERT_LAUNCHED(tome::unmerge_cuda({rows.data(), GetParam(), 2, 61, 33, 24, rows.stride_batch(),
                                        rows.stride_row(), plan_.assign.data(), back.data()},
                                       nullptr));
    EXPECT_FALSE(tome_emulation::neighbours().overlapping);
}

TEST_P(CudaMerge, ZeroSizesGiveTheEvenMean) {
    std::vector<float> sizes(2 * 61, 0.0f);
    for (size_t i = 0; i < sizes.size(); i += 3) sizes[i] = 2.0f;
    const View x(GetParam(), 2, 61, 24, 0, 9);
    Merged got = empty_merged(x, plan_);
    ASSERT_LAUNCHED(
        tome::merge_cuda(merge_params(x, plan_, sizes.data(), Reduce::kMean, got), nullptr));
    expect_merged(got, x, plan_, sizes.data(), Reduce::kMean);
}

TEST_P(CudaMerge, NaNAndInfinityStayInTheirRows) {
    const Plan plan = plan_of({0, 0, 1, 1, 2, 2}, 1, 6, 3);
    const int64_t channels = 40;
    View x(GetParam(), 1, 6, channels, 0, 4);
    x.array.set(x.index(0, 0, 3), kNaN);
    x.array.set(x.index(0, 2, 18), kInf);
    for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
        Merged got = empty_merged(x, plan);
        ASSERT_LAUNCHED(tome::merge_cuda(merge_params(x, plan, nullptr, reduce, got), nullptr));
        for (int64_t i = 0; i < 3 * channels; ++i) {
            if (i == 3) {
                EXPECT_TRUE(std::isnan(got.out[i]));
            } else if (i == channels + 18) {
                EXPECT_EQ(got.out[i], kInf);
            } else {
                EXPECT_TRUE(std::isfinite(got.out[i])) << i;
            }
        }
    }
}

TEST_P(CudaMerge, TheOrderOfThreadsDoesNotMatter) {
    const View x(GetParam(), 2, 61, 72, 0, 6);
    Merged first = empty_merged(x, plan_);
    ASSERT_LAUNCHED(
        tome::merge_cuda(merge_params(x, plan_, sizes_.data(), Reduce::kMean, first), nullptr));
    for (uint32_t seed : {1u, 2u, 3u}) {
        const tome_emulation::UseOptions use({.seed = seed});
        Merged again = empty_merged(x, plan_);
        ASSERT_LAUNCHED(
            tome::merge_cuda(merge_params(x, plan_, sizes_.data(), Reduce::kMean, again), nullptr));
        EXPECT_EQ(again.out, first.out);
        EXPECT_EQ(again.size, first.size);
    }
}

TEST_P(CudaMerge, BackwardAgreesWithTheCpu) {
    for (int64_t channels : {1, 37, 64, 1032}) {
        for (int64_t pad : {0, 1}) {
            const View grad(GetParam(), 2, 33, channels, pad, unsigned(channels));
            for (Reduce reduce : {Reduce::kMean, Reduce::kSum}) {
                for (const float* size : {static_cast<const float*>(nullptr), sizes_.data()}) {
                    Array got(GetParam(), 2 * 61 * channels), want(GetParam(), 2 * 61 * channels);
                    tome::MergeBackwardParams p{grad.data(),
                                                GetParam(),
                                                2,
                                                61,
                                                33,
                                                channels,
                                                grad.stride_batch(),
                                                grad.stride_row(),
                                                size,
                                                plan_.members.data(),
                                                plan_.offsets.data(),
                                                reduce,
                                                got.data()};
                    ASSERT_LAUNCHED(tome::merge_backward_cuda(p, nullptr));
                    p.out = want.data();
                    ASSERT_TRUE(tome::merge_backward(p, Threads::serial()));
                    for (int64_t i = 0; i < got.count(); ++i) {
                        ASSERT_LE(std::fabs(got[i] - want[i]),
                                  (2 * roundoff_of(GetParam()) + 2 * sum_roundoff_of(GetParam())) *
                                      std::fabs(want[i]));
                    }
                }
            }
        }
    }
}

TEST_P(CudaMerge, UnmergeCopies) {
    for (int64_t channels : {1, 5, 64, 131, 1032}) {
        for (int64_t pad : {0, 1, 8}) {
            const View x(GetParam(), 2, 33, channels, pad, 5);
            Array got(GetParam(), 2 * 61 * channels), want(GetParam(), 2 * 61 * channels);
            tome::UnmergeParams p{
                x.data(),       GetParam(),          2,         61, 33, channels, x.stride_batch(),
                x.stride_row(), plan_.assign.data(), got.data()};
            ASSERT_LAUNCHED(tome::unmerge_cuda(p, nullptr));
            p.out = want.data();
            ASSERT_TRUE(tome::unmerge(p, Threads::serial()));
            ASSERT_EQ(got, want);
        }
    }
}

TEST_P(CudaMerge, TakesEmptyShapes) {
    for (const Plan& plan : {plan_of({}, 0, 5, 3), plan_of({}, 2, 0, 0), plan_of({}, 2, 0, 3),
                             plan_of({-1, -1}, 1, 2, 0), plan_of({0, 0, 1}, 1, 3, 2)}) {
        for (int64_t channels : {0, 4}) {
            const View x(GetParam(), plan.batch, plan.tokens, channels, 0, 1);
            Merged got = empty_merged(x, plan);
            ASSERT_LAUNCHED(
                tome::merge_cuda(merge_params(x, plan, nullptr, Reduce::kMean, got), nullptr));
            expect_merged(got, x, plan, nullptr, Reduce::kMean);
            const View rows(GetParam(), plan.batch, plan.rows, channels, 0, 1);
            Array back(GetParam(), plan.batch * plan.tokens * channels);
            ASSERT_LAUNCHED(tome::merge_backward_cuda(
                {rows.data(), GetParam(), plan.batch, plan.tokens, plan.rows, channels,
                 rows.stride_batch(), rows.stride_row(), nullptr, plan.members.data(),
                 plan.offsets.data(), Reduce::kMean, back.data()},
                nullptr));
            ASSERT_LAUNCHED(tome::unmerge_cuda(
                {rows.data(), GetParam(), plan.batch, plan.tokens, plan.rows, channels,
                 rows.stride_batch(), rows.stride_row(), plan.assign.data(), back.data()},
                nullptr));
        }
    }
}

// What points outside is skipped: AddressSanitizer would see it followed.
TEST_P(CudaMerge, NoPlanLeadsOutside) {
    const int32_t wild[] = {-1,
                            61,
                            1 << 30,
                            -(1 << 30),
                            std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
    const View tokens(GetParam(), 2, 61, 40, 0, 1), rows(GetParam(), 2, 33, 40, 0, 2);
    for (int32_t bad : wild) {
        for (size_t at : {size_t{0}, size_t{5}, size_t{33}}) {
            Plan plan = plan_;
            plan.members[at] = plan.members[61 + at] = bad;
            plan.assign[at] = bad;
            plan.offsets[at] = plan.offsets[34 + at] = bad;
            Merged got = empty_merged(tokens, plan);
            ASSERT_LAUNCHED(tome::merge_cuda(
                merge_params(tokens, plan, sizes_.data(), Reduce::kMean, got), nullptr));
            Array back(GetParam(), 2 * 61 * 40);
            ASSERT_LAUNCHED(tome::merge_backward_cuda(
                {rows.data(), GetParam(), 2, 61, 33, 40, rows.stride_batch(), rows.stride_row(),
                 sizes_.data(), plan.members.data(), plan.offsets.data(), Reduce::kMean,
                 back.data()},
                nullptr));
            ASSERT_LAUNCHED(
                tome::unmerge_cuda({rows.data(), GetParam(), 2, 61, 33, 40, rows.stride_batch(),
                                    rows.stride_row(), plan.assign.data(), back.data()},
                                   nullptr));
        }
    }
}

TEST(CudaMergeGrid, MoreImagesThanAGridTakes) {
    const int64_t batch = tome::tiles::kMaxImages + 3;
    const Plan plan = plan_of(std::vector<int32_t>(size_t(batch), 0), batch, 1, 1);
    const View x(DType::kFloat32, batch, 1, 1, 0, 1);
    Merged got = empty_merged(x, plan);
    ASSERT_LAUNCHED(tome::merge_cuda(merge_params(x, plan, nullptr, Reduce::kMean, got), nullptr));
    EXPECT_EQ(got.out, x.array);
}

// --- plan
// -----------------------------------------------------------------------------------------

void expect_plan(const Plan& want, const std::vector<int32_t>& assign) {
    for (uint32_t seed : {0u, 1u}) {
        const tome_emulation::UseOptions use({.seed = seed});
        std::vector<int32_t> members(want.members.size(), 0x5a5a5a5a);
        std::vector<int32_t> offsets(want.offsets.size(), 0x5a5a5a5a);
        ASSERT_LAUNCHED(tome::plan_cuda(
            {assign.data(), want.batch, want.tokens, want.rows, members.data(), offsets.data()},
            nullptr));
        EXPECT_EQ(members, want.members);
        EXPECT_EQ(offsets, want.offsets);
    }
}

TEST(CudaPlan, AgreesWithPlainLoops) {
    const int64_t shapes[][3] = {{1, 1, 1},   {2, 7, 3},     {3, 50, 49},   {4, 5, 40},
                                 {1, 200, 1}, {9, 300, 200}, {1, 513, 257}, {1, 40, 1000}};
    for (const auto& [batch, tokens, rows] : shapes) {
        const Plan want = random_plan(batch, tokens, rows, 1);
        expect_plan(want, want.assign);
    }
}

TEST(CudaPlan, MoreRowsThanSharedMemoryHolds) {
    const int64_t rows = tome::tiles::kPlanSharedRows + 5;
    std::vector<int32_t> assign;
    for (int32_t n = 0; n < 70; ++n)
        assign.push_back(n % 9 == 0 ? -1 : static_cast<int32_t>(rows) - 1 - n / 2);
    // Not plan_of, which takes tokens * rows steps.
    Plan want{1, 70, rows, assign, {}, std::vector<int32_t>(size_t(rows + 1), 0)};
    for (int64_t row = 0; row <= rows; ++row) {
        if (row < rows - 40 && row > 0) continue;
        want.offsets[size_t(row)] = static_cast<int32_t>(want.members.size());
        for (int32_t n = 0; n < 70; ++n) {
            const int32_t to =
                assign[size_t(n)] == -1 ? static_cast<int32_t>(rows) : assign[size_t(n)];
            if (to == row) want.members.push_back(n);
        }
    }
    expect_plan(want, assign);
}

TEST(CudaPlan, WhatPointsOutsideIsDropped) {
    const Plan want = plan_of({0, -1, 1, -1, -1, 0}, 1, 6, 2);
    expect_plan(want, {0, 2, 1, -7, std::numeric_limits<int32_t>::max(), 0});
}

TEST(CudaPlan, TakesEmptyShapes) {
    for (const Plan& want :
         {plan_of({}, 0, 5, 3), plan_of({}, 2, 0, 3), plan_of({-1, -1, -1}, 1, 3, 0)}) {
        expect_plan(want, want.assign);
    }
}

}  // namespace
}  // namespace tome_test
