// The kernels at the vector width and tile of AVX-512, on a machine that may lack it: the compiler
// splits each 64-byte vector into what the machine has. Proves the arithmetic and the indexing of
// that width; the AVX-512 instructions themselves run where the machine has them.

#include "kernel_includes.h"

#define TOME_ISA_NAMESPACE wide
#define TOME_VECTOR_BYTES 64
#define TOME_TILE_ROWS 12

#include "attention_dtypes.inl"
#include "match.inl"
#include "merge.inl"
#include "merge_add_norm.inl"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "merge_add_norm_oracle.h"

namespace {

std::vector<float> random_values(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(generator);
    return values;
}

TEST(Isa, BfloatProductsServeWhereTheyAreFast) {
    for (tome::Isa isa : tome::kIsas) {
        EXPECT_TRUE(tome::serves(isa, "AuthenticAMD"));
        EXPECT_EQ(tome::serves(isa, "GenuineIntel"), isa != tome::Isa::kAvx512Bf16);
    }
}

TEST(WideKernels, FindTheSameNeighboursAsThePortableOnes) {
    for (int64_t tokens : {3, 26, 50, 131, 400}) {
        for (int64_t dim : {1, 15, 16, 64, 130}) {
            const auto metric = random_values(2 * tokens * dim, static_cast<unsigned>(tokens));
            tome::MatchParams p{};
            p.metric = metric.data();
            p.dtype = tome::DType::kFloat32;
            p.batch = 1;
            p.heads = 2;
            p.tokens = tokens;
            p.dim = dim;
            p.stride_head = tokens * dim;
            p.stride_token = dim;
            p.num_prefix_tokens = 1;
            const tome::Sets sets = tome::split_sets(tokens, 1);
            const tome::TokenSet a{sets.first_a, sets.num_a}, b{sets.first_b, sets.num_b};
            const auto count = static_cast<size_t>(a.count);
            std::vector<int32_t> wide(count), portable(count);
            std::vector<float> wide_best(count), portable_best(count);
            const auto serial = tome::Threads::serial();
            tome::wide::nearest(p, a, b, 0, serial, wide.data(), wide_best.data());
            tome::kPortableKernels.nearest(p, a, b, 0, serial, portable.data(),
                                           portable_best.data());
            for (size_t i = 0; i < count; ++i) {
                EXPECT_NEAR(wide_best[i], portable_best[i], 1e-5f) << tokens << " " << dim;
                // With one channel every score is 1 or -1, up to rounding: ties, but for rounding.
                if (dim > 1) {
                    EXPECT_EQ(wide[i], portable[i]) << tokens << " " << dim << " " << i;
                }
            }
        }
    }
}

TEST(WideKernels, MergeTheSameRowsAsThePortableOnes) {
    constexpr int64_t kTokens = 40, kRows = 13;
    for (int64_t channels : {1, 15, 16, 17, 63, 64, 65, 200}) {
        const auto x = random_values(kTokens * channels, 7);
        std::vector<int32_t> members(kTokens), offsets(kRows + 1);
        for (int32_t n = 0; n < kTokens; ++n) members[static_cast<size_t>(n)] = n;
        for (int32_t m = 0; m <= kRows; ++m) offsets[static_cast<size_t>(m)] = m * 3;
        std::vector<float> size(kTokens, 2.0f);
        for (auto reduce : {tome::Reduce::kMean, tome::Reduce::kSum, tome::Reduce::kAmax}) {
            std::vector<float> wide(static_cast<size_t>(kRows * channels)), portable(wide);
            std::vector<float> wide_size(kRows), portable_size(kRows);
            tome::MergeParams p{x.data(),
                                tome::DType::kFloat32,
                                1,
                                kTokens,
                                kRows,
                                channels,
                                kTokens * channels,
                                channels,
                                size.data(),
                                members.data(),
                                offsets.data(),
                                reduce,
                                wide.data(),
                                wide_size.data()};
            tome::wide::merge_rows(p, 0, kRows);
            p.out = portable.data();
            p.out_size = portable_size.data();
            tome::kPortableKernels.merge_rows(p, 0, kRows);
            EXPECT_EQ(wide_size, portable_size);
            for (size_t i = 0; i < wide.size(); ++i) EXPECT_NEAR(wide[i], portable[i], 1e-5f);
        }
    }
}

TEST(WideKernels, AddMergeAndNormAsTheOracle) {
    for (tome::DType dtype : tome_test::kDTypes) {
        for (int64_t channels : {1, 7, 8, 15, 16, 17, 63, 64, 65, 200}) {
            SCOPED_TRACE(::testing::Message() << tome::dtype_name(dtype) << " " << channels);
            for (const auto& kind : tome_test::kMergeAddNormKinds) {
                const tome_test::MergeAddNormInputs inputs(dtype, {1, 40, 23, channels}, kind);
                tome_test::MergeAddNormOutputs got = inputs.outputs();
                tome::wide::merge_add_norm_rows(inputs.params(got), 0, 23);
                tome_test::expect_merge_add_norm(inputs.params(got));
            }
        }
    }
}

TEST(WideKernels, AttendAsThePortableOnes) {
    for (int64_t tokens : {1, 30, 131}) {
        for (int64_t dim : {1, 16, 40, 64}) {
            const int64_t count = tokens * dim;
            const auto q = random_values(count, 1), k = random_values(count, 2);
            const auto v = random_values(count, 3), grad = random_values(count, 4);
            std::vector<float> size(static_cast<size_t>(tokens), 3.0f);
            size[0] = 0.5f;
            const tome::HeadStrides strides{0, 0, dim};
            const auto zeros = [&](int64_t n) {
                return std::vector<float>(static_cast<size_t>(n));
            };
            struct Results {
                std::vector<float> out, lse, grad_q, grad_k, grad_v, cls;
            };
            const auto run = [&](const auto& attention, const auto& backward, const auto& cls) {
                Results r{zeros(count), zeros(tokens), zeros(count),
                          zeros(count), zeros(count),  zeros(tokens)};
                const auto dtype = tome::DType::kFloat32;
                const tome::AttentionInputs inputs{q.data(), k.data(), v.data(),    dtype, 1,
                                                   1,        tokens,   tokens,      dim,   strides,
                                                   strides,  strides,  size.data(), 0.5};
                attention(tome::AttentionParams{inputs, r.out.data(), r.lse.data()}, 1, 0, 1);
                backward(tome::AttentionBackwardParams{inputs, grad.data(), strides, r.out.data(),
                                                       r.lse.data(), r.grad_q.data(),
                                                       r.grad_k.data(), r.grad_v.data()},
                         0, 1);
                cls(tome::ClsAttentionParams{q.data(), k.data(), dtype, 1, 1, tokens, dim, 0, 0,
                                             strides, size.data(), 0.5, r.cls.data()},
                    0, 0, r.cls.data());
                return r;
            };
            const Results wide =
                run(tome::wide::attention_parts, tome::wide::attention_backward_heads,
                    tome::wide::cls_attention_head);
            const auto& kernels = tome::kPortableKernels;
            const Results portable = run(kernels.attention_parts, kernels.attention_backward_heads,
                                         kernels.cls_attention_head);
            for (auto part : {&Results::out, &Results::lse, &Results::grad_q, &Results::grad_k,
                              &Results::grad_v, &Results::cls}) {
                for (size_t i = 0; i < (wide.*part).size(); ++i) {
                    EXPECT_NEAR((wide.*part)[i], (portable.*part)[i], 3e-5f)
                        << tokens << " " << dim;
                }
            }
        }
    }
}

}  // namespace
