// match_cuda in the emulator: the plan must be the CPU's, which tests/cpp holds against an oracle,
// whatever the order of blocks and threads, the tiles, and the memory it finds.

#include <algorithm>
#include <set>
#include <string>

#include "../cpp/helpers.h"
#include "emulator.h"
#include "match_args.h"
#include "match_tiles.h"
#include "tome_core/cuda.h"

namespace tome_test {
namespace {

namespace tiles = tome::match_tiles;

struct Shape {
    int64_t batch, heads, tokens, dim;
};

// A metric (batch, heads, tokens, dim) somewhere in memory.
struct Metric {
    DType dtype;
    Shape shape;
    const void* data;
    int64_t stride_batch, stride_head, stride_token;
    const float* weight = nullptr;  // (batch, tokens)
    const std::vector<int32_t>* targets = nullptr;
    const float *size = nullptr, *importance = nullptr;  // (batch, tokens)
    double threshold = std::numeric_limits<double>::infinity();
};

Metric contiguous(const Array& x, const Shape& s) {
    return {x.dtype(), s, x.data(), s.heads * s.tokens * s.dim, s.tokens * s.dim, s.dim};
}

Array random_metric(DType dtype, const Shape& s, unsigned seed) {
    return random_array(dtype, s.batch * s.heads * s.tokens * s.dim, seed);
}

constexpr int32_t kPoison = -77;

tome::MatchParams params_of(const Metric& m, int64_t r, int64_t prefix) {
    const Shape& s = m.shape;
    tome::MatchParams p{};
    p.metric = m.data, p.dtype = m.dtype;
    p.batch = s.batch, p.heads = s.heads, p.tokens = s.tokens, p.dim = s.dim;
    p.stride_batch = m.stride_batch, p.stride_head = m.stride_head;
    p.stride_token = m.stride_token, p.r = r, p.num_prefix_tokens = prefix, p.weight = m.weight;
    p.size = m.size, p.importance = m.importance, p.threshold = m.threshold;
    if (m.targets != nullptr) {
        p.targets = m.targets->data();
        p.num_targets = static_cast<int64_t>(m.targets->size());
    }
    return p;
}

// The params point into the plan.
Plan poisoned_plan(tome::MatchParams& p) {
    Plan plan{p.batch, p.tokens, p.tokens - tome::cut_r(p), {}, {}, {}};
    plan.assign.assign(static_cast<size_t>(p.batch * p.tokens), kPoison);
    plan.members.assign(static_cast<size_t>(p.batch * p.tokens), kPoison);
    plan.offsets.assign(static_cast<size_t>(p.batch * (plan.rows + 1)), kPoison);
    p.assign = plan.assign.data(), p.members = plan.members.data();
    p.offsets = plan.offsets.data();
    return plan;
}

Plan on_cpu(const Metric& m, int64_t r, int64_t prefix) {
    tome::MatchParams params = params_of(m, r, prefix);
    Plan plan = poisoned_plan(params);
    EXPECT_TRUE(tome::match(params, Threads::serial()));
    return plan;
}

int64_t bytes_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

tiles::Tiles tiles_of(const tome::MatchParams& p) {
    tome::Sets sets = tome::split_sets(p.tokens, p.num_prefix_tokens);
    if (p.targets != nullptr) {
        sets.num_b = p.num_targets;
        sets.num_a = p.tokens - p.num_prefix_tokens - p.num_targets;
    }
    return tiles::choose(
        p.batch, p.heads, sets.num_a, sets.num_b, p.dim, bytes_of(p.dtype),
        {tome_emulation::options().multiprocessors, tome_emulation::options().shared_limit},
        p.weight != nullptr || p.targets != nullptr || tome::has_threshold(p));
}

// In a workspace of exactly the size asked for, full of what another kernel may have left.
Plan on_cuda(const Metric& m, int64_t r, int64_t prefix, unsigned char left = 0xA5) {
    tome::MatchParams params = params_of(m, r, prefix);
    Plan plan = poisoned_plan(params);
    std::vector<unsigned char> workspace(tome::match_cuda_workspace_bytes(params), left);
    const int64_t before = tome_emulation::launches();
    EXPECT_EQ(tome::match_cuda(params, workspace.data(), nullptr), cudaSuccess)
        << tome_emulation::last_failure();
    const bool merges = m.shape.batch > 0 && tome::may_merge(params);
    const tiles::Tiles t = merges ? tiles_of(params) : tiles::Tiles{};
    const int64_t kernels = m.shape.batch == 0 ? 0 : t.form == tiles::Form::kStaged ? 2 : 1;
    EXPECT_EQ(tome_emulation::launches() - before, kernels);
    if (merges) {  // what is behind match may begin early; before it, there may be a clear
        EXPECT_EQ(tome_emulation::neighbours().releasing_blocks,
                  tome_emulation::neighbours().blocks);
        EXPECT_EQ(tome_emulation::neighbours().overlapping,
                  t.form == tiles::Form::kStaged ||
                      (t.form != tiles::Form::kPlain && t.blocks_per_image() == 1));
    }
    return plan;
}

// Restores the emulator's options.
class UseOptions {
  public:
    explicit UseOptions(const tome_emulation::Options& options)
        : before_(tome_emulation::options()) {
        tome_emulation::options() = options;
    }
    ~UseOptions() { tome_emulation::options() = before_; }
    UseOptions(const UseOptions&) = delete;
    UseOptions& operator=(const UseOptions&) = delete;

