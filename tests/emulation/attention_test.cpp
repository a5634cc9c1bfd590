// attention_cuda in the emulator: against plain loops in double precision (attention_oracle.h),
// whatever the strides, the sizes, the order of blocks and threads, and the memory it finds.

#include <algorithm>
#include <string>
#include <tuple>

#include "attention_inputs.h"
#include "attention_oracle.h"
#include "attention_tiles.h"
#include "emulator.h"
#include "helpers.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

using tome::AttentionParams;

using Shape = AttentionShape;

struct Inputs {
    DType dtype;
    Shape shape;
    StridedTensor q, k, v;
    std::vector<float> size;  // empty: none
    double scale;
};

Inputs random_inputs(DType dtype, const Shape& s, Layout layout = Layout::kHeads,
                     unsigned seed = 1) {
    Inputs in{dtype,
              s,
              random_tensor(dtype, s, s.queries, layout, seed),
              random_tensor(dtype, s, s.keys, layout, seed + 100),
              random_tensor(dtype, s, s.keys, layout, seed + 200),
              {},
              s.dim == 0 ? 1.0 : 1.0 / std::sqrt(double(s.dim))};
    for (int64_t i = 0; i < s.batch * s.keys; ++i) in.size.push_back(1.0f + float(i * 7 % 5));
    return in;
}

// Poison before and behind, so that writing there would show.
constexpr int64_t kGuard = 24;

struct Outputs {
    Array out, lse;
    bool operator==(const Outputs&) const = default;
};

Outputs poisoned(const Inputs& in) {
    const Shape& s = in.shape;
    return {Array(in.dtype, s.batch * s.queries * s.heads * s.dim + 2 * kGuard),
            Array(DType::kFloat32, s.batch * s.heads * s.queries + 2 * kGuard)};
}

// `shift` elements from where 16-byte stores would fit.
AttentionParams params_of(const Inputs& in, Outputs& to, int64_t shift = 0) {
    return {inputs_of(in), const_cast<void*>(to.out.at(kGuard - shift)),
            const_cast<void*>(to.lse.at(kGuard))};
}

void expect_guards(const Array& x, int64_t begin, int64_t end) {
    const Array poison(x.dtype(), 1);
    for (int64_t i = 0; i < x.count(); ++i) {
        if (i >= begin && i < end) continue;
        ASSERT_TRUE(x.same(i, poison, 0)) << "wrote element " << i;
    }
}

Outputs on_cuda(const Inputs& in, int64_t shift = 0) {
    Outputs to = poisoned(in);
    const Shape& s = in.shape;
    const int64_t before = tome_emulation::launches();
    const int64_t products_before = tome_emulation::warpgroup_products();
    EXPECT_EQ(tome::attention_cuda(params_of(in, to, shift), nullptr), cudaSuccess)
        << tome_emulation::last_failure();
    EXPECT_EQ(tome_emulation::launches() - before, s.batch * s.heads * s.queries == 0 ? 0 : 1);
    // Hopper's own kernels are the ones that are tested wherever they serve.
    const auto fits = [&](const StridedTensor& t) {
        return tome::attention_tiles::vectors_fit(
            reinterpret_cast<uintptr_t>(t.memory.at(t.index(0, 0, 0, 0))), t.strides.batch,
            t.strides.head, t.strides.token, s.dim, 2);
    };
    const bool hoppers = tome_emulation::options().capability == 90 && s.dim == 64 &&
                         in.dtype != DType::kFloat32 && s.batch * s.heads * s.queries > 0 &&
                         s.keys > 0 && fits(in.q) && fits(in.k) && fits(in.v) && shift % 8 == 0;
    EXPECT_EQ(tome_emulation::warpgroup_products() > products_before, hoppers);
    expect_guards(to.out, kGuard - shift, to.out.count() - kGuard - shift);
    expect_guards(to.lse, kGuard, to.lse.count() - kGuard);
    return to;
}

// Every element within the bound of a plain implementation in the same dtype.
void expect_exact_enough(const Inputs& in, int64_t shift = 0) {
    const Outputs got = on_cuda(in, shift);
    Outputs unused = poisoned(in);
    const AttentionOracle want = attention_oracle(params_of(in, unused));
    for (size_t i = 0; i < want.out.size(); ++i) {
        ASSERT_NEAR(got.out[kGuard - shift + int64_t(i)], want.out[i], want.out_error[i])
            << "out " << i;
    }
    for (size_t i = 0; i < want.lse.size(); ++i) {
        ASSERT_NEAR(got.lse[kGuard + int64_t(i)], want.lse[i], want.lse_error[i]) << "lse " << i;
    }
}

