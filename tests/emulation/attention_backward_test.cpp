// attention_backward_cuda in the emulator, against plain loops in double precision: any layout of
// its inputs, any order of blocks and threads, whatever the memory it finds.

#include <algorithm>
#include <string>

#include "attention_inputs.h"
#include "attention_oracle.h"
#include "attention_tiles.h"
#include "emulator.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

namespace tiles = tome::attention_tiles;

using Shape = AttentionShape;

// The gradients, each between bands that must stay as they are.
struct Gradients {
    static constexpr int64_t kBand = 1024;
    int64_t shift;  // elements by which all three are off the alignment of their memory
    Array q, k, v;

    Gradients(DType dtype, const Shape& s, int64_t by = 0)
        : shift(by),
          q(dtype, s.batch * s.queries * s.heads * s.dim + 2 * kBand + by),
          k(dtype, s.batch * s.keys * s.heads * s.dim + 2 * kBand + by),
          v(k) {}

    int64_t begin() const { return kBand + shift; }
    double of(const Array& x, size_t i) const { return x[begin() + int64_t(i)]; }
    bool operator==(const Gradients& other) const {
        return q == other.q && k == other.k && v == other.v;
    }
    void expect_bands_untouched() const {
        for (const Array* x : {&q, &k, &v}) {
            const Array poison(x->dtype(), 1);
            for (int64_t i = 0; i < x->count(); ++i) {
                if (i == begin()) i = x->count() - kBand;
                ASSERT_TRUE(x->same(i, poison, 0)) << "element " << i - begin();
            }
        }
    }
};

struct Problem {
    DType dtype;
    Shape shape;
    StridedTensor q, k, v, grad;
    std::vector<float> size;
    double scale;
    Array out{DType::kFloat32, 0};  // (batch, queries, heads, dim), rounded
    std::vector<float> lse = {};
    int64_t out_shift = 0;  // elements by which `out` and the gradients are off their alignment
};

tome::AttentionBackwardParams params_of(const Problem& x, Gradients& g) {
    return {inputs_of(x),
            x.grad.data(),
            x.grad.strides,
            x.out.at(x.out_shift),
            x.lse.data(),
            const_cast<void*>(g.q.at(g.begin())),
            const_cast<void*>(g.k.at(g.begin())),
            const_cast<void*>(g.v.at(g.begin()))};
}

// What the forward would give to the backward: the exact results, rounded.
void run_forward(Problem& x) {
    const AttentionOracle exact = attention_oracle({inputs_of(x), nullptr, nullptr});
    x.out = Array(x.dtype, static_cast<int64_t>(exact.out.size()) + x.out_shift);
    for (size_t i = 0; i < exact.out.size(); ++i) {
        x.out.set(int64_t(i) + x.out_shift, exact.out[i]);
    }
    x.lse.assign(exact.lse.begin(), exact.lse.end());
}

Problem random_problem(DType dtype, const Shape& s, Sizes sizes = Sizes::kSome, double scale = 0,
                       Layout layout = Layout::kHeads, Layout grad_layout = Layout::kTokens) {
    Problem x{dtype,
              s,
              random_tensor(dtype, s, s.queries, layout, 1),
              random_tensor(dtype, s, s.keys, layout, 2),
              random_tensor(dtype, s, s.keys, layout, 3),
              random_tensor(dtype, s, s.queries, grad_layout, 4),
              random_sizes(s, sizes, 5),
              scale == 0 ? 1 / std::sqrt(double(std::max<int64_t>(s.dim, 1))) : scale};
    x.out_shift = layout == Layout::kOdd ? 1 : 0;
    run_forward(x);
    return x;
}

// In a workspace of exactly the size asked for, full of what another kernel may have left.
Gradients on_cuda(const Problem& x, unsigned char left = 0xA5) {
    Gradients g(x.dtype, x.shape, x.out_shift);
    const tome::AttentionBackwardParams params = params_of(x, g);
    std::vector<unsigned char> workspace(tome::attention_backward_cuda_workspace_bytes(params),
                                         left);
    EXPECT_EQ(tome::attention_backward_cuda(params, workspace.data(), nullptr), cudaSuccess)
        << tome_emulation::last_failure();
    g.expect_bands_untouched();
    return g;
}