  private:
    tome_emulation::Options before_;
};

tome_emulation::Options with(uint32_t seed, int multiprocessors, int shared_limit) {
    tome_emulation::Options options = tome_emulation::options();
    options.seed = seed;
    options.multiprocessors = multiprocessors;
    options.shared_limit = shared_limit;
    return options;
}

constexpr int kHopperShared = 227 * 1024, kTuringShared = 64 * 1024;
constexpr int kNoTile = 9728;  // too little for a tile of 70 channels: the plain kernel

// One kernel, a block per image, for small images; two kernels; smaller tiles.
const tome_emulation::Options kMachines[] = {with(1, 1, kHopperShared), with(2, 200, kHopperShared),
                                             with(3, 4, kTuringShared)};

template <class F>
void for_each_machine(const F& body) {
    for (const auto& options : kMachines) {
        SCOPED_TRACE(::testing::Message() << options.multiprocessors << " multiprocessors, "
                                          << options.shared_limit << " bytes shared");
        const UseOptions use(options);
        body();
    }
}

class CudaMatchTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, CudaMatchTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

struct Case {
    Shape shape;
    int64_t r, prefix;
};

TEST_P(CudaMatchTest, AgreesWithCpu) {
    const Case cases[] = {
        {{1, 1, 197, 64}, 16, 1}, {{5, 3, 50, 33}, 8, 2},   {{3, 1, 17, 7}, 100, 0},
        {{2, 12, 65, 64}, 20, 5}, {{2, 2, 31, 5}, 1, 0},    {{1, 1, 90, 136}, 45, 3},
        {{3, 2, 12, 2}, 4, 1},    {{1, 1, 258, 16}, 60, 1}, {{7, 1, 40, 31}, 19, 2},
        {{1, 1, 67, 400}, 9, 0},
    };
    for (const auto& [shape, r, prefix] : cases) {
        SCOPED_TRACE(::testing::Message() << "tokens " << shape.tokens << " dim " << shape.dim);
        const Array x = random_metric(GetParam(), shape, 3);
        const Plan want = on_cpu(contiguous(x, shape), r, prefix);
        for_each_machine([&, &shape = shape, r = r, prefix = prefix] {
            EXPECT_EQ(on_cuda(contiguous(x, shape), r, prefix), want);
        });
    }
}

TEST_P(CudaMatchTest, ManyTokensPassInTilesAndRankByRadix) {
    const bool is_double = GetParam() == DType::kFloat64;  // which has no radix, and is slow here
    const Shape s{1, 1, 1040, is_double ? 3 : 8};
    static_assert(1040 / 2 > tiles::kCountingRank);
    const Array x = random_metric(GetParam(), s, 4);
    for (int64_t r : {1, 300, 520}) {
        if (is_double && r != 300) continue;
        const UseOptions use(with(5, r == 300 ? 1 : 40, kHopperShared));
        EXPECT_EQ(on_cuda(contiguous(x, s), r, 0), on_cpu(contiguous(x, s), r, 0)) << r;
    }
}

// Token 0 has 64 neighbours, all at nearly the same angle in different directions: products in
// float16, bfloat16 or TF32 could not tell which is the nearest.
TEST(CudaMatch, ChoosesWithFloat32Accuracy) {
    const Shape s{4, 1, 128, 64};
    Array x = random_metric(DType::kFloat32, s, 13);
    const auto dot = [&](int64_t i, int64_t j) {
        double sum = 0;
        for (int64_t d = 0; d < s.dim; ++d) sum += x[i * s.dim + d] * x[j * s.dim + d];
        return sum;
    };
    const auto cosine = [&](int64_t i, int64_t j) {
        return dot(i, j) / std::sqrt(dot(i, i) * dot(j, j));
    };
    for (int64_t first = 0; first < s.batch * s.tokens; first += s.tokens) {
        for (int64_t j = first + 1; j < first + s.tokens; j += 2) {
            const double along = dot(first, j) / dot(first, first), length = dot(first, first);
            const double across = std::sqrt(dot(j, j) - along * along * length);
            const double wanted = 0.7 + 1e-6 * double((j - first) * 37 % 128);
            const double add = wanted / std::sqrt(1 - wanted * wanted) * across / std::sqrt(length);
            for (int64_t d = 0; d < s.dim; ++d) {
                const double a = x[first * s.dim + d], b = x[j * s.dim + d];
                x.set(j * s.dim + d, b + (add - along) * a);
            }
        }
    }
    for_each_machine([&] {
        const Plan plan = on_cuda(contiguous(x, s), 64, 0);
        for (int64_t first = 0; first < s.batch * s.tokens; first += s.tokens) {
            double chosen = -1, best = -1;
            for (int64_t j = first + 1; j < first + s.tokens; j += 2) {
                EXPECT_NEAR(cosine(first, j), 0.7, 3e-4);  // the data are what they should be
                best = std::max(best, cosine(first, j));
                if (plan.assign[size_t(first)] == plan.assign[size_t(j)]) chosen = cosine(first, j);
            }
            EXPECT_GE(chosen, best - 4e-7) << first;
        }
    });
}

TEST_P(CudaMatchTest, RowsTooLongForATileTakeThePlainKernel) {
    const Shape s{2, 2, 45, 70};
    const Array x = random_metric(GetParam(), s, 6);
    const UseOptions use(with(7, 2, kNoTile));
    ASSERT_EQ(tiles::choose(2, 2, 22, 22, 70, bytes_of(GetParam()), {2, kNoTile}).form,
              tiles::Form::kPlain);
    EXPECT_EQ(on_cuda(contiguous(x, s), 11, 1), on_cpu(contiguous(x, s), 11, 1));
}

TEST_P(CudaMatchTest, ReadsAnyStridesInPlace) {
    for (const auto& [dim, offset] : {std::pair{16, 0}, {16, 1}, {24, 0}, {13, 0}}) {
        const Shape s{2, 3, 37, dim};
        // (batch, tokens, 3, heads, dim): q and v hold NaN, so that reading them would show.
        Array qkv(GetParam(), s.batch * s.tokens * 3 * s.heads * s.dim + offset);
        const Array keys = random_metric(GetParam(), s, 8);
        for (int64_t i = 0; i < qkv.count(); ++i) qkv.set(i, kNaN);
        for (int64_t b = 0; b < s.batch; ++b) {
            for (int64_t h = 0; h < s.heads; ++h) {
                for (int64_t n = 0; n < s.tokens; ++n) {
                    for (int64_t d = 0; d < s.dim; ++d) {
                        qkv.set(offset + (((b * s.tokens + n) * 3 + 1) * s.heads + h) * s.dim + d,
                                keys[((b * s.heads + h) * s.tokens + n) * s.dim + d]);
                    }
                }
            }
        }
        const Metric view{GetParam(),
                          s,
                          qkv.at(offset + s.heads * s.dim),
                          s.tokens * 3 * s.heads * s.dim,
                          s.dim,
                          3 * s.heads * s.dim};
        EXPECT_EQ(on_cuda(view, 9, 1), on_cpu(contiguous(keys, s), 9, 1));
        Metric expanded = contiguous(keys, s);
        expanded.stride_batch = 0;
        EXPECT_EQ(on_cuda(expanded, 9, 1), on_cpu(expanded, 9, 1));
    }
}

TEST_P(CudaMatchTest, TiesGoToTheLowerIndexAcrossEveryTileEdge) {
    const Shape s{1, 2, 151, 37};
    Array x(GetParam(), s.heads * s.tokens * s.dim);
    const Array token = random_array(GetParam(), s.heads * s.dim, 5);
    for (int64_t i = 0; i < x.count(); ++i) {
        x.set(i, token[i / (s.tokens * s.dim) * s.dim + i % s.dim]);
    }
    std::vector<int32_t> assign(151);  // tokens 0, 2, .. 2 (r - 1) join token 1
    const int32_t r = 30, first_b = 76 - r;
    for (int32_t n = 0; n < 151; ++n) {
        assign[static_cast<size_t>(n)] = n % 2 ? first_b + n / 2 : n < 2 * r ? first_b : n / 2 - r;
    }
    const Plan want = plan_of(assign, 1, 151, 151 - r);
    for_each_machine([&] { EXPECT_EQ(on_cuda(contiguous(x, s), r, 0), want); });
}

TEST_P(CudaMatchTest, TiesGoToTheLowerIndexInRadixSelection) {
    const Shape s{1, 1, 1101, 3};               // three directions only: scores tie by the hundred
    if (GetParam() == DType::kFloat64) return;  // no radix
    Array x(GetParam(), s.tokens * s.dim);
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, i / 3 * 7 % 11 % 3 == i % 3 ? 1.0 : 0.0);
    for (int64_t r : {7, 549}) {
        EXPECT_EQ(on_cuda(contiguous(x, s), r, 1), on_cpu(contiguous(x, s), r, 1)) << r;
    }
}

TEST_P(CudaMatchTest, BadTokensDoNotCorruptOthers) {
    const Shape s{3, 2, 60, 24};
    for (int64_t r : {5, 25, 29}) {
        Array x = random_metric(GetParam(), s, 10);
        const auto spoil = [&](int64_t b, int64_t n, double value) {
            x.set(((b * s.heads + 1) * s.tokens + n) * s.dim + 7, value);
        };
        spoil(0, 0, kNaN);  // a prefix token
        spoil(0, 10, kNaN);
        spoil(0, 11, kInf);
        spoil(0, 59, -kInf);
        for (int64_t n = 0; n < s.tokens; ++n) spoil(1, n, n % 4 == 3 ? kInf : kNaN);
        for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t d = 0; d < s.dim; ++d) {
                for (int64_t n : {20, 31}) x.set(((2 * s.heads + h) * s.tokens + n) * s.dim + d, 0);
            }
        }
        const Plan want = on_cpu(contiguous(x, s), r, 2);
        for_each_machine([&] { EXPECT_EQ(on_cuda(contiguous(x, s), r, 2), want); });
    }
}

