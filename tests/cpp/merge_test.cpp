// merge(), merge_backward() and unmerge(): against double precision sums over plain loops.

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "helpers.h"

namespace tome_test {
namespace {

using tome::Reduce;
using tome::Status;

// Rows of a (batch, rows, channels) array with any strides.
struct Rows {
    const void* data;
    int64_t stride_batch, stride_row;
};

Rows contiguous(const Array& x, int64_t rows, int64_t channels) {
    return {x.data(), rows * channels, channels};
}

struct Merged {
    Status status;
    Array out;
    std::vector<float> size;
};

constexpr float kPoisonSize = -12345.0f;

Merged run_merge(DType dtype, const Rows& x, const Plan& plan, int64_t channels, const float* size,
                 Reduce reduce, const Threads& threads) {
    Merged got{{},
               Array(dtype, plan.batch * plan.rows * channels),
               std::vector<float>(static_cast<size_t>(plan.batch * plan.rows), kPoisonSize)};
    got.status = tome::merge(
        {x.data, dtype, plan.batch, plan.tokens, plan.rows, channels, x.stride_batch, x.stride_row,
         size, plan.members.data(), plan.offsets.data(), reduce, got.out.data(), got.size.data()},
        threads);
    return got;
}

struct Spread {
    Status status;
    Array out;
};

Spread run_backward(DType dtype, const Rows& grad, const Plan& plan, int64_t channels,
                    const float* size, Reduce reduce, const Threads& threads) {
    Spread got{{}, Array(dtype, plan.batch * plan.tokens * channels)};
    got.status = tome::merge_backward(
        {grad.data, dtype, plan.batch, plan.tokens, plan.rows, channels, grad.stride_batch,
         grad.stride_row, size, plan.members.data(), plan.offsets.data(), reduce, got.out.data()},
        threads);
    return got;
}

Spread run_unmerge(DType dtype, const Rows& x, const Plan& plan, int64_t channels,
                   const Threads& threads) {
    Spread got{{}, Array(dtype, plan.batch * plan.tokens * channels)};
    got.status = tome::unmerge({x.data, dtype, plan.batch, plan.tokens, plan.rows, channels,
                                x.stride_batch, x.stride_row, plan.assign.data(), got.out.data()},
                               threads);
    return got;
}

struct Want {
    double value = 0, size = 0;
    double error = 0;     // what rounding may add
    int64_t copied = -1;  // the token this is a copy of, bit for bit
};

// One output element by its definition.
Want oracle_merge(const Array& x, const Plan& plan, int64_t channels, const float* size,
                  Reduce reduce, int64_t b, int64_t row, int64_t c) {
    Want want;
    double sum = 0, magnitude = 0, plain = 0, highest = -kInf;
    int64_t count = 0, last = -1;
    for (int64_t n = 0; n < plan.tokens; ++n) {
        const int64_t token = b * plan.tokens + n;
        if (plan.assign[static_cast<size_t>(token)] != row) continue;
        const double value = x[token * channels + c];
        const double weight = size == nullptr ? 1.0 : size[token];
        sum += weight * value;
        magnitude += std::fabs(weight * value);
        plain += value;
        highest = std::max(highest, value);
        want.size += weight;
        last = token;
        ++count;
    }
    if (count == 0) return want;
    if (reduce == Reduce::kAmax) {
        want.value = highest;
        return want;
    }
    if (reduce == Reduce::kMean && count == 1) {
        want.value = plain;
        want.copied = last;
        return want;
    }
    double divisor = 1;
    if (reduce == Reduce::kMean) {
        if (want.size == 0) sum = plain;
        divisor = want.size == 0 ? double(count) : want.size;
    }
    want.value = sum / divisor;
    want.error = roundoff_of(x.dtype()) * std::fabs(want.value) +
                 double(count + 3) * sum_roundoff_of(x.dtype()) * magnitude / divisor +
                 std::ldexp(1.0, x.dtype() == DType::kFloat16 ? -25 : -140);
    return want;
}

class MergeTest : public PerDType {
  protected:
    // Four images of 61 tokens; 33 rows, some empty; about one in eight tokens dropped.
    const Plan plan_ = random_plan(4, 61, 33, 11);
    const std::vector<float> sizes_ = random_sizes(4 * 61, 12);
};
INSTANTIATE_TEST_SUITE_P(DTypes, MergeTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

void expect_merged(const Array& x, const Plan& plan, int64_t channels, const float* size,
                   Reduce reduce, const Merged& got) {
    ASSERT_TRUE(got.status);
    for (int64_t b = 0; b < plan.batch; ++b) {
        for (int64_t row = 0; row < plan.rows; ++row) {
            const int64_t flat = b * plan.rows + row;
            for (int64_t c = 0; c < channels; ++c) {
                const Want want = oracle_merge(x, plan, channels, size, reduce, b, row, c);
                ASSERT_LE(std::fabs(got.out[flat * channels + c] - want.value), want.error)
                    << "image " << b << " row " << row << " channel " << c;
                if (want.copied >= 0) {
                    ASSERT_TRUE(got.out.same(flat * channels + c, x, want.copied * channels + c));
                }
                ASSERT_EQ(got.size[static_cast<size_t>(flat)], float(want.size));
            }
        }
    }
}

TEST_P(MergeTest, AgreesWithOracle) {
    for (int64_t channels : {1, 3, 8, 31, 64, 100, 129}) {
        const Array x = random_array(GetParam(), plan_.batch * plan_.tokens * channels, 4);
        for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
            for (const float* size : {static_cast<const float*>(nullptr), sizes_.data()}) {
                SCOPED_TRACE(::testing::Message() << "channels " << channels << " reduce "
                                                  << int(reduce) << " sizes " << (size != nullptr));
                for_each_isa([&] {
                    const Rows rows = contiguous(x, plan_.tokens, channels);
                    const Merged got = run_merge(GetParam(), rows, plan_, channels, size, reduce,
                                                 Threads::serial());
                    expect_merged(x, plan_, channels, size, reduce, got);
                    const Merged pooled =
                        run_merge(GetParam(), rows, plan_, channels, size, reduce, pool());
                    EXPECT_EQ(pooled.out, got.out);
                    EXPECT_EQ(pooled.size, got.size);
                });
            }
        }
    }
}

TEST_P(MergeTest, HoldsWithManyRowsPerThread) {
    const Plan plan = random_plan(3, 400, 350, 2);
    const Array x = random_array(GetParam(), 3 * 400 * 257, 3);
    const std::vector<float> sizes = random_sizes(3 * 400, 4);
    for_each_isa([&] {
        const Rows rows = contiguous(x, 400, 257);
        expect_merged(x, plan, 257, sizes.data(), Reduce::kMean,
                      run_merge(GetParam(), rows, plan, 257, sizes.data(), Reduce::kMean, pool()));
    });
}

TEST_P(MergeTest, ReadsStridedAndUnalignedRows) {
    const int64_t channels = 45, stride_row = 51, stride_batch = 61 * 51 + 7;
    Array wide(GetParam(), 4 * stride_batch + 1);
    for (int64_t i = 0; i < wide.count(); ++i) wide.set(i, kNaN);
    const Array x = random_array(GetParam(), 4 * 61 * channels, 4);
    for (int64_t i = 0; i < x.count(); ++i) {
        const int64_t token = i / channels;
        wide.set(1 + token / 61 * stride_batch + token % 61 * stride_row + i % channels, x[i]);
    }
    const Rows strided{wide.at(1), stride_batch, stride_row};
    for_each_isa([&] {
        const Merged got =
            run_merge(GetParam(), strided, plan_, channels, sizes_.data(), Reduce::kMean, pool());
        EXPECT_EQ(got.out, run_merge(GetParam(), contiguous(x, 61, channels), plan_, channels,
                                     sizes_.data(), Reduce::kMean, pool())
                               .out);
    });
    // As rows of a merged tensor: backward and unmerge. 33 of the 61 rows are looked at.
    Array rows_only(GetParam(), 4 * 33 * channels);
    for (int64_t i = 0; i < rows_only.count(); ++i) {
        const int64_t row = i / channels;
        rows_only.set(i, x[(row / 33 * 61 + row % 33) * channels + i % channels]);
    }
    const Rows packed = contiguous(rows_only, 33, channels);
    for_each_isa([&] {
        EXPECT_EQ(run_unmerge(GetParam(), strided, plan_, channels, pool()).out,
                  run_unmerge(GetParam(), packed, plan_, channels, pool()).out);
        const auto back = [&](const Rows& rows) {
            return run_backward(GetParam(), rows, plan_, channels, sizes_.data(), Reduce::kMean,
                                pool());
        };
        EXPECT_EQ(back(strided).out, back(packed).out);
    });
}

TEST_P(MergeTest, AveragesPaddingEvenly) {
    // Rows of total size 0: {0, 1} evenly, {2} a copy, {} zero.
    const Plan plan = plan_of({0, 0, 1}, 1, 3, 3);
    const std::vector<float> size(3, 0.0f);
    Array x(GetParam(), 6);
    for (int64_t i = 0; i < 6; ++i) x.set(i, double(i));
    for_each_isa([&] {
        const Merged got = run_merge(GetParam(), contiguous(x, 3, 2), plan, 2, size.data(),
                                     Reduce::kMean, Threads::serial());
        const double want[] = {1, 2, 4, 5, 0, 0};
        for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(got.out[i], want[i]);
        EXPECT_EQ(got.size, std::vector<float>(3, 0.0f));
    });
}

TEST_P(MergeTest, KeepsNonFiniteValuesInTheirRow) {
    const Plan plan = plan_of({0, 0, 1, 1, 2, 2}, 1, 6, 3);
    const int64_t channels = 19;
    Array x = random_array(GetParam(), 6 * channels, 8);
    x.set(0 * channels + 3, kNaN);
    x.set(2 * channels + 18, kInf);
    for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
        for_each_isa([&] {
            const Merged got = run_merge(GetParam(), contiguous(x, 6, channels), plan, channels,
                                         nullptr, reduce, Threads::serial());
            for (int64_t i = 0; i < 3 * channels; ++i) {
                const double value = got.out[i];
                if (i == 3) {
                    EXPECT_TRUE(std::isnan(value));
                } else if (i == channels + 18) {
                    EXPECT_EQ(value, kInf);
                } else {
                    EXPECT_TRUE(std::isfinite(value)) << i;
                }
            }
        });
    }
}

TEST_P(MergeTest, BackwardIsTheAdjoint) {
    const int64_t channels = 37;
    const Array grad = random_array(GetParam(), 4 * 33 * channels, 21);
    for (Reduce reduce : {Reduce::kMean, Reduce::kSum}) {
        for (const float* size : {static_cast<const float*>(nullptr), sizes_.data()}) {
            for_each_isa([&] {
                const Rows rows = contiguous(grad, 33, channels);
                const Spread got = run_backward(GetParam(), rows, plan_, channels, size, reduce,
                                                Threads::serial());
                ASSERT_TRUE(got.status);
                EXPECT_EQ(run_backward(GetParam(), rows, plan_, channels, size, reduce, pool()).out,
                          got.out);
                for (int64_t token = 0; token < 4 * 61; ++token) {
                    const int64_t b = token / 61, row = plan_.assign[size_t(token)];
                    double weight = row < 0 ? 0.0 : size == nullptr ? 1.0 : size[token];
                    if (row >= 0 && reduce == Reduce::kMean) {
                        double total = 0;
                        for (int64_t n = b * 61; n < b * 61 + 61; ++n) {
                            if (plan_.assign[size_t(n)] == row) total += size ? size[n] : 1.0;
                        }
                        weight /= total;
                    }
                    for (int64_t c = 0; c < channels; ++c) {
                        const double want =
                            weight == 0 ? 0.0 : weight * grad[(b * 33 + row) * channels + c];
                        // The weight itself is a float32 in every dtype.
                        const double error =
                            (roundoff_of(GetParam()) + std::ldexp(1.0, -23)) * std::fabs(want) +
                            std::ldexp(1.0, GetParam() == DType::kFloat16 ? -25 : -140);
                        ASSERT_LE(std::fabs(got.out[token * channels + c] - want), error);
                    }
                }
            });
        }
    }
}

// More members than float32 counts: 0.75 times each of 2^24 + 2^12 ones.
TEST(LongRows, AreSummedInFull) {
    const int64_t tokens = (int64_t{1} << 24) + (1 << 12);
    Plan plan{1, tokens, 1, {}, std::vector<int32_t>(size_t(tokens)), {0, int32_t(tokens)}};
    for (int64_t n = 0; n < tokens; ++n) plan.members[size_t(n)] = int32_t(n);
    const std::vector<float> size(size_t(tokens), 0.75f);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        Array x(dtype, tokens);
        for (int64_t n = 0; n < tokens; ++n) x.set(n, 1.0);
        for (const float* sizes : {static_cast<const float*>(nullptr), size.data()}) {
            const double want = double(tokens) * (sizes == nullptr ? 1.0 : 0.75);
            for (Reduce reduce : {Reduce::kSum, Reduce::kMean}) {
                const Merged got = run_merge(dtype, contiguous(x, tokens, 1), plan, 1, sizes,
                                             reduce, Threads::serial());
                EXPECT_EQ(got.size[0], want);
                const double value = reduce == Reduce::kMean ? 1.0 : want;
                EXPECT_NEAR(got.out[0], value, value * roundoff_of(dtype));
            }
        }
    }
}