// With u = 2^-24 and r the rounding of the dtype, and relative to the sum of the sizes of its
// terms, each of the sums may be wrong by
//   r            rounding of p, or of ds, before the product
//   r            that of `out`, from which delta comes (|grad| |out| <= sum of p |grad| |v|)
//   logit_error  relative error of p: logits and lse (at most the largest logit + log keys)
//   u * terms    float32 sums: over dim twice (dP, delta), over rows; and a few single operations
// and by r of itself, as it is rounded. float16 has subnormals: 2^-25 for every p, ds and result.
// These are worst cases; in the mean over elements errors cancel, and there the limit is `typical`.
// Found were, beside the rounding of the result, at most 0.13 r in 16-bit floats and 23 r in
// float32 (where logits are large), which TF32 would miss by a factor of a hundred.
void expect_close(const Problem& x, const Gradients& got) {
    Gradients unused(x.dtype, x.shape);
    Problem y = x;
    const AttentionGradients want = attention_backward_oracle(params_of(y, unused));
    const double u = std::ldexp(1.0, -24), r = roundoff_of(x.dtype);
    const double least = x.dtype == DType::kFloat16 ? std::ldexp(1.0, -25) : 1e-37;
    const Shape& s = x.shape;
    const double logits = 2 * want.largest_logit + std::log(double(s.keys) + 1);
    const auto terms = double(std::max(s.queries, s.keys) + 2 * s.dim + 32);
    const double relative = 2 * r + logit_error(x.dtype, logits, s.dim) + terms * u;
    const double typical = x.dtype == DType::kFloat32 ? 64 : 0.25;
    const double largest = 6;  // of the inputs: normally distributed
    const auto expect = [&](const char* name, const Array& array, const Doubles& exact,
                            const Doubles& sizes, int64_t count, double factor) {
        const double lost = least * (1 + double(count) * largest * factor);
        double worst = 0, square = 0, square_exact = 0, square_sizes = 0;
        size_t where = 0;
        for (size_t i = 0; i < exact.size(); ++i) {
            const double bound = relative * sizes[i] + r * std::fabs(exact[i]) + lost;
            const double error = std::fabs(got.of(array, i) - exact[i]);
            if (!(error / bound <= worst)) worst = error / bound, where = i;  // NaN is worst of all
            if (std::isnan(error)) break;
            square += error * error;
            square_exact += exact[i] * exact[i];
            square_sizes += sizes[i] * sizes[i];
        }
        EXPECT_LE(worst, 1.0) << name << " at " << where << " of " << exact.size() << ": "
                              << (exact.empty() ? 0 : got.of(array, where)) << " instead of "
                              << (exact.empty() ? 0 : exact[where]);
        const auto count_all = static_cast<double>(exact.size());
        EXPECT_LE(std::sqrt(square), r * std::sqrt(square_exact) +
                                         typical * r * std::sqrt(square_sizes) +
                                         lost * std::sqrt(count_all))
            << name;
    };
    const double factor = std::fabs(x.scale);
    expect("grad_q", got.q, want.grad_q, want.sizes_q, s.keys, factor);
    expect("grad_k", got.k, want.grad_k, want.sizes_k, s.queries, factor);
    expect("grad_v", got.v, want.grad_v, want.sizes_v, s.queries, 1);
}

void expect_right(const Problem& x) {
    SCOPED_TRACE(::testing::Message()
                 << x.shape.batch << " x " << x.shape.heads << ": " << x.shape.queries
                 << " queries, " << x.shape.keys << " keys, dim " << x.shape.dim);
    expect_close(x, on_cuda(x));
}

constexpr int kHopperShared = 227 * 1024, kAdaShared = 99 * 1024, kTuringShared = 64 * 1024;

class CudaAttentionBackwardTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, CudaAttentionBackwardTest,
                         ::testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                         [](const auto& info) { return dtype_name(info.param); });

TEST_P(CudaAttentionBackwardTest, AgreesWithOracleInEveryDim) {
    const std::pair<int64_t, int64_t> lengths[] = {{1, 131}, {50, 5}, {16, 80}, {131, 50},
                                                   {5, 16},  {80, 1}, {33, 64}};
    const Sizes sizes[] = {Sizes::kNone, Sizes::kSome, Sizes::kWithZeros};
    size_t turn = 0;
    for (int64_t dim : {17, 32, 64, 72, 80, 96, 128}) {
        for (int i = 0; i < 3; ++i, ++turn) {
            const auto [queries, keys] = lengths[turn % std::size(lengths)];
            expect_right(random_problem(GetParam(), {1, 2, queries, keys, dim}, sizes[i]));
        }
    }
}