TEST_P(CudaMatchTest, ZeroVectorsScoreZero) {
    const Shape s{1, 1, 12, 3};
    Array x(GetParam(), 36);
    for (int64_t i = 0; i < 36; ++i) x.set(i, 0.0);
    // B tokens 1 and 3 point one way, A tokens 0 and 2 the other: both prefer the zero token 5.
    for (int64_t n : {1, 3}) x.set(n * 3, 1.0);
    for (int64_t n : {0, 2}) x.set(n * 3, -1.0);
    const Plan got = on_cuda(contiguous(x, s), 2, 0);
    EXPECT_EQ(got, on_cpu(contiguous(x, s), 2, 0));
    EXPECT_EQ(got.assign[0], got.assign[5]);
}

TEST_P(CudaMatchTest, LengthDoesNotMatter) {
    const Shape s{1, 1, 64, 70};
    const int exponent = GetParam() == DType::kFloat64   ? 900
                         : GetParam() == DType::kFloat16 ? 8
                                                         : 110;
    const Array x = random_metric(GetParam(), s, 11);
    const Plan want = on_cpu(contiguous(x, s), 20, 0);
    const int lowest = GetParam() == DType::kFloat16 ? 0 : -exponent;  // float16 rounds below
    for (int by : {exponent, lowest}) {
        Array scaled(GetParam(), x.count());
        for (int64_t i = 0; i < x.count(); ++i) {
            scaled.set(i, std::ldexp(x[i], i / s.dim % 3 == 0 ? by : 0));
        }
        EXPECT_EQ(on_cuda(contiguous(scaled, s), 20, 0), want) << by;
        const UseOptions use(with(1, 2, kNoTile));
        EXPECT_EQ(on_cuda(contiguous(scaled, s), 20, 0), want) << by << " plain";
    }
}