// In chains of several thousands, whole and not, in every width of a vector.
TEST_P(MergeTest, RowsOfManyMembers) {
    for (int64_t tokens : {4095, 4096, 4097, 9000}) {
        const Plan plan = plan_of(std::vector<int32_t>(size_t(tokens), 0), 1, tokens, 1);
        const Array x = random_array(GetParam(), tokens * 67, 4);
        const std::vector<float> sizes = random_sizes(tokens, 5);
        for (Reduce reduce : {Reduce::kMean, Reduce::kSum, Reduce::kAmax}) {
            for_each_isa([&] {
                const Merged got = run_merge(GetParam(), contiguous(x, tokens, 67), plan, 67,
                                             sizes.data(), reduce, Threads::serial());
                expect_merged(x, plan, 67, sizes.data(), reduce, got);
            });
        }
    }
}

TEST_P(MergeTest, UnmergeCopies) {
    for (int64_t channels : {1, 5, 64, 131}) {
        const Array x = random_array(GetParam(), 4 * 33 * channels, 5);
        for (const Threads& threads : {Threads::serial(), pool()}) {
            const Spread got =
                run_unmerge(GetParam(), contiguous(x, 33, channels), plan_, channels, threads);
            ASSERT_TRUE(got.status);
            for (int64_t i = 0; i < got.out.count(); ++i) {
                const int64_t token = i / channels, row = plan_.assign[size_t(token)];
                if (row < 0) {
                    ASSERT_EQ(got.out[i], 0.0);
                } else {
                    const int64_t from = (token / 61 * 33 + row) * channels + i % channels;
                    ASSERT_TRUE(got.out.same(i, x, from));
                }
            }
        }
    }
}

