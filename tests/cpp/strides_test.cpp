// Elements further than 2^31 and 2^32 from the first, reached through strides: a sparse mapping of
// tens of GiB of addresses, of which only the pages of a few tokens are ever touched.

#include <sys/mman.h>

#include <cstdlib>

#include "helpers.h"

namespace tome_test {
namespace {

class Sparse {
  public:
    explicit Sparse(int64_t bytes)
        : bytes_(static_cast<size_t>(bytes)),
          data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        if (data_ == MAP_FAILED) throw std::runtime_error("cannot reserve addresses with mmap");
    }
    ~Sparse() { munmap(data_, bytes_); }
    Sparse(const Sparse&) = delete;
    Sparse& operator=(const Sparse&) = delete;

    void* data() const { return data_; }

  private:
    size_t bytes_;
    void* data_;
};

// Each of these, times an index below, passes 2^31 elements; the last passes 2^32 and wraps to a
// small number in 32 bits.
constexpr int64_t kFar[] = {(int64_t{1} << 29) + 64, (int64_t{1} << 30) + 64,
                            (int64_t{1} << 32) + 64};
constexpr int64_t kMostBytes = (int64_t{1} << 38);

class StridesTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, StridesTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

TEST_P(StridesTest, MatchReadsFarTokensHeadsAndImages) {
    const int64_t batch = 2, heads = 2, tokens = 7, dim = 20;
    const Array x = random_array(GetParam(), batch * heads * tokens * dim, 3);
    const auto run = [&](const void* data, int64_t by_batch, int64_t by_head, int64_t by_token) {
        Plan plan{batch, tokens, tokens - 2, {}, {}, {}};
        plan.assign.resize(size_t(batch * tokens));
        plan.members.resize(size_t(batch * tokens));
        plan.offsets.resize(size_t(batch * (tokens - 1)));
        tome::match({data, GetParam(), batch, heads, tokens, dim, by_batch, by_head, by_token, 2, 1,
                     plan.assign.data(), plan.members.data(), plan.offsets.data()},
                    pool());
        return plan;
    };
    const Plan want = run(x.data(), heads * tokens * dim, tokens * dim, dim);
    for (int64_t far : kFar) {
        const int64_t strides[][3] = {
            {far * 4, 1000, 40}, {heads * tokens * dim, far * 4, dim}, {10000, 1000, far}};
        for (const auto& [by_batch, by_head, by_token] : strides) {
            const Sparse memory(kMostBytes);
            for (int64_t i = 0; i < x.count(); ++i) {
                const int64_t token = i / dim;
                const int64_t at = token / (heads * tokens) * by_batch +
                                   token / tokens % heads * by_head + token % tokens * by_token;
                store(GetParam(), memory.data(), at + i % dim, x[i]);
            }
            for_each_isa([&, by_batch = by_batch, by_head = by_head, by_token = by_token] {
                EXPECT_EQ(run(memory.data(), by_batch, by_head, by_token), want)
                    << by_batch << " " << by_head << " " << by_token;
            });
        }
    }
}

TEST_P(StridesTest, MergeAndUnmergeReadFarRowsAndImages) {
    const int64_t channels = 40, tokens = 6;
    // The same tensor serves as tokens to merge and as rows to spread: six of either.
    const Plan plan = plan_of({0, 1, 1, 2, 0, 5, 3, 3, 3, 1, 4, 0}, 2, tokens, 6);
    const Array x = random_array(GetParam(), 2 * tokens * channels, 3);
    struct Results {
        Array merged, back, unmerged, added, normed;
    };
    const auto run = [&](const void* data, int64_t by_batch, int64_t by_token) {
        const Array rows(GetParam(), 2 * 6 * channels);
        Results got{rows, rows, rows, rows, rows};
        std::vector<float> sizes(12);
        EXPECT_TRUE(tome::merge({data, GetParam(), 2, tokens, 6, channels, by_batch, by_token,
                                 nullptr, plan.members.data(), plan.offsets.data(),
                                 tome::Reduce::kMean, got.merged.data(), sizes.data()},
                                pool()));
        EXPECT_TRUE(tome::merge_backward(
            {data, GetParam(), 2, tokens, 6, channels, by_batch, by_token, nullptr,
             plan.members.data(), plan.offsets.data(), tome::Reduce::kMean, got.back.data()},
            pool()));
        EXPECT_TRUE(tome::merge_add_norm({data,
                                          data,
                                          GetParam(),
                                          2,
                                          tokens,
                                          6,
                                          channels,
                                          by_batch,
                                          by_token,
                                          by_batch,
                                          by_token,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          1e-6,
                                          true,
                                          nullptr,
                                          plan.members.data(),
                                          plan.offsets.data(),
                                          got.added.data(),
                                          got.normed.data(),
                                          sizes.data()},
                                         pool()));
        EXPECT_TRUE(tome::unmerge({data, GetParam(), 2, tokens, 6, channels, by_batch, by_token,
                                   plan.assign.data(), got.unmerged.data()},
                                  pool()));
        return got;
    };
    for (int64_t far : kFar) {
        const int64_t strides[][2] = {{far * 4, channels}, {1000, far}};
        for (const auto& [by_batch, by_token] : strides) {
            const Sparse memory(kMostBytes);
            for (int64_t i = 0; i < x.count(); ++i) {
                const int64_t token = i / channels;
                const int64_t at = token / tokens * by_batch + token % tokens * by_token;
                store(GetParam(), memory.data(), at + i % channels, x[i]);
            }
            for_each_isa([&, by_batch = by_batch, by_token = by_token] {
                const Results want = run(x.data(), tokens * channels, channels);
                const Results got = run(memory.data(), by_batch, by_token);
                EXPECT_EQ(got.merged, want.merged);
                EXPECT_EQ(got.back, want.back);
                EXPECT_EQ(got.unmerged, want.unmerged);
                EXPECT_EQ(got.added, want.added);
                EXPECT_EQ(got.normed, want.normed);
            });
        }
    }
}

TEST_P(StridesTest, AttentionReadsFarTokensHeadsAndImages) {
    const int64_t batch = 2, heads = 2, tokens = 5, dim = 20;
    const DType dtype = GetParam();
    const DType sums = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    const Array x = random_array(dtype, batch * heads * tokens * dim, 3);
    struct Results {
        Array out, lse, grad_q, grad_k, grad_v, cls;
        bool operator==(const Results&) const = default;
    };
    const auto run = [&](const void* data, const tome::HeadStrides& far) {
        Results r{Array(dtype, x.count()), Array(sums, batch * heads * tokens),
                  Array(dtype, x.count()), Array(dtype, x.count()),
                  Array(dtype, x.count()), Array(sums, batch * tokens)};
        const tome::AttentionInputs inputs{data,   data, data, dtype, batch, heads,   tokens,
                                           tokens, dim,  far,  far,   far,   nullptr, 0.3};
        tome::attention({inputs, r.out.data(), r.lse.data()}, pool());
        tome::attention_backward({inputs, data, far, r.out.data(), r.lse.data(), r.grad_q.data(),
                                  r.grad_k.data(), r.grad_v.data()},
                                 pool());
        tome::cls_attention({data, data, dtype, batch, heads, tokens, dim, far.batch, far.head, far,
                             nullptr, 0.3, r.cls.data()},
                            pool());
        return r;
    };
    const Results want = run(x.data(), {heads * tokens * dim, tokens * dim, dim});
    for (int64_t far : kFar) {
        const tome::HeadStrides strides[] = {
            {far * 4, 1000, 40}, {heads * tokens * dim, far * 4, dim}, {10000, 1000, far}};
        for (const tome::HeadStrides& by : strides) {
            const Sparse memory(kMostBytes);
            for (int64_t i = 0; i < batch * heads * tokens; ++i) {
                const int64_t n = i % tokens, h = i / tokens % heads, b = i / tokens / heads;
                const int64_t at = b * by.batch + h * by.head + n * by.token;
                for (int64_t d = 0; d < dim; ++d) {
                    store(dtype, memory.data(), at + d, x[i * dim + d]);
                }
            }
            EXPECT_EQ(run(memory.data(), by), want)
                << by.batch << " " << by.head << " " << by.token;
        }
    }
}

}  // namespace
}  // namespace tome_test