TEST_P(CudaMatchTest, CutsRAndTakesDegenerateShapes) {
    for (int64_t tokens : {0, 1, 2, 3, 9}) {
        for (int64_t prefix : {0, 1, 5, 20}) {
            for (int64_t r : {int64_t{-3}, int64_t{1}, std::numeric_limits<int64_t>::max()}) {
                for (int64_t dim : {0, 3}) {
                    for (int64_t batch : {0, 2}) {
                        const Shape s{batch, 1, tokens, dim};
                        Array x(GetParam(), batch * tokens * dim);
                        for (int64_t i = 0; i < x.count(); ++i) x.set(i, i % 3 == 0 ? 1.0 : 0.0);
                        EXPECT_EQ(on_cuda(contiguous(x, s), r, prefix),
                                  on_cpu(contiguous(x, s), r, prefix))
                            << "tokens " << tokens << " prefix " << prefix << " r " << r << " dim "
                            << dim;
                    }
                }
            }
        }
    }
}

TEST_P(CudaMatchTest, TheSameBitsInAnyOrderAndMemory) {
    const Shape s{3, 2, 67, 16};  // ties and near-ties included
    Array x = random_metric(GetParam(), s, 9);
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, std::round(x[i]));
    const UseOptions first(with(1, 60, kHopperShared));
    const Plan want = on_cuda(contiguous(x, s), 20, 1);
    for (uint32_t seed = 2; seed < 6; ++seed) {
        const UseOptions use(with(seed, 60, kHopperShared));
        EXPECT_EQ(on_cuda(contiguous(x, s), 20, 1, static_cast<unsigned char>(seed * 51)), want);
    }
    // Neither the machine nor the rest of the batch decides what an image's plan is.
    for_each_machine([&] {
        EXPECT_EQ(on_cuda(contiguous(x, s), 20, 1), want);
        Metric one = contiguous(x, {1, s.heads, s.tokens, s.dim});
        one.data = x.at(one.stride_batch);
        const auto begin = want.assign.begin() + s.tokens;
        EXPECT_EQ(on_cuda(one, 20, 1).assign, std::vector<int32_t>(begin, begin + s.tokens));
    });
}

// Images of every small size, of one head and of several, alone and in a batch, in one kernel and
// in two, by one block and by several: the same plan. Keys are small whole numbers, of which many
// scores tie.
TEST_P(CudaMatchTest, EveryFormGivesTheSamePlanForEverySmallSize) {
    if (GetParam() == DType::kFloat64) return;  // has neither
    for (int64_t tokens = 2; tokens <= 20; ++tokens) {
        for (int64_t prefix : {0, 1, 2}) {
            const Shape s{2, tokens % 3 == 0 ? 1 : 4, tokens, 24};
            Array x = random_metric(GetParam(), s, static_cast<unsigned>(tokens));
            for (int64_t i = 0; i < x.count(); ++i) x.set(i, std::round(x[i]));
            for (int64_t r : {int64_t{1}, (tokens - prefix) / 3, (tokens - prefix) / 2}) {
                if (tome::cut_r(tokens, r, prefix) == 0) continue;
                SCOPED_TRACE(::testing::Message()
                             << tokens << " tokens, prefix " << prefix << ", r " << r);
                const UseOptions one(with(1, 1, kHopperShared));
                const Plan want = on_cuda(contiguous(x, s), r, prefix);
                const UseOptions two(with(2, 132, kHopperShared));
                EXPECT_EQ(on_cuda(contiguous(x, s), r, prefix), want);
            }
        }
    }
}