TEST_P(MergeTest, AnImageDoesNotDependOnItsBatch) {
    const int64_t channels = 70;
    const Array x = random_array(GetParam(), 4 * 61 * channels, 6);
    for_each_isa([&] {
        const Merged all = run_merge(GetParam(), contiguous(x, 61, channels), plan_, channels,
                                     sizes_.data(), Reduce::kMean, pool());
        for (int64_t b = 0; b < 4; ++b) {
            const auto begin = plan_.assign.begin() + b * 61;
            const Plan one = plan_of(std::vector<int32_t>(begin, begin + 61), 1, 61, 33);
            const Rows rows{x.at(b * 61 * channels), 0, channels};
            const Merged alone = run_merge(GetParam(), rows, one, channels, sizes_.data() + b * 61,
                                           Reduce::kMean, Threads::serial());
            for (int64_t i = 0; i < alone.out.count(); ++i) {
                ASSERT_TRUE(alone.out.same(i, all.out, b * 33 * channels + i));
            }
        }
    });
}

TEST_P(MergeTest, TakesEmptyShapes) {
    const Array nothing(GetParam(), 0);
    for (const Plan& plan : {plan_of({}, 0, 5, 3), plan_of({}, 2, 0, 0), plan_of({}, 2, 0, 3),
                             plan_of({-1, -1}, 1, 2, 0)}) {
        const Array x = random_array(GetParam(), plan.batch * plan.tokens * 4, 1);
        for_each_isa([&] {
            const Merged got = run_merge(GetParam(), contiguous(x, plan.tokens, 4), plan, 4,
                                         nullptr, Reduce::kMean, pool());
            EXPECT_TRUE(got.status);
            for (int64_t i = 0; i < got.out.count(); ++i) EXPECT_EQ(got.out[i], 0.0);
            const Array rows = random_array(GetParam(), plan.batch * plan.rows * 4, 1);
            const Rows view = contiguous(rows, plan.rows, 4);
            const Spread back =
                run_backward(GetParam(), view, plan, 4, nullptr, Reduce::kMean, pool());
            EXPECT_TRUE(back.status);
            for (int64_t i = 0; i < back.out.count(); ++i) EXPECT_EQ(back.out[i], 0.0);
            EXPECT_TRUE(run_unmerge(GetParam(), view, plan, 4, pool()).status);
            // No channels at all: the pointers are null.
            const Rows no_tokens = contiguous(nothing, plan.tokens, 0);
            const Rows no_rows = contiguous(nothing, plan.rows, 0);
            EXPECT_TRUE(
                run_merge(GetParam(), no_tokens, plan, 0, nullptr, Reduce::kSum, pool()).status);
            EXPECT_TRUE(
                run_backward(GetParam(), no_rows, plan, 0, nullptr, Reduce::kSum, pool()).status);
            EXPECT_TRUE(run_unmerge(GetParam(), no_rows, plan, 0, pool()).status);
        });
    }
}

