// attention(), attention_backward() and cls_attention() on the CPU: against plain loops in double
// precision (attention_oracle.h), for every instruction set, layout and kind of sizes.

#include <algorithm>
#include <cstdio>

#include "amx_kernels.h"
#include "attention_inputs.h"
#include "attention_oracle.h"
#include "tuning.h"

namespace tome_test {
namespace {

// float64 accumulates in float64, everything else in float32.
DType sums_of(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

struct Problem {
    DType dtype;
    AttentionShape shape;
    StridedTensor q, k, v, grad;
    std::vector<float> size;
    double scale;

    Problem(DType type, const AttentionShape& s, Layout layout = Layout::kPacked,
            Sizes sizes = Sizes::kSome)
        : dtype(type),
          shape(s),
          q(random_tensor(type, s, s.queries, layout, 1)),
          k(random_tensor(type, s, s.keys, layout, 2)),
          v(random_tensor(type, s, s.keys, layout, 3)),
          grad(random_tensor(type, s, s.queries, layout, 4)),
          size(random_sizes(s, sizes, 5)),
          scale(s.dim == 0 ? 1.0 : 1.0 / std::sqrt(double(s.dim))) {}

    const float* sizes() const { return size.empty() ? nullptr : size.data(); }
};

struct Outputs {
    Array out, lse;
    bool operator==(const Outputs&) const = default;
};

tome::AttentionParams params_of(const Problem& x, Outputs& to) {
    return {inputs_of(x), to.out.data(), to.lse.data()};
}

Outputs run(const Problem& x, const Threads& threads) {
    const AttentionShape& s = x.shape;
    Outputs to{Array(x.dtype, s.batch * s.queries * s.heads * s.dim),
               Array(sums_of(x.dtype), s.batch * s.heads * s.queries)};
    tome::attention(params_of(x, to), threads);
    return to;
}

void expect_exact_enough(const Problem& x) {
    Outputs got = run(x, pool());
    const AttentionOracle want = attention_oracle(params_of(x, got));
    for (size_t i = 0; i < want.out.size(); ++i) {
        ASSERT_NEAR(got.out[int64_t(i)], want.out[i], want.out_error[i]) << "out " << i;
    }
    for (size_t i = 0; i < want.lse.size(); ++i) {
        ASSERT_NEAR(got.lse[int64_t(i)], want.lse[i], want.lse_error[i]) << "lse " << i;
    }
}

struct Gradients {
    Array q, k, v;
    bool operator==(const Gradients&) const = default;
};

tome::AttentionBackwardParams backward_params_of(const Problem& x, const Outputs& forward,
                                                 Gradients& to) {
    return {inputs_of(x),       x.grad.data(), x.grad.strides, forward.out.data(),
            forward.lse.data(), to.q.data(),   to.k.data(),    to.v.data()};
}

Gradients run_backward(const Problem& x, const Outputs& forward, const Threads& threads) {
    const AttentionShape& s = x.shape;
    const int64_t keys = s.batch * s.keys * s.heads * s.dim;
    Gradients to{Array(x.dtype, s.batch * s.queries * s.heads * s.dim), Array(x.dtype, keys),
                 Array(x.dtype, keys)};
    tome::attention_backward(backward_params_of(x, forward, to), threads);
    return to;
}

// Every term of a gradient carries the roundings of its factors: of `out` in dtype, of logits and
// lse in the type of sums, and of the sum over queries or keys itself; the result is rounded once.
void expect_exact_gradients(const Problem& x) {
    Outputs forward = run(x, pool());
    Gradients got = run_backward(x, forward, pool());
    const AttentionGradients want = attention_backward_oracle(backward_params_of(x, forward, got));
    const double rounding = roundoff_of(x.dtype), unit = roundoff_of(sums_of(x.dtype));
    const AttentionShape& s = x.shape;
    const double per_term = rounding + 4 * logit_error(x.dtype, want.largest_logit, s.dim) +
                            4 * double(s.queries + s.keys + s.dim + 16) * unit;
    const auto check = [&](const char* name, const Array& values, const Doubles& exact,
                           const Doubles& sizes) {
        for (size_t i = 0; i < exact.size(); ++i) {
            const double error = sizes[i] * per_term + std::fabs(exact[i]) * rounding + 1e-30 +
                                 (x.dtype == DType::kFloat16 ? std::ldexp(1.0, -24) : 0.0);
            ASSERT_NEAR(values[int64_t(i)], exact[i], error) << name << " " << i;
        }
    };
    check("grad_q", got.q, want.grad_q, want.sizes_q);
    check("grad_k", got.k, want.grad_k, want.sizes_k);
    check("grad_v", got.v, want.grad_v, want.sizes_v);
}

tome::ClsAttentionParams cls_params_of(const Problem& x, Array& to) {
    const AttentionShape& s = x.shape;
    return {x.q.data(),        x.k.data(),       x.dtype,     s.batch,   s.heads, s.keys,   s.dim,
            x.q.strides.batch, x.q.strides.head, x.k.strides, x.sizes(), x.scale, to.data()};
}

Array run_cls(const Problem& x, const Threads& threads) {
    Array to(sums_of(x.dtype), x.shape.batch * x.shape.keys);
    tome::cls_attention(cls_params_of(x, to), threads);
    return to;
}

void expect_exact_cls(const Problem& x) {
    Array got = run_cls(x, pool());
    const ClsAttentionOracle want = cls_attention_oracle(cls_params_of(x, got));
    for (size_t i = 0; i < want.out.size(); ++i) {
        ASSERT_NEAR(got[int64_t(i)], want.out[i], want.error[i]) << "key " << i;
    }
}

void expect_all_exact(const Problem& x) {
    SCOPED_TRACE(::testing::PrintToString(x.shape));
    expect_exact_enough(x);
    expect_exact_gradients(x);
    if (x.shape.heads > 0 && x.shape.queries > 0) expect_exact_cls(x);
}

// For every instruction set of this machine; those for matrix units also where it lacks them, from
// the plain bodies of their instructions and, where a handler can run them, from the instructions.
template <class F>
void for_each_set(DType dtype, const F& body) {
    for_each_isa(body);
    if (dtype != DType::kBFloat16) return;
    const auto with = [&](const char* name, const tome::Kernels& kernels) {
        SCOPED_TRACE(name);
        tome::use_kernels(&kernels);
        body();
        tome::use_kernels(nullptr);
    };
    with("amx_bf16, plain bodies", kPlainAmxKernels);
#ifdef TOME_HAS_X86_KERNELS
    if (amx_runs_by_signal()) with("amx_bf16, by signal", tome::kAmxBf16Kernels);
#endif
}

TEST(Isa, AttentionIsTestedInTheFastestOfThisMachine) {
    const std::vector<Isa> sets = isas();
    std::printf("instruction sets:");
    for (Isa isa : sets) std::printf(" %s", tome::isa_name(isa));
    std::printf("; amx_bf16 by plain bodies%s\n", amx_runs_by_signal() ? " and by signal" : "");
    EXPECT_NE(std::find(sets.begin(), sets.end(), tome::best_isa()), sets.end());
    const bool has_tiles = sets.back() == Isa::kAmxBf16;
    EXPECT_EQ(tome::best_isa() == Isa::kAmxBf16, has_tiles);
}

class AttentionTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, AttentionTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

TEST_P(AttentionTest, AgreesWithTheOracle) {
    const AttentionShape shapes[] = {
        {2, 3, 50, 50, 64}, {1, 2, 197, 197, 64}, {1, 1, 5, 70, 72}, {2, 1, 97, 33, 17},
        {1, 2, 1, 40, 96},  {3, 1, 40, 1, 8},     {1, 1, 13, 16, 1}, {1, 1, 30, 31, 128},
    };
    for_each_set(GetParam(), [&] {
        for (const AttentionShape& s : shapes) expect_all_exact(Problem(GetParam(), s));
    });
}

TEST_P(AttentionTest, ReadsAnyLayoutInPlace) {
    for_each_set(GetParam(), [&] {
        for (Layout layout : kLayouts) {
            expect_all_exact(Problem(GetParam(), {2, 2, 20, 37, 24}, layout));
            expect_all_exact(Problem(GetParam(), {2, 2, 20, 37, 19}, layout));
        }
    });
}

TEST_P(AttentionTest, SizesWeighKeysAndHideThem) {
    for_each_set(GetParam(), [&] {
        for (Sizes sizes : kSizes) {
            expect_all_exact(Problem(GetParam(), {2, 2, 19, 45, 32}, Layout::kHeads, sizes));
        }
    });
}

TEST_P(AttentionTest, SizesOfOneAreNoSizes) {
    const AttentionShape s{1, 2, 23, 45, 32};
    const Problem none(GetParam(), s, Layout::kHeads, Sizes::kNone);
    const Problem ones(GetParam(), s, Layout::kHeads, Sizes::kOnes);
    EXPECT_EQ(run(none, pool()), run(ones, pool()));
}

TEST_P(AttentionTest, HiddenKeysGetAndGiveNothing) {
    Problem x(GetParam(), {1, 2, 9, 20, 16}, Layout::kHeads, Sizes::kNone);
    Problem shorter = x;
    shorter.shape.keys = 16;  // the same strides: the last four keys are not there
    x.size.assign(20, 1.0f);
    std::fill(x.size.begin() + 16, x.size.end(), 0.0f);
    const Outputs hidden = run(x, pool()), absent = run(shorter, pool());
    EXPECT_EQ(hidden, absent);
    const Gradients grads = run_backward(x, hidden, pool());
    for (int64_t i = 16 * 2 * 16; i < grads.k.count(); ++i) {
        ASSERT_EQ(grads.k[i], 0.0);
        ASSERT_EQ(grads.v[i], 0.0);
    }
}

// More keys than a block holds, so that maxima and sums are carried; and more queries than a part.
TEST_P(AttentionTest, ManyKeys) {
    const int64_t most = tome::tuning::kMaxBlockKeys;
    for_each_set(GetParam(), [&] {
        expect_exact_enough(Problem(GetParam(), {1, 1, 30, most + 1, 16}));
        expect_exact_enough(Problem(GetParam(), {1, 1, 30, 3 * most - 5, 8}));
        Problem rising(GetParam(), {1, 1, 20, 2 * most, 4}, Layout::kHeads, Sizes::kNone);
        rising.scale = 1.0;
        for (int64_t n = 0; n < rising.shape.keys; ++n) {
            for (int64_t d = 0; d < 4; ++d) {  // maxima are overtaken in every block
                rising.k.memory.set(rising.k.index(0, 0, n, d), d == 0 ? double(n) / 64 : 0.0);
            }
        }
        expect_exact_enough(rising);
        Problem late(GetParam(), {1, 1, 20, 2 * most, 4}, Layout::kHeads, Sizes::kOnes);
        std::fill(late.size.begin(), late.size.end() - 3, 0.0f);
        expect_exact_enough(late);  // whole blocks hidden before the first key that is seen
    });
}

TEST_P(AttentionTest, AnyScale) {
    for (double scale : {-0.2, 0.0, 2.0}) {
        Problem x(GetParam(), {1, 2, 21, 40, 16});
        x.scale = scale;
        expect_all_exact(x);
    }
}

TEST_P(AttentionTest, HugeLogitsDoNotOverflow) {
    Problem x(GetParam(), {1, 1, 20, 90, 64}, Layout::kHeads);
    x.scale = 1e4;  // logits of 1e5: each row attends to one key
    const Outputs got = run(x, pool());
    for (int64_t i = 0; i < got.out.count(); ++i) ASSERT_TRUE(std::isfinite(got.out[i]));
}

TEST_P(AttentionTest, NaNStaysInItsRowOrReachesAll) {
    Problem x(GetParam(), {1, 1, 8, 20, 16}, Layout::kHeads, Sizes::kNone);
    x.q.memory.set(x.q.index(0, 0, 3, 5), kNaN);
    for_each_set(GetParam(), [&] {
        const Outputs got = run(x, pool());
        for (int64_t i = 0; i < got.out.count(); ++i) {
            EXPECT_EQ(std::isnan(got.out[i]), i / 16 == 3) << i;
        }
        Problem key = x;
        key.k.memory.set(key.k.index(0, 0, 7, 0), kNaN);
        const Outputs all = run(key, pool());
        for (int64_t i = 0; i < all.out.count(); ++i) EXPECT_TRUE(std::isnan(all.out[i])) << i;
    });
}

// Padding that was never written. Also of all keys of an image, and of whole blocks of keys.
TEST_P(AttentionTest, WhatHiddenTokensHoldChangesNothing) {
    const int64_t block = tome::tuning::kMaxBlockKeys;
    for_each_set(GetParam(), [&] {
        for (Sizes sizes : {Sizes::kWithZeros, Sizes::kImageHidden, Sizes::kZeros}) {
            for (const AttentionShape& s :
                 {AttentionShape{2, 2, 19, 45, 17}, AttentionShape{2, 1, 3, block + 30, 8}}) {
                SCOPED_TRACE(::testing::PrintToString(s));
                const Problem clean(GetParam(), s, Layout::kPacked, sizes);
                Problem spoiled = clean;
                spoil_hidden(spoiled);
                const Outputs want = run(clean, pool());
                EXPECT_EQ(run(spoiled, pool()), want);
                EXPECT_EQ(run_backward(spoiled, want, pool()), run_backward(clean, want, pool()));
                EXPECT_EQ(run_cls(spoiled, pool()), run_cls(clean, pool()));
            }
        }
    });
}

// However many queries a kernel takes at a time: those that are not there give no gradient.
TEST_P(AttentionTest, AKeyThatIsInfinitelyFarHasNoGradient) {
    for_each_set(GetParam(), [&] {
        for (int64_t queries : {5, 31, 32}) {
            Problem x(GetParam(), {1, 1, queries, 20, 16}, Layout::kHeads, Sizes::kNone);
            for (int64_t i = 0; i < queries * 16; ++i) x.q.memory.set(i, 1.0);
            x.k.memory.set(x.k.index(0, 0, 3, 0), -kInf);
            const Gradients grads = run_backward(x, run(x, pool()), pool());
            for (int64_t d = 0; d < 16; ++d) {
                ASSERT_EQ(grads.k[3 * 16 + d], 0.0) << queries;
                ASSERT_EQ(grads.v[3 * 16 + d], 0.0) << queries;
            }
        }
    });
}

TEST_P(AttentionTest, DegenerateShapes) {
    for (int64_t batch : {0, 1}) {
        for (int64_t heads : {0, 2}) {
            for (int64_t queries : {0, 3}) {
                for (int64_t keys : {0, 4}) {
                    for (int64_t dim : {0, 8}) {
                        expect_all_exact(Problem(GetParam(), {batch, heads, queries, keys, dim}));
                    }
                }
            }
        }
    }
}

TEST_P(AttentionTest, TheSameBitsForAnyThreadsAndBatch) {
    for_each_set(GetParam(), [&] {
        const Problem x(GetParam(), {1, 2, 140, 60, 32});
        const Outputs want = run(x, Threads::serial());
        const Gradients want_grads = run_backward(x, want, Threads::serial());
        const Array want_cls = run_cls(x, Threads::serial());
        for (int count : {2, 3, 8}) {
            tome::ThreadPool threads(count);
            EXPECT_EQ(run(x, threads.threads()), want) << count;
            EXPECT_EQ(run_backward(x, want, threads.threads()), want_grads) << count;
            EXPECT_EQ(run_cls(x, threads.threads()), want_cls) << count;
        }
    });
}

TEST(AttentionTuning, BlocksHoldWholePanelsAndAllKeys) {
    for (int64_t panel : {8, 16, 32}) {
        for (int64_t dim : {0, 1, 64, 128, 5000}) {
            for (int64_t keys : {0, 1, 197, 577, 1024, 1025, 4096, 100000}) {
                const int64_t block = tome::tuning::keys_per_block(keys, dim, 4, panel);
                EXPECT_GE(block, panel);
                EXPECT_EQ(block % panel, 0);
                EXPECT_LE(block, tome::tuning::kMaxBlockKeys + panel);
            }
        }
    }
    EXPECT_GE(tome::tuning::keys_per_block(197, 64, 4, 16), 197);  // ViT-B: one block
}

TEST(AttentionTuning, QueriesAreSplitWhereHeadsDoNotFillTheThreads) {
    EXPECT_EQ(tome::tuning::query_parts(96, 2, 197), 1);
    EXPECT_EQ(tome::tuning::query_parts(12, 2, 197), 1);
    EXPECT_GT(tome::tuning::query_parts(3, 2, 577), 1);
    EXPECT_GT(tome::tuning::query_parts(1, 8, 4096), 7);
    EXPECT_EQ(tome::tuning::query_parts(3, 2, 10), 1);  // too few to be worth it
    EXPECT_EQ(tome::tuning::query_parts(3, 1, 4096), 1);
    EXPECT_EQ(tome::tuning::query_parts(0, 4, 100), 1);
}

}  // namespace
}  // namespace tome_test