TEST_P(CudaMatchTest, EveryFormAndCutAgreesWithCpu) {
    if (GetParam() == DType::kFloat64) return;
    using tiles::Form;
    struct Cut {
        int64_t batch, heads, tokens, dim, r;
        int multiprocessors;
        Form form;
        int64_t blocks_a, splits_b;
    };
    const Cut cuts[] = {
        {1, 4, 50, 64, 8, 1, Form::kDirect, 1, 1},
        {2, 4, 50, 64, 24, 200, Form::kStaged, 1, 1},
        {2, 4, 197, 64, 13, 2, Form::kDirect, 1, 1},
        {1, 4, 197, 64, 13, 132, Form::kStaged, 4, 1},
        {2, 4, 197, 64, 40, 4, Form::kStaged, 1, 1},
        {1, 5, 197, 64, 98, 2, Form::kStaged, 1, 1},
        {2, 4, 197, 72, 60, 1, Form::kDirect, 1, 1},
        {2, 4, 197, 72, 60, 132, Form::kStaged, 4, 1},
        {1, 4, 577, 32, 23, 1, Form::kStaged, 3, 1},
        {1, 4, 577, 64, 23, 2, Form::kStaged, 4, 1},
        {1, 4, 577, 64, 288, 132, Form::kStaged, 5, 3},
        {1, 4, 1025, 16, 40, 8, Form::kStaged, 8, 2},
        {1, 4, 1025, 16, 512, 132, Form::kStaged, 8, 4},
        {1, 4, 1031, 16, 300, 20, Form::kStaged, 9, 4},
        {1, 2, 577, 32, 23, 1, Form::kDirect, 3, 1},
        {1, 2, 577, 32, 288, 20, Form::kDirect, 6, 6},
        {1, 2, 2049, 16, 40, 20, Form::kStaged, 16, 2},
        {1, 1, 50, 8, 8, 1, Form::kSingle, 1, 1},
        {2, 1, 197, 768, 98, 2, Form::kSingle, 1, 1},
        {1, 1, 197, 136, 13, 132, Form::kSingle, 2, 2},
        {1, 1, 577, 72, 23, 1, Form::kSingle, 3, 1},
        {1, 1, 577, 71, 288, 20, Form::kSingle, 5, 5},
        {1, 1, 1031, 328, 300, 20, Form::kSingle, 5, 5},
    };
    for (const Cut& cut : cuts) {
        if (cut.form == Form::kDirect && cut.heads * bytes_of(GetParam()) == 8) continue;  // staged
        const Shape s{cut.batch, cut.heads, cut.tokens, cut.dim};
        SCOPED_TRACE(::testing::Message() << cut.tokens << " tokens, dim " << cut.dim << ", "
                                          << cut.multiprocessors << " multiprocessors");
        const UseOptions use(with(11, cut.multiprocessors, kHopperShared));
        const tome::Sets sets = tome::split_sets(cut.tokens, 1);
        const tiles::Tiles t =
            tiles::choose(cut.batch, cut.heads, sets.num_a, sets.num_b, cut.dim,
                          bytes_of(GetParam()), {cut.multiprocessors, kHopperShared});
        EXPECT_EQ(t.form, cut.form);
        EXPECT_EQ(t.blocks_a, cut.blocks_a);
        EXPECT_EQ(t.splits_b, cut.splits_b);
        const Array x = random_metric(GetParam(), s, 21);
        const Plan want = on_cpu(contiguous(x, s), cut.r, 1);
        for (uint32_t seed : {11u, 12u}) {
            const UseOptions order(with(seed, cut.multiprocessors, kHopperShared));
            EXPECT_EQ(on_cuda(contiguous(x, s), cut.r, 1, static_cast<unsigned char>(seed)), want);
        }
    }
}

// Weights of every kind of image: none hidden, some, all but one, one set, all, padding.
std::vector<float> some_weights(const Shape& s, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<float> out;
    for (int64_t b = 0; b < s.batch; ++b) {
        const auto one = int64_t(engine() % uint64_t(s.tokens));
        for (int64_t n = 0; n < s.tokens; ++n) {
            const bool seen[] = {engine() % 3 != 0,
                                 true,
                                 engine() % 3 == 0,
                                 n == one,
                                 n % 2 == 0,
                                 n % 2 == 1,
                                 false,
                                 n < one};
            out.push_back(seen[b % 8] ? 2.0f : n % 3 == 0 ? -0.0f : 0.0f);
        }
    }
    return out;
}

// In both forms that take them, by one block an image and by several, ranked by counting and by
// radix. Hidden tokens hold NaN, and so do some visible ones.
TEST_P(CudaMatchTest, HiddenTokensTakeNoPart) {
    const Case cases[] = {
        {{8, 2, 21, 16}, 7, 0},  {{8, 1, 50, 33}, 100, 2},  {{8, 1, 9, 70}, 2, 1},
        {{1, 3, 300, 8}, 60, 1}, {{2, 1, 1040, 8}, 300, 1}, {{2, 2, 40, 136}, 8, 3},
    };
    for (const auto& [shape, r, prefix] : cases) {
        if (GetParam() == DType::kFloat64 && shape.tokens > 1000) continue;  // slow here
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, dim " << shape.dim);
        Array x = random_metric(GetParam(), shape, 5);
        Metric m = contiguous(x, shape);
        const std::vector<float> weight = some_weights(shape, 3);
        const int64_t image = shape.heads * shape.tokens;
        for (int64_t i = 0; i < shape.batch * image; ++i) {
            const int64_t n = i % shape.tokens;
            const bool hidden = weight[size_t(i / image * shape.tokens + n)] == 0;
            if (hidden || n % 13 == 4 || n == 3) x.set(i * shape.dim + n % shape.dim, kNaN);
        }
        const Plan without = on_cpu(m, r, prefix);
        const std::vector<float> ones(weight.size(), 1.0f);
        for_each_machine([&, r = r, prefix = prefix] {
            m.weight = weight.data();
            EXPECT_EQ(on_cuda(m, r, prefix), on_cpu(m, r, prefix));
            m.weight = ones.data();
            EXPECT_EQ(on_cuda(m, r, prefix), without);
        });
        const UseOptions plain(with(7, 2, kNoTile));
        m.weight = weight.data();
        EXPECT_EQ(on_cuda(m, r, prefix), on_cpu(m, r, prefix)) << "plain";
    }
}