TEST_P(CudaAttentionBackwardTest, AgreesWithOracleInEveryLength) {
    size_t turn = 0;
    for (int64_t queries : {1, 5, 16, 50, 80, 131}) {
        for (int64_t keys : {1, 5, 16, 50, 80, 131}) {
            const Sizes sizes = turn++ % 2 ? Sizes::kWithZeros : Sizes::kSome;
            expect_right(random_problem(GetParam(), {2, 1, queries, keys, 20}, sizes));
        }
    }
}

TEST_P(CudaAttentionBackwardTest, ReadsAnyStridesInPlace) {
    struct Case {
        Layout layout, grad;
        int64_t dim;
    };
    for (const auto& [layout, grad, dim] :
         {Case{Layout::kHeads, Layout::kHeads, 40}, Case{Layout::kTokens, Layout::kPacked, 32},
          Case{Layout::kPacked, Layout::kTokens, 40}, Case{Layout::kPacked, Layout::kOdd, 40},
          Case{Layout::kOdd, Layout::kTokens, 40}, Case{Layout::kPacked, Layout::kTokens, 7}}) {
        SCOPED_TRACE(::testing::Message() << int(layout) << ", grad " << int(grad));
        expect_right(
            random_problem(GetParam(), {2, 3, 21, 37, dim}, Sizes::kSome, 0, layout, grad));
    }
}

TEST_P(CudaAttentionBackwardTest, ExpandedTensorsHaveStrideZero) {
    const Shape s{2, 3, 20, 18, 16};
    Problem x = random_problem(GetParam(), s);
    x.k.strides.head = x.v.strides.head = 0;
    x.q.strides.batch = x.grad.strides.token = 0;
    run_forward(x);
    expect_right(x);
}

TEST_P(CudaAttentionBackwardTest, TakesAnyScale) {
    for (double scale : {-0.3, 1e-4, 1.5}) {
        SCOPED_TRACE(scale);
        expect_right(random_problem(GetParam(), {1, 2, 35, 40, 24}, Sizes::kSome, scale));
    }
}

// Sizes beyond what float16 can hold: what lies past the last query must not meet them.
TEST_P(CudaAttentionBackwardTest, TakesHugeSizes) {
    expect_right(random_problem(GetParam(), {1, 2, 19, 40, 24}, Sizes::kHuge));
}

void expect_hidden_keys_have_zero_gradients(DType dtype, const Shape& s) {
    Problem x = random_problem(dtype, s, Sizes::kWithZeros);
    // In image 1 all keys of a tile but one.
    for (int64_t n = 16; n < 31; ++n) x.size[size_t(s.keys + n)] = 0;
    run_forward(x);
    const Gradients got = on_cuda(x);
    expect_close(x, got);
    const int64_t row = s.heads * s.dim;
    for (int64_t i = 0; i < s.batch * s.keys * row; ++i) {
        if (x.size[size_t(i / row)] != 0) continue;
        EXPECT_EQ(got.of(got.k, size_t(i)), 0) << i;
        EXPECT_EQ(got.of(got.v, size_t(i)), 0) << i;
    }
}

TEST_P(CudaAttentionBackwardTest, HiddenKeysHaveZeroGradients) {
    expect_hidden_keys_have_zero_gradients(GetParam(), {2, 2, 37, 50, 32});
}

void expect_hidden_keys_change_nothing(DType dtype, const Shape& s, Layout layout) {
    SCOPED_TRACE(::testing::Message() << ::testing::PrintToString(s) << " layout " << int(layout));
    Problem x = random_problem(dtype, s, Sizes::kSome, 0, layout);
    x.size = sizes_to_spoil(s);
    run_forward(x);
    const Gradients want = on_cuda(x);
    spoil_hidden(x);
    const Gradients got = on_cuda(x);
    EXPECT_EQ(got, want);
    expect_close(x, got);
    const int64_t row = s.heads * s.dim;
    for (int64_t i = 0; i < s.batch * s.keys * row; ++i) {
        if (x.size[size_t(i / row)] != 0) continue;
        ASSERT_EQ(got.of(got.k, size_t(i)), 0) << i;
        ASSERT_EQ(got.of(got.v, size_t(i)), 0) << i;
    }
}

TEST_P(CudaAttentionBackwardTest, WhatHiddenTokensHoldChangesNothing) {
    for (int64_t dim : {32, 64, 72, 80, 96, 128, 17}) {
        for (int64_t keys : {1, 45, 170}) {
            const int64_t heads = keys == 45 ? 2 : 1;
            expect_hidden_keys_change_nothing(GetParam(), {3, heads, 18, keys, dim},
                                              Layout::kPacked);
        }
    }
    expect_hidden_keys_change_nothing(GetParam(), {3, 1, 35, 70, 64}, Layout::kOdd);
}