// --- plans that must be refused
// --------------------------------------------------------------------

struct BadPlan {
    const char* name;
    std::function<void(Plan&)> spoil;  // of the second of two images: rows {0, 1}, {2}, {3, 4}
    Status::Code code;
    int64_t index, value;
};

const BadPlan kBadPlans[] = {
    {"member too high", [](Plan& p) { p.members[7] = 5; }, Status::kMemberOutOfRange, 2, 5},
    {"member negative", [](Plan& p) { p.members[7] = -1; }, Status::kMemberOutOfRange, 2, -1},
    {"member repeated", [](Plan& p) { p.members[7] = 0; }, Status::kMemberRepeated, 2, 0},
    {"offsets start late", [](Plan& p) { p.offsets[4] = 1; }, Status::kOffsetsNotOrdered, 0, 1},
    {"offsets negative", [](Plan& p) { p.offsets[5] = -1; }, Status::kOffsetsNotOrdered, 1, -1},
    {"offsets decrease", [](Plan& p) { p.offsets[6] = 1; }, Status::kOffsetsNotOrdered, 2, 1},
    {"offsets past the end", [](Plan& p) { p.offsets[7] = 6; }, Status::kOffsetsNotOrdered, 3, 6},
};

void expect_refused(const BadPlan& bad, const Status& status) {
    EXPECT_FALSE(status);
    EXPECT_EQ(status.code, bad.code);
    EXPECT_EQ(status.batch, 1);
    EXPECT_EQ(status.index, bad.index);
    EXPECT_EQ(status.value, bad.value);
}