std::vector<int32_t> every(int32_t step, int32_t first, int64_t tokens) {
    std::vector<int32_t> out;
    for (int32_t n = first; n < tokens; n += step) out.push_back(n);
    return out;
}

TEST_P(CudaMatchTest, TargetsAreWhatOthersMergeInto) {
    struct WithTargets {
        Case c;
        std::vector<int32_t> targets;
    };
    const WithTargets cases[] = {
        {{{8, 2, 45, 16}, 30, 2}, every(4, 3, 45)},
        {{{8, 1, 45, 33}, 100, 2}, {2}},
        {{{8, 1, 45, 33}, 44, 0}, {44}},
        {{{3, 1, 20, 70}, 3, 1}, {1, 2, 3, 4, 19}},
        {{{2, 3, 700, 8}, 520, 1}, every(4, 2, 700)},
        {{{1, 1, 300, 8}, 20, 0}, every(2, 1, 300)},
    };
    for (const auto& [c, targets] : cases) {
        const auto& [shape, r, prefix] = c;
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, dim " << shape.dim);
        if (GetParam() == DType::kFloat64 && shape.tokens > 500) continue;  // slow here
        const Array x = random_metric(GetParam(), shape, 5);
        const std::vector<float> weight = some_weights(shape, 3);
        Metric m = contiguous(x, shape);
        m.targets = &targets;
        for (const float* weights : {static_cast<const float*>(nullptr), weight.data()}) {
            m.weight = weights;
            const Plan want = on_cpu(m, r, prefix);
            for_each_machine(
                [&, r = r, prefix = prefix] { EXPECT_EQ(on_cuda(m, r, prefix), want); });
            const UseOptions plain(with(7, 2, kNoTile));
            EXPECT_EQ(on_cuda(m, r, prefix), want) << "plain";
        }
    }
}

// Ranked by counting and by radix, of every form, with hidden tokens and targets too.
TEST_P(CudaMatchTest, RanksByWhatMergingCosts) {
    const Case cases[] = {
        {{8, 2, 21, 16}, 7, 0},
        {{1, 3, 300, 8}, 60, 1},
        {{1, 1, 1040, 8}, 300, 1},
        {{2, 2, 40, 136}, 8, 3},
    };
    for (const auto& [shape, r, prefix] : cases) {
        if (GetParam() == DType::kFloat64 && shape.tokens > 1000) continue;  // slow here
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, dim " << shape.dim);
        const Array x = random_metric(GetParam(), shape, 5);
        std::mt19937 engine(5);
        std::vector<float> size, importance;
        for (int64_t i = 0; i < shape.batch * shape.tokens; ++i) {
            size.push_back(float(1 + engine() % 9));
            importance.push_back(engine() % 9 == 0 ? 0.0f : float(1 + engine() % 4));
        }
        const std::vector<float> weight = some_weights(shape, 3);
        const std::vector<int32_t> targets = every(4, static_cast<int32_t>(prefix), shape.tokens);
        for (int given : {1, 6, 7}) {
            Metric m = contiguous(x, shape);
            m.size = given % 2 != 0 ? size.data() : nullptr;
            m.importance = given / 2 % 2 != 0 ? importance.data() : nullptr;
            if (given / 4 != 0) m.weight = weight.data();
            if (given == 7) m.targets = &targets;
            const Plan want = on_cpu(m, r, prefix);
            for_each_machine(
                [&, r = r, prefix = prefix] { EXPECT_EQ(on_cuda(m, r, prefix), want) << given; });
            const UseOptions plain(with(7, 2, kNoTile));
            EXPECT_EQ(on_cuda(m, r, prefix), want) << "plain, " << given;
        }
    }
}

// Of every form, ranked by counting and by radix; similarities lie no closer than they are rounded.
TEST_P(CudaMatchTest, MergesWhatIsAsSimilarAsTheThreshold) {
    for (const auto& [shape, r, prefix] :
         {Case{{8, 2, 21, 16}, 3, 0}, Case{{1, 3, 300, 8}, 60, 1}, Case{{2, 2, 40, 136}, 0, 3}}) {
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, dim " << shape.dim);
        const Array x = random_metric(GetParam(), shape, 5);
        std::mt19937 engine(5);
        std::vector<float> size;
        for (int64_t i = 0; i < shape.batch * shape.tokens; ++i) {
            size.push_back(float(1 + engine() % 3));
        }
        const std::vector<float> weight = some_weights(shape, 3);
        const std::vector<int32_t> targets = every(4, static_cast<int32_t>(prefix), shape.tokens);
        for (int given = 0; given < 8; ++given) {
            for (const double threshold : {0.3, given % 3 == 0 ? -9.0 : 0.75}) {
                Metric m = contiguous(x, shape);
                m.threshold = threshold;
                if (given % 2 != 0) m.weight = weight.data();
                if (given / 2 % 2 != 0) m.targets = &targets;
                if (given / 4 != 0) m.size = size.data();
                const Plan want = on_cpu(m, r, prefix);
                for_each_machine([&, r = r, prefix = prefix] {
                    EXPECT_EQ(on_cuda(m, r, prefix), want) << given << ", " << threshold;
                });
                const UseOptions plain(with(7, 2, kNoTile));
                EXPECT_EQ(on_cuda(m, r, prefix), want) << "plain, " << given << ", " << threshold;
            }
        }
    }
}