void expect_all_zero(const Gradients& g) {
    for (const Array* x : {&g.q, &g.k, &g.v}) {
        const int64_t count = x->count() - g.begin() - Gradients::kBand;
        for (int64_t i = 0; i < count; ++i) ASSERT_EQ(g.of(*x, size_t(i)), 0) << i;
    }
}

TEST_P(CudaAttentionBackwardTest, NothingIsLeftWhereAllKeysAreHidden) {
    expect_all_zero(on_cuda(random_problem(GetParam(), {2, 2, 37, 50, 32}, Sizes::kZeros)));
    Problem x = random_problem(GetParam(), {3, 2, 18, 20, 16});  // in one of three images
    std::fill(x.size.begin() + 20, x.size.begin() + 40, 0.0f);
    run_forward(x);
    expect_right(x);
}

TEST_P(CudaAttentionBackwardTest, TakesDegenerateShapes) {
    for (const Shape& s : {Shape{0, 2, 5, 6, 16}, Shape{2, 0, 5, 6, 16}, Shape{2, 2, 0, 6, 16},
                           Shape{2, 2, 5, 0, 16}, Shape{2, 2, 5, 6, 0}, Shape{2, 2, 0, 0, 16}}) {
        SCOPED_TRACE(::testing::Message() << s.batch << " " << s.heads << " " << s.queries << " "
                                          << s.keys << " " << s.dim);
        expect_all_zero(on_cuda(random_problem(GetParam(), s)));
    }
}

TEST_P(CudaAttentionBackwardTest, RefusesWhatItHasNoKernelFor) {
    const Problem x = random_problem(GetParam(), {1, 1, 3, 3, tome::kMaxCudaHeadDim + 1});
    Gradients g(x.dtype, x.shape);
    tome::AttentionBackwardParams params = params_of(x, g);
    float workspace[3];
    EXPECT_EQ(tome::attention_backward_cuda(params, workspace, nullptr), cudaErrorInvalidValue);
    params.dim = 8;
    params.dtype = DType::kFloat64;
    EXPECT_EQ(tome::attention_backward_cuda(params, workspace, nullptr), cudaErrorInvalidValue);
}

// Neither the order, nor the memory, nor how many warps a block has: a row's sums are one warp's.
TEST_P(CudaAttentionBackwardTest, TheSameBitsInAnyOrderAndMemoryOnAnyMachine) {
    struct Machine {
        int multiprocessors, shared;
    };
    for (int64_t dim : {40, 128}) {
        const Problem x = random_problem(GetParam(), {2, 1, 67, 50, dim}, Sizes::kWithZeros);
        const tome_emulation::UseOptions first({1, 1, kHopperShared});
        const Gradients want = on_cuda(x);
        expect_close(x, want);
        uint32_t seed = 2;
        for (const auto& [multiprocessors, shared] :
             {Machine{1, kHopperShared}, Machine{5, kHopperShared}, Machine{200, kHopperShared},
              Machine{1, kAdaShared}, Machine{1, kTuringShared}}) {
            const tome_emulation::UseOptions use({seed, multiprocessors, shared});
            EXPECT_EQ(on_cuda(x, static_cast<unsigned char>(seed * 51)), want)
                << multiprocessors << " multiprocessors, " << shared << " bytes shared";
            ++seed;
        }
    }
}

// Hopper's own kernels take heads of 64 channels at addresses that fit 16 bytes.
class HopperAttentionBackwardTest : public PerDType {
  protected:
    HopperAttentionBackwardTest() {
        EXPECT_EQ(tome_emulation::options().capability, 90);
        before_ = tome_emulation::warpgroup_products();
    }
    ~HopperAttentionBackwardTest() override {
        EXPECT_GT(tome_emulation::warpgroup_products(), before_) << "other kernels were tested";
    }
    static tome_emulation::Options in_order(uint32_t seed, int multiprocessors = 4) {
        return {seed, multiprocessors, kHopperShared, 90};
    }

  private:
    tome_emulation::UseOptions chip_{in_order(0)};
    int64_t before_ = 0;
};
INSTANTIATE_TEST_SUITE_P(DTypes, HopperAttentionBackwardTest,
                         ::testing::Values(DType::kFloat16, DType::kBFloat16),
                         [](const auto& info) { return dtype_name(info.param); });

