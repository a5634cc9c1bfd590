// cls_attention_cuda in the emulator, against plain loops in double precision.

#include <algorithm>

#include "attention_oracle.h"
#include "attention_tiles.h"
#include "emulator.h"
#include "helpers.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

using tome::ClsAttentionParams;
using tome::HeadStrides;

struct Shape {
    int64_t batch, heads, keys, dim;
};

// q and k in one packed array (batch, tokens, 2, heads, dim), `pad` elements into it and between
// its tokens; q is token 0's. What belongs to neither is NaN.
struct Inputs {
    DType dtype;
    Shape shape;
    Array packed;
    int64_t q_at, k_at;
    HeadStrides strides;
    std::vector<float> size;
    double scale = 0.3;
};

Inputs random_inputs(DType dtype, const Shape& s, int64_t pad = 0, unsigned seed = 1) {
    const int64_t row = 2 * s.heads * s.dim + pad;
    const int64_t tokens = std::max<int64_t>(s.keys, 1);
    Inputs in{dtype, s,  Array(dtype, pad + s.batch * tokens * row), pad, pad + s.heads * s.dim, {},
              {},    0.3};
    in.strides = {tokens * row, s.dim, row};
    const Array values = random_array(dtype, in.packed.count(), seed);
    for (int64_t i = 0; i < in.packed.count(); ++i) in.packed.set(i, kNaN);
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t i = 0; i < s.heads * s.dim; ++i) {
            const int64_t q = in.q_at + b * in.strides.batch + i;
            in.packed.set(q, values[q]);
            for (int64_t n = 0; n < s.keys; ++n) {
                const int64_t k = in.k_at + b * in.strides.batch + n * row + i;
                in.packed.set(k, values[k]);
            }
        }
    }
    for (int64_t i = 0; i < s.batch * s.keys; ++i) in.size.push_back(1.0f + float(i * 7 % 5));
    return in;
}

constexpr int64_t kGuard = 16;

ClsAttentionParams params_of(const Inputs& in, const Array& out) {
    const Shape& s = in.shape;
    return {in.packed.at(in.q_at),
            in.packed.at(in.k_at),
            in.dtype,
            s.batch,
            s.heads,
            s.keys,
            s.dim,
            in.strides.batch,
            in.strides.head,
            in.strides,
            in.size.empty() ? nullptr : in.size.data(),
            in.scale,
            const_cast<void*>(out.at(kGuard))};
}

Array on_cuda(const Inputs& in) {
    const int64_t count = in.shape.batch * in.shape.keys;
    Array out(DType::kFloat32, count + 2 * kGuard);
    const Array poison(DType::kFloat32, 1);
    const ClsAttentionParams p = params_of(in, out);
    std::vector<float> workspace(tome::cls_attention_cuda_workspace_bytes(p) / sizeof(float),
                                 std::nanf(""));
    const int64_t before = tome_emulation::launches();
    EXPECT_LAUNCHED(tome::cls_attention_cuda(p, workspace.data(), nullptr));
    EXPECT_EQ(tome_emulation::launches() - before, count == 0 ? 0 : in.shape.heads == 0 ? 1 : 2);
    if (count > 0) {
        EXPECT_TRUE(tome_emulation::neighbours().overlapping);
        EXPECT_EQ(tome_emulation::neighbours().releasing_blocks, uint64_t(in.shape.batch));
    }
    for (int64_t i = 0; i < kGuard; ++i) {
        EXPECT_TRUE(out.same(i, poison, 0) && out.same(count + kGuard + i, poison, 0)) << i;
    }
    return out;
}

void expect_exact_enough(const Inputs& in) {
    const Array got = on_cuda(in);
    const ClsAttentionOracle want = cls_attention_oracle(params_of(in, got));
    for (size_t i = 0; i < want.out.size(); ++i) {
        ASSERT_NEAR(got[kGuard + int64_t(i)], want.out[i], want.error[i]) << i;
    }
}

class CudaClsAttentionTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, CudaClsAttentionTest,
                         ::testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                         [](const auto& info) { return dtype_name(info.param); });

TEST_P(CudaClsAttentionTest, AgreesWithTheOracle) {
    const Shape shapes[] = {{2, 12, 197, 64}, {1, 3, 150, 80}, {3, 2, 80, 72},
                            {2, 1, 17, 17},   {1, 2, 16, 32},  {1, 5, 1, 40},
                            {2, 3, 33, 1},    {1, 2, 50, 300}, {1, 40, 7, 8}};
    for (const Shape& s : shapes) {
        SCOPED_TRACE(::testing::Message() << s.heads << "x" << s.keys << "x" << s.dim);
        expect_exact_enough(random_inputs(GetParam(), s));
        expect_exact_enough(random_inputs(GetParam(), s, 1));  // off alignment
    }
}