// Some plan, and no access outside (in the sanitizer build).
TEST_P(CudaMatchTest, BadTargetsReachNothingOutside) {
    const Shape shape{2, 2, 31, 16};
    const Array x = random_metric(GetParam(), shape, 5);
    const std::vector<int32_t> sets[] = {{-1, 5, 99}, {INT32_MIN, INT32_MAX}, {31}, {-7}};
    for (const auto& targets : sets) {
        Metric m = contiguous(x, shape);
        m.targets = &targets;
        for_each_machine([&] {
            const Plan got = on_cuda(m, 20, 1);
            EXPECT_EQ(got, plan_of(got.assign, 2, 31, got.rows));
            for (int32_t row : got.assign) EXPECT_LT(row, got.rows);
        });
        const UseOptions plain(with(7, 2, kNoTile));
        on_cuda(m, 20, 1);
    }
}

// --- packed scores -----------------------------------------------------------------------------

template <class T>
void expect_ordered_like_scores() {
    const T lowest = std::numeric_limits<T>::lowest(), least = std::numeric_limits<T>::denorm_min();
    const T ascending[] = {lowest, T(-1), -least, T(0), least, T(0.5), T(1), -lowest};
    tome::match_cuda_detail::Packed before = 0;  // below every score: nothing may be chosen
    for (T score : ascending) {
        EXPECT_GT(tome::match_cuda_detail::ordered(score), before) << score;
        before = tome::match_cuda_detail::ordered(score);
    }
    EXPECT_EQ(tome::match_cuda_detail::ordered(T(-0.0)), tome::match_cuda_detail::ordered(T(0)));
}

TEST(PackedScore, IsOrderedLikeScoresThenLowerColumns) {
    expect_ordered_like_scores<float>();
    expect_ordered_like_scores<double>();
    using tome::match_cuda_detail::pack_score;
    EXPECT_GT(pack_score(0.5f, 3), pack_score(0.5f, 4));
    EXPECT_GT(pack_score(0.5f, 2000000), pack_score(0.25f, 0));
    EXPECT_GT(pack_score(-1e30f, std::numeric_limits<int32_t>::max()), 0u);
}

// --- tiles -------------------------------------------------------------------------------------

constexpr tiles::Device kHopper{132, kHopperShared}, kAmpere{108, 163 * 1024}, kAda{128, 99 * 1024},
    kTuring{40, kTuringShared};

TEST(MatchTiles, FitTheMachineAndCoverTheWork) {
    for (const tiles::Device& device : {kHopper, kAmpere, kAda, kTuring}) {
        for (int64_t batch : {1, 2, 64, 256, 4096}) {
            for (int64_t set : {1, 15, 98, 288, 2048, 8192, 100000}) {
                for (int64_t dim : {0, 1, 32, 64, 80, 320, 768, 1024, 4096}) {
                    for (int64_t heads : {1, 2, 12}) {
                        const tiles::Tiles t =
                            tiles::choose(batch, heads, set, set, dim, 2, device);
                        SCOPED_TRACE(::testing::Message()
                                     << batch << " x " << set << " x " << dim << ": " << t.rows_a
                                     << " x " << t.rows_b << ", " << t.splits_b << " splits");
                        EXPECT_LE(t.shared_bytes, device.shared_per_block);
                        EXPECT_GE(t.shared_bytes, tiles::kFinishBytes);
                        EXPECT_GE(t.blocks_a * t.rows_a, set);
                        EXPECT_EQ(t.rows_a % 16, 0);
                        EXPECT_EQ(t.rows_b % 16, 0);
                        EXPECT_LE(t.splits_b, tiles::ceil_div(set, t.rows_b));
                        if (t.form == tiles::Form::kPlain) {
                            EXPECT_GT(dim, 64);
                        } else if (t.form == tiles::Form::kSingle) {
                            const int most = t.buffers == tiles::kLargeParts ? tiles::kLargeRows
                                                                             : tiles::kSmallRows;
                            EXPECT_LE(t.rows_a, most);
                            EXPECT_LE(t.rows_b, most);
                            EXPECT_EQ(t.shared_bytes, tiles::single_layout(most, t.buffers).total);
                        } else {
                            EXPECT_GE(t.shared_bytes,
                                      tiles::layout(dim, t.rows_a, t.rows_b, t.buffers).total);
                            EXPECT_LE(t.rows_a, tiles::kThreads) << "a thread per row";
                        }
                        if (t.form == tiles::Form::kDirect && heads > 2) {
                            EXPECT_EQ(t.blocks_per_image(), 1) << "no clear";
                        }
                        if (t.form != tiles::Form::kPlain && t.blocks_per_image() == 1) {
                            EXPECT_LE(set, tiles::kMostRows) << "its maxima stay in registers";
                        }
                        if (t.form == tiles::Form::kStaged && heads == 2) {
                            EXPECT_GE(set, tiles::kManyRows);
                        }
                    }
                }
            }
        }
    }
}