const std::vector<DType> kCudaDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// On a chip of compute capability 8.0, and on Hopper, whose kernels are its own.
tome_emulation::Options on_chip(int capability) {
    tome_emulation::Options options = tome_emulation::options();
    options.capability = capability;
    return options;
}

// The same chip, in another order.
tome_emulation::Options in_order(uint32_t seed, int multiprocessors) {
    tome_emulation::Options options = tome_emulation::options();
    options.seed = seed;
    options.multiprocessors = multiprocessors;
    return options;
}

class CudaAttentionTest : public ::testing::TestWithParam<std::tuple<DType, int>> {
  protected:
    static DType dtype() { return std::get<0>(GetParam()); }

  private:
    tome_emulation::UseOptions chip_{on_chip(std::get<1>(GetParam()))};
};
INSTANTIATE_TEST_SUITE_P(DTypes, CudaAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(kCudaDTypes),
                                            ::testing::Values(80, 90)),
                         [](const auto& info) {
                             return std::string(dtype_name(std::get<0>(info.param))) + "_sm_" +
                                    std::to_string(std::get<1>(info.param));
                         });

TEST_P(CudaAttentionTest, AgreesWithTheOracle) {
    const Shape shapes[] = {
        {1, 2, 197, 197, 64}, {1, 1, 150, 150, 64}, {2, 1, 80, 80, 32},   {1, 2, 50, 50, 80},
        {1, 1, 65, 65, 72},   {2, 2, 17, 16, 96},   {1, 2, 33, 97, 128},  {1, 1, 197, 5, 40},
        {3, 1, 1, 130, 17},   {1, 1, 5, 1, 88},     {1, 1, 130, 64, 1},   {2, 2, 16, 33, 127},
        {1, 1, 1, 1, 64},     {1, 5, 64, 63, 48},   {1, 1, 129, 49, 112}, {1, 2, 16, 257, 64},
        {1, 1, 150, 300, 64}, {2, 1, 20, 256, 64},  {1, 1, 1, 577, 64},   {1, 1, 70, 128, 64},
        {1, 1, 3, 192, 64},
    };
    for (const Shape& s : shapes) {
        SCOPED_TRACE(::testing::Message() << s.batch << "x" << s.heads << "x" << s.queries << "x"
                                          << s.keys << "x" << s.dim);
        for (int multiprocessors : {1, 200}) {  // large tiles, small ones
            if (dtype() == DType::kFloat32 && multiprocessors != 1) continue;  // has one size
            const tome_emulation::UseOptions use(
                in_order(static_cast<uint32_t>(s.keys), multiprocessors));
            expect_exact_enough(random_inputs(dtype(), s));
        }
    }
}

TEST_P(CudaAttentionTest, ReadsAnyStridesInPlace) {
    for (Layout layout : {Layout::kPacked, Layout::kShifted, Layout::kOdd}) {
        for (int64_t dim : {64, 72, 40, 20, 17}) {
            SCOPED_TRACE(::testing::Message() << int(layout) << " dim " << dim);
            expect_exact_enough(random_inputs(dtype(), {2, 2, 37, 70, dim}, layout));
        }
    }
    // Each tensor for itself, a batch that is an expanded view, and an output off alignment.
    const Shape s{2, 2, 20, 40, 64};
    Inputs in = random_inputs(dtype(), s);
    for (StridedTensor* t : {&in.q, &in.k, &in.v}) {
        Inputs other = in;
        StridedTensor& mine = t == &in.q ? other.q : t == &in.k ? other.k : other.v;
        mine = random_tensor(dtype(), s, t == &in.q ? 20 : 40, Layout::kShifted, 5);
        expect_exact_enough(other);
    }
    expect_exact_enough(in, 3);
    in.k.strides.batch = in.v.strides.batch = 0;
    expect_exact_enough(in);
}

TEST_P(CudaAttentionTest, SizesWeighKeysAndHideThem) {
    const Shape s{3, 2, 35, 140, 64};
    Inputs in = random_inputs(dtype(), s);
    const auto with_sizes = [&](auto size_of) {
        in.size.clear();
        for (int64_t b = 0; b < s.batch; ++b) {
            for (int64_t n = 0; n < s.keys; ++n) in.size.push_back(size_of(b, n));
        }
    };
    in.size.clear();
    const Outputs none = on_cuda(in);
    expect_exact_enough(in);
    with_sizes([](int64_t, int64_t) { return 1.0f; });
    EXPECT_EQ(on_cuda(in), none) << "sizes of 1 are no sizes, to the bit";
    with_sizes([](int64_t b, int64_t n) { return n % (b + 2) == 0 ? 0.0f : 2.5f; });
    expect_exact_enough(in);
    with_sizes([](int64_t b, int64_t n) { return b == 1 || n < 100 ? 0.0f : 1.0f; });
    expect_exact_enough(in);  // a whole image, and whole tiles at the beginning
    with_sizes([](int64_t, int64_t n) { return n < 30 ? 1.0f : 0.0f; });
    expect_exact_enough(in);  // and at the end
    with_sizes([](int64_t, int64_t n) { return n == 77 ? 1e6f : n == 3 ? 1e-20f : 1.0f; });
    expect_exact_enough(in);
    with_sizes([](int64_t, int64_t n) { return n == 77 ? 3e38f : 1e-45f; });
    expect_exact_enough(in);
}