TEST_P(CudaClsAttentionTest, MoreKeysThanAreLoadedAtOnceAndThreads) {
    const Shape s{1, 2, 600, 16};
    Inputs in = random_inputs(GetParam(), s);
    expect_exact_enough(in);
    for (int64_t n = 0; n < 300; ++n) in.size[size_t(n)] = 0;  // all of the first ones hidden
    expect_exact_enough(in);
}

TEST_P(CudaClsAttentionTest, RefusesHeadsWhoseSumsDontFit) {
    const Inputs in = random_inputs(GetParam(), {2, 3, 20, 8});
    std::vector<float> workspace(2 * 3 * 20);
    const Array out(DType::kFloat32, 2 * 20 + 2 * kGuard);
    const auto run = [&] {
        return tome::cls_attention_cuda(params_of(in, out), workspace.data(), nullptr);
    };
    for (int fit : {2, 3}) {
        const tome_emulation::UseOptions use({1, 4, fit * 8});
        EXPECT_EQ(run(), fit == 3 ? cudaSuccess : cudaErrorInvalidConfiguration);
    }
}

TEST_P(CudaClsAttentionTest, SizesAndScales) {
    const Shape s{3, 2, 70, 64};
    Inputs in = random_inputs(GetParam(), s);
    in.size.clear();
    expect_exact_enough(in);
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t n = 0; n < s.keys; ++n) {
            in.size.push_back(b == 0 ? 0.0f : n % 3 == 0 ? 0.0f : n == 10 ? 1e6f : 1.5f);
        }
    }
    for (double scale : {0.125, -0.5, 0.0, 40.0}) {
        in.scale = scale;
        expect_exact_enough(in);
    }
    const Array got = on_cuda(in);
    for (int64_t n = 0; n < s.keys; ++n) EXPECT_EQ(got[kGuard + n], 0.0) << "all keys hidden";
}

TEST_P(CudaClsAttentionTest, WhatHiddenKeysHoldChangesNothing) {
    const double values[] = {kNaN, kInf, -kInf};
    const Shape s{3, 3, 70, 40};
    for (int64_t pad : {0, 1}) {  // on and off alignment
        Inputs in = random_inputs(GetParam(), s, pad);
        for (int64_t i = 0; i < s.batch * s.keys; ++i) {
            const int64_t b = i / s.keys, n = i % s.keys;
            const bool hidden = b == 0 ? n % 3 == 1 || n < 20 : b == 1 || n == s.keys - 1;
            if (hidden) in.size[size_t(i)] = 0;
        }
        const Array want = on_cuda(in);
        for (int64_t i = 0; i < s.batch * s.keys; ++i) {
            if (in.size[size_t(i)] != 0) continue;
            const int64_t at =
                in.k_at + i / s.keys * in.strides.batch + i % s.keys * in.strides.token;
            for (int64_t d = 0; d < s.heads * s.dim; ++d) in.packed.set(at + d, values[i % 3]);
        }
        EXPECT_EQ(on_cuda(in), want);
        expect_exact_enough(in);
    }
}

TEST_P(CudaClsAttentionTest, RowsAddUpToOne) {
    const Shape s{2, 6, 130, 64};
    Inputs in = random_inputs(GetParam(), s);
    in.scale = 1e4;  // and huge logits don't overflow
    const Array got = on_cuda(in);
    for (int64_t b = 0; b < s.batch; ++b) {
        double sum = 0;
        for (int64_t n = 0; n < s.keys; ++n) sum += got[kGuard + b * s.keys + n];
        EXPECT_NEAR(sum, 1.0, 1e-5);
    }
}

TEST_P(CudaClsAttentionTest, DegenerateShapes) {
    for (const Shape& s : {Shape{0, 2, 3, 4}, {2, 0, 3, 4}, {2, 2, 0, 4}, {2, 2, 3, 0}}) {
        expect_exact_enough(random_inputs(GetParam(), s));
    }
}

TEST_P(CudaClsAttentionTest, TheSameBitsInAnyOrder) {
    const Inputs in = random_inputs(GetParam(), {3, 4, 90, 64});
    const Array want = on_cuda(in);
    for (uint32_t seed = 2; seed < 5; ++seed) {
        const tome_emulation::UseOptions use({seed});
        EXPECT_EQ(on_cuda(in), want);
    }
}

TEST(CudaClsAttention, RefusesFloat64) {
    const Inputs in = random_inputs(DType::kFloat64, {1, 1, 2, 2});
    const Array out(DType::kFloat64, 2 + 2 * kGuard);
    float workspace[4];
    EXPECT_EQ(tome::cls_attention_cuda(params_of(in, out), workspace, nullptr),
              cudaErrorInvalidValue);
}

}  // namespace
}  // namespace tome_test