TEST(MatchTiles, UsualShapes) {
    using tiles::Form;
    // ViT-B, a full batch: one block per image, two of them per multiprocessor.
    const tiles::Tiles vit = tiles::choose(256, 12, 98, 98, 64, 2, kHopper);
    EXPECT_EQ(vit.form, Form::kDirect);
    EXPECT_EQ(vit.blocks_per_image(), 1);
    EXPECT_LE(vit.shared_bytes, kHopper.shared_for_two());
    // One image: four blocks, behind many that stage its rows; of many images, or small ones, one.
    const tiles::Tiles one = tiles::choose(1, 12, 98, 98, 64, 2, kHopper);
    EXPECT_EQ(one.form, Form::kStaged);
    EXPECT_EQ(one.blocks_a, 4);
    EXPECT_EQ(one.splits_b, 1);
    EXPECT_EQ(tiles::choose(33, 12, 98, 98, 64, 2, kHopper).blocks_a, 4);
    EXPECT_EQ(tiles::choose(34, 12, 98, 98, 64, 2, kHopper).blocks_a, 1);
    EXPECT_EQ(tiles::choose(1, 12, 64, 64, 64, 2, kHopper).blocks_a, 1);
    // More tokens: even parts, and two blocks per multiprocessor.
    const tiles::Tiles more = tiles::choose(64, 16, 289, 288, 64, 2, kHopper);
    EXPECT_EQ(more.form, Form::kStaged);
    EXPECT_EQ(more.rows_a, 80);
    EXPECT_EQ(more.rows_b, 96);
    EXPECT_EQ(more.blocks_per_image(), 4);
    EXPECT_LE(more.shared_bytes, kHopper.shared_for_two());
    // Tokens compared: an image a block in a full batch, two of them per multiprocessor; four of
    // one.
    const tiles::Tiles tokens = tiles::choose(256, 1, 98, 98, 768, 2, kHopper);
    EXPECT_EQ(tokens.form, Form::kSingle);
    EXPECT_EQ(tokens.blocks_per_image(), 1);
    EXPECT_EQ(tokens.rows_a, 112);
    EXPECT_LE(tokens.shared_bytes, kHopper.shared_for_two());
    EXPECT_EQ(tiles::choose(1, 1, 98, 98, 768, 2, kHopper).blocks_per_image(), 4);
    EXPECT_EQ(tiles::choose(1, 1, 98, 98, 768, 2, kTuring).form, Form::kPlain);
    // Diffusion: a place for every block, with large tiles.
    const tiles::Tiles large = tiles::choose(2, 1, 2048, 2048, 320, 2, kHopper);
    EXPECT_EQ(large.form, Form::kSingle);
    EXPECT_EQ(large.rows_a, 128);
    EXPECT_EQ(2 * large.blocks_per_image(), 256);
    EXPECT_EQ(tiles::choose(2, 1, 2048, 2048, 320, 4, kHopper), large);
    EXPECT_EQ(tiles::choose(2, 2, 2048, 2048, 320, 2, kHopper).form, Form::kStaged);
    EXPECT_EQ(tiles::choose(2, 2, 288, 288, 64, 2, kHopper).form, Form::kDirect);
    EXPECT_EQ(tiles::choose(2, 12, 98, 98, 64, 8, kHopper).form, Form::kPlain);
}

// Shared memory has 8 banks of 16 bytes, and takes 8 lanes of such accesses at once.
TEST(MatchTiles, EightLanesAlwaysHitDifferentBanks) {
    using tome::match_cuda_detail::slot;
    std::set<int> all;
    for (int step = 0; step < 5; ++step) {
        for (int half = 0; half < 2; ++half) {
            for (int first = 0; first < 32; first += 8) {  // loading a fragment
                std::set<int> banks;
                for (int lane = first; lane < first + 8; ++lane) {
                    banks.insert(slot(step, half, lane) % 8);
                    all.insert(slot(step, half, lane));
                }
                EXPECT_EQ(banks.size(), 8u);
            }
        }
    }
    EXPECT_EQ(all.size(), 5u * 64u);
    EXPECT_EQ(*all.rbegin(), 5 * 64 - 1);
    EXPECT_EQ(tiles::group_records(80), 5 * 64);
    for (int g = 0; g < 8; ++g) {  // staging a row: stage_rows' put
        for (int record = 0; record < 2; ++record) {
            std::set<int> banks;
            for (int piece = 0; piece < 8; ++piece) {
                const int which = piece / 4 % 2 == record ? 0 : 1;
                banks.insert(slot(piece / 2, 1, 4 * g + 2 * (piece % 2) + which) % 8);
            }
            EXPECT_EQ(banks.size(), 8u) << g;
        }
    }
}

TEST(MatchTiles, WorkspaceGrowsWithTokensOnly) {
    const auto bytes = [](tiles::Form form, int64_t set) {
        return tiles::workspace(form, 1, set, set, 64, false).total;
    };
    EXPECT_LT(bytes(tiles::Form::kDirect, 98), 98 * 8 + 16);
    for (int64_t set : {1024, 2048, 8192}) {
        EXPECT_EQ(bytes(tiles::Form::kStaged, set), 2 * set * 64 * 4 + set * 8 + 4);
        EXPECT_EQ(tiles::workspace(tiles::Form::kStaged, 1, set, set, 64, false).best % 256, 0);
    }
}

}  // namespace
}  // namespace tome_test