TEST_P(CudaAttentionTest, RowsWithoutVisibleKeysAreZero) {
    for (int64_t keys : {0, 40}) {
        Inputs in = random_inputs(dtype(), {2, 2, 21, keys, 64});
        std::fill(in.size.begin(), in.size.end(), 0.0f);
        const Outputs got = on_cuda(in);
        for (int64_t i = kGuard; i < got.out.count() - kGuard; ++i) ASSERT_EQ(got.out[i], 0.0);
        for (int64_t i = kGuard; i < got.lse.count() - kGuard; ++i) ASSERT_EQ(got.lse[i], 0.0);
    }
}

TEST_P(CudaAttentionTest, AnyScale) {
    for (double scale : {-0.125, 0.0, 3.0}) {
        Inputs in = random_inputs(dtype(), {1, 2, 35, 70, 64});
        in.scale = scale;
        expect_exact_enough(in);
    }
}

// Logits that rise along the keys, slowly and in leaps: maxima are overtaken time and again.
TEST_P(CudaAttentionTest, MaximaMayComeLate) {
    for (double leap : {0.02, 0.5, 40.0}) {
        const Shape s{1, 2, 34, 200, 32};
        Inputs in = random_inputs(dtype(), s);
        in.scale = 1.0;
        for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t m = 0; m < s.queries; ++m) in.q.memory.set(in.q.index(0, h, m, 0), 1.0);
            for (int64_t n = 0; n < s.keys; ++n) {
                const int64_t rank = h == 0 ? n : s.keys - n;
                in.k.memory.set(in.k.index(0, h, n, 0), leap * double(rank));
            }
        }
        expect_exact_enough(in);
    }
}

TEST_P(CudaAttentionTest, HugeLogitsDoNotOverflow) {
    const Shape s{1, 1, 20, 90, 64};
    Inputs in = random_inputs(dtype(), s);
    in.scale = 1e4;  // logits of 1e5: each row attends to one key, or to equals
    const Outputs got = on_cuda(in);
    Outputs unused = poisoned(in);
    const AttentionOracle want = attention_oracle(params_of(in, unused));
    for (size_t i = 0; i < want.out.size(); ++i) {
        EXPECT_NEAR(got.out[kGuard + int64_t(i)], want.out[i], 0.05);
    }
    for (size_t i = 0; i < want.lse.size(); ++i) {
        EXPECT_NEAR(got.lse[kGuard + int64_t(i)], want.lse[i], 1e-5 * std::fabs(want.lse[i]));
    }
}

// As on the CPU: NaN in a query stays in its row, NaN in a key or an infinite logit reaches all.
TEST_P(CudaAttentionTest, NaNIsNotTakenForHiddenKeys) {
    const Shape s{1, 1, 8, 40, 16};
    Inputs in = random_inputs(dtype(), s);
    in.q.memory.set(in.q.index(0, 0, 3, 5), kNaN);
    const Outputs got = on_cuda(in);
    for (int64_t i = 0; i < s.queries * s.dim; ++i) {
        EXPECT_EQ(std::isnan(got.out[kGuard + i]), i / s.dim == 3) << i;
    }
    for (int64_t m = 0; m < s.queries; ++m) {
        EXPECT_EQ(std::isnan(got.lse[kGuard + m]), m == 3) << m;
    }
    in = random_inputs(dtype(), s);
    in.k.memory.set(in.k.index(0, 0, 7, 0), kNaN);
    const Outputs all = on_cuda(in);
    for (int64_t i = 0; i < s.queries * s.dim; ++i) EXPECT_TRUE(std::isnan(all.out[kGuard + i]));
}