TEST(RefusedPlans, SayWhereAndWriteNothing) {
    const Plan good = plan_of({0, 0, 1, 2, 2, 0, 0, 1, 2, 2}, 2, 5, 3);
    const Array tokens = random_array(DType::kFloat32, 2 * 5 * 4, 1);
    const Array rows = random_array(DType::kFloat32, 2 * 3 * 4, 1);
    for (const BadPlan& bad : kBadPlans) {
        SCOPED_TRACE(bad.name);
        Plan plan = good;
        bad.spoil(plan);
        for (const Threads& threads : {Threads::serial(), pool()}) {
            const Merged merged = run_merge(DType::kFloat32, contiguous(tokens, 5, 4), plan, 4,
                                            nullptr, Reduce::kMean, threads);
            expect_refused(bad, merged.status);
            EXPECT_TRUE(merged.out.untouched());
            EXPECT_EQ(merged.size, std::vector<float>(6, kPoisonSize));
            const Spread back = run_backward(DType::kFloat32, contiguous(rows, 3, 4), plan, 4,
                                             nullptr, Reduce::kMean, threads);
            expect_refused(bad, back.status);
            EXPECT_TRUE(back.out.untouched());
        }
    }
}

// A thread that writes to a plan's indices, good and wild ones, while others work by them.
template <class Body>
void while_rewritten(std::vector<int32_t>& indices, const Body& body) {
    std::atomic<bool> stop{false};
    std::thread writer([&] {
        const std::vector<int32_t> good = indices;
        const auto write = [&](size_t i, int32_t value) {
            std::atomic_ref<int32_t>(indices[i]).store(value, std::memory_order_relaxed);
        };
        while (!stop) {
            for (size_t i = 0; i < good.size(); ++i) write(i, INT32_MAX - int32_t(i % 7));
            for (size_t i = 0; i < good.size(); ++i) write(i, good[i]);
        }
    });
    for (int i = 0; i < 300; ++i) body();
    stop = true;
    writer.join();
}