TEST_P(HopperAttentionBackwardTest, AgreesWithOracleInEveryLength) {
    const Sizes sizes[] = {Sizes::kNone, Sizes::kSome, Sizes::kWithZeros};
    size_t turn = 0;
    for (const auto& [queries, keys] : std::vector<std::pair<int64_t, int64_t>>{{1, 131},
                                                                                {131, 1},
                                                                                {16, 80},
                                                                                {64, 64},
                                                                                {65, 63},
                                                                                {50, 5},
                                                                                {197, 197},
                                                                                {33, 257},
                                                                                {270, 20},
                                                                                {129, 192}}) {
        expect_right(random_problem(GetParam(), {1, 2, queries, keys, 64}, sizes[turn++ % 3]));
    }
}

TEST_P(HopperAttentionBackwardTest, ReadsAnyStridesInPlace) {
    for (const auto& [layout, grad] : {std::pair{Layout::kHeads, Layout::kHeads},
                                       {Layout::kTokens, Layout::kPacked},
                                       {Layout::kPacked, Layout::kTokens},
                                       {Layout::kPacked, Layout::kOdd}}) {
        SCOPED_TRACE(::testing::Message() << int(layout) << ", grad " << int(grad));
        expect_right(random_problem(GetParam(), {2, 3, 21, 77, 64}, Sizes::kSome, 0, layout, grad));
    }
}

TEST_P(HopperAttentionBackwardTest, HiddenKeysHaveZeroGradients) {
    expect_hidden_keys_have_zero_gradients(GetParam(), {2, 2, 37, 90, 64});
    expect_all_zero(on_cuda(random_problem(GetParam(), {2, 2, 37, 50, 64}, Sizes::kZeros)));
}

TEST_P(HopperAttentionBackwardTest, WhatHiddenTokensHoldChangesNothing) {
    for (int64_t keys : {1, 45, 170, 300}) {
        expect_hidden_keys_change_nothing(GetParam(), {3, 1, 70, keys, 64}, Layout::kPacked);
    }
}

TEST_P(HopperAttentionBackwardTest, TheSameBitsInAnyOrderAndMemory) {
    const Problem x = random_problem(GetParam(), {2, 1, 140, 200, 64}, Sizes::kWithZeros);
    const Gradients want = on_cuda(x);
    expect_close(x, want);
    for (uint32_t seed = 1; seed < 5; ++seed) {
        const tome_emulation::UseOptions use(in_order(seed, seed == 3 ? 132 : 1));
        EXPECT_EQ(on_cuda(x, static_cast<unsigned char>(seed * 51)), want) << "seed " << seed;
    }
}

TEST(CudaAttentionBackwardTiles, FitTheMachineAndCoverTheRows) {
    for (int64_t heads : {1, 12, 3072}) {
        for (int64_t rows : {0, 1, 16, 17, 50, 80, 197, 577, 100000}) {
            for (int dim : tiles::kDims) {
                for (int64_t element : {2, 4}) {
                    for (int64_t shared : {kHopperShared, kAdaShared, kTuringShared}) {
                        for (bool of_keys : {false, true}) {
                            SCOPED_TRACE(::testing::Message() << dim << " x " << element);
                            const tiles::BackwardCut cut = tiles::cut_backward(
                                heads, rows, dim, element, of_keys, 132, shared);
                            const int per_warp = tiles::backward_rows(dim, element, of_keys);
                            EXPECT_LE(cut.shared_bytes, shared);
                            EXPECT_GE(cut.warps * per_warp * cut.row_blocks, rows);
                            EXPECT_LT((cut.row_blocks - 1) * cut.warps * per_warp,
                                      std::max<int64_t>(rows, 1));
                            EXPECT_GE(cut.warps * 32, tiles::backward_stage(dim, element))
                                << "a thread per column";
                            EXPECT_LE(cut.warps, tiles::kBackwardWarps);
                        }
                    }
                }
            }
        }
    }
    // ViT-B: 197 tokens are 7 tiles of 32, in two blocks; a single image is spread thinner.
    const auto vit = [](int64_t heads, int64_t rows, bool of_keys) {
        return tiles::cut_backward(heads, rows, 64, 2, of_keys, 132, kHopperShared);
    };
    for (bool of_keys : {false, true}) {
        EXPECT_EQ(vit(3072, 197, of_keys).row_blocks, 2);
        EXPECT_EQ(vit(3072, 80, of_keys).warps, 3);
        EXPECT_EQ(vit(12, 197, of_keys).row_blocks, 4);
        // Two blocks on a multiprocessor of any chip from sm_80 on.
        EXPECT_LE(2 * (vit(3072, 197, of_keys).shared_bytes + 1024), 100 * 1024);
    }
}

}  // namespace
}  // namespace tome_test