// In every head size there is a kernel for; in one tile, several, and as many as pass in stages.
TEST_P(CudaAttentionTest, WhatHiddenTokensHoldChangesNothing) {
    for (int64_t dim : {32, 64, 72, 80, 96, 128, 17}) {
        for (int64_t keys : {1, 45, 200, 300}) {
            if (keys == 300 && dim != 64) continue;
            if (keys == 200 && dim != 64 && dtype() == DType::kFloat32) continue;  // slow
            for (Layout layout : {Layout::kPacked, Layout::kOdd}) {
                if (layout == Layout::kOdd && (dim != 64 || keys > 200)) continue;
                const int64_t heads = keys == 45 ? 2 : 1, queries = keys == 200 ? 70 : 18;
                const Shape s{3, heads, queries, keys, dim};
                SCOPED_TRACE(::testing::Message()
                             << ::testing::PrintToString(s) << " layout " << int(layout));
                Inputs in = random_inputs(dtype(), s, layout);
                in.size = sizes_to_spoil(s);
                const tome_emulation::UseOptions use(
                    in_order(static_cast<uint32_t>(keys), layout == Layout::kOdd ? 200 : 1));
                const Outputs want = on_cuda(in);
                spoil_hidden(in);
                EXPECT_EQ(on_cuda(in), want);
                expect_exact_enough(in);
            }
        }
    }
}

TEST_P(CudaAttentionTest, DegenerateShapes) {
    for (int64_t batch : {0, 1}) {
        for (int64_t heads : {0, 2}) {
            for (int64_t queries : {0, 3}) {
                for (int64_t keys : {0, 4}) {
                    for (int64_t dim : {0, 8}) {
                        Inputs in = random_inputs(dtype(), {batch, heads, queries, keys, dim});
                        expect_exact_enough(in);
                        if (dim == 0) {
                            in.q.strides = in.k.strides = in.v.strides = {0, 0, 0};
                            expect_exact_enough(in);
                        }
                    }
                }
            }
        }
    }
}

TEST_P(CudaAttentionTest, TheSameBitsInAnyOrder) {
    const Inputs in = random_inputs(dtype(), {2, 2, 150, 90, 64}, Layout::kPacked);
    const tome_emulation::UseOptions first(in_order(1, 1));
    const Outputs want = on_cuda(in);
    for (uint32_t seed = 2; seed < 5; ++seed) {
        const tome_emulation::UseOptions use(
            in_order(seed, seed == 3 ? 500 : 1));  // and in smaller tiles
        EXPECT_EQ(on_cuda(in), want);
    }
}

TEST(CudaAttention, RefusesWhatItHasNoKernelFor) {
    for (const auto& [dtype, dim] :
         {std::pair{DType::kFloat64, 64}, {DType::kFloat32, 129}, {DType::kBFloat16, 129}}) {
        const Inputs in = random_inputs(dtype, {1, 1, 2, 2, dim});
        Outputs to = poisoned(in);
        EXPECT_EQ(tome::attention_cuda(params_of(in, to), nullptr), cudaErrorInvalidValue);
    }
}

// The error over many outputs, not the worst case alone: at most that of the plain formulation in
// the same dtype, with float32 logits and sums and the weights rounded before they meet v, times a
// tenth more. So nothing is rounded a second time on the way.
TEST_P(CudaAttentionTest, AsExactAsThePlainFormulation) {
    const Shape s{1, 2, 64, 197, 64};
    const Inputs in = random_inputs(dtype(), s);
    const Outputs got = on_cuda(in);
    Outputs unused = poisoned(in);
    const AttentionParams p = params_of(in, unused);
    const AttentionOracle want = attention_oracle(p);
    double square = 0, plain_square = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t m = 0; m < s.queries; ++m) {
                std::vector<float> logits(static_cast<size_t>(s.keys));
                float top = -INFINITY, sum = 0;
                for (int64_t n = 0; n < s.keys; ++n) {
                    float logit = 0;
                    for (int64_t d = 0; d < s.dim; ++d) {
                        logit += float(in.q.memory[in.q.index(b, h, m, d)]) *
                                 float(in.k.memory[in.k.index(b, h, n, d)]);
                    }
                    const float weight = in.size[size_t(b * s.keys + n)];
                    logits[size_t(n)] = logit * float(in.scale) + std::log(weight);
                    top = std::max(top, logits[size_t(n)]);
                }
                Array weights(in.dtype, s.keys);
                for (int64_t n = 0; n < s.keys; ++n) {
                    const float weight = std::exp(logits[size_t(n)] - top);
                    weights.set(n, weight);
                    sum += weight;
                }
                for (int64_t d = 0; d < s.dim; ++d) {
                    float total = 0;
                    for (int64_t n = 0; n < s.keys; ++n) {
                        total += float(weights[n]) * float(in.v.memory[in.v.index(b, h, n, d)]);
                    }
                    Array rounded(in.dtype, 1);
                    rounded.set(0, total / sum);
                    const int64_t at = ((b * s.queries + m) * s.heads + h) * s.dim + d;
                    const double exact = want.out[size_t(at)];
                    square += std::pow(got.out[kGuard + at] - exact, 2);
                    plain_square += std::pow(rounded[0] - exact, 2);
                }
            }
        }
    }
    EXPECT_LE(std::sqrt(square), 1.1 * std::sqrt(plain_square));
}

}  // namespace
}  // namespace tome_test