// Any result may come of it, and no access outside the tensors: what is followed is what was
// checked.
TEST(RewrittenPlans, LeadNowhere) {
    Plan plan = random_plan(3, 400, 300, 2);
    const Array tokens = random_array(DType::kFloat32, 3 * 400 * 8, 1);
    const Array rows = random_array(DType::kFloat32, 3 * 300 * 8, 1);
    const auto merge_and_back = [&] {
        run_merge(DType::kFloat32, contiguous(tokens, 400, 8), plan, 8, nullptr, Reduce::kMean,
                  pool());
        run_backward(DType::kFloat32, contiguous(rows, 300, 8), plan, 8, nullptr, Reduce::kMean,
                     pool());
    };
    while_rewritten(plan.members, merge_and_back);
    while_rewritten(plan.offsets, merge_and_back);
    std::vector<int32_t> members(3 * 400), offsets(3 * 301);
    while_rewritten(plan.assign, [&] {
        run_unmerge(DType::kFloat32, contiguous(rows, 300, 8), plan, 8, pool());
        const Status status =
            tome::plan({plan.assign.data(), 3, 400, 300, members.data(), offsets.data()}, pool());
        EXPECT_TRUE(status || status.code == Status::kAssignOutOfRange);
    });
    std::vector<int32_t> targets{3, 50, 51, 120, 399};
    std::vector<int32_t> assign(3 * 400);
    tome::MatchParams p{};
    p.metric = tokens.data(), p.dtype = DType::kFloat32;
    p.batch = 3, p.heads = 1, p.tokens = 400, p.dim = 8;
    p.stride_batch = 400 * 8, p.stride_token = 8;
    p.r = 300, p.num_prefix_tokens = 1;
    p.targets = targets.data(), p.num_targets = 5;
    p.assign = assign.data(), p.members = members.data(), p.offsets = offsets.data();
    while_rewritten(targets, [&] {
        const Status status = tome::match(p, pool());
        EXPECT_TRUE(status || status.code == Status::kTargetsNotOrdered);
    });
}

TEST(RefusedPlans, UnmergeSaysWhereAndWritesNothing) {
    const Array rows = random_array(DType::kFloat32, 2 * 3 * 4, 1);
    for (int32_t bad : {3, -2}) {
        Plan plan = plan_of({0, 0, 1, 2, 2, 0, 0, 1, 2, 2}, 2, 5, 3);
        plan.assign[8] = bad;
        for (const Threads& threads : {Threads::serial(), pool()}) {
            const Spread got =
                run_unmerge(DType::kFloat32, contiguous(rows, 3, 4), plan, 4, threads);
            expect_refused({"", nullptr, Status::kAssignOutOfRange, 3, bad}, got.status);
            EXPECT_TRUE(got.out.untouched());
        }
    }
}

}  // namespace
}  // namespace tome_test
