// match(): against an oracle in double precision that follows the method's description.

#include <algorithm>
#include <numeric>

#include "helpers.h"

namespace tome_test {
namespace {

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
    double threshold = kInf;

    bool hides(int64_t b, int64_t n) const {
        return weight != nullptr && weight[b * shape.tokens + n] == 0;
    }
    bool by_cost() const { return size != nullptr || importance != nullptr; }
    double cost(int64_t b, double similarity, int64_t i, int64_t j) const {
        const auto of = [&](const float* table, int64_t n) {
            return table == nullptr ? 1.0 : double(table[b * shape.tokens + n]);
        };
        return (1 - similarity) * of(size, i) * of(size, j) / (of(size, i) + of(size, j)) *
               of(importance, i);
    }
    double at(int64_t b, int64_t h, int64_t n, int64_t d) const {
        return load(dtype, data, b * stride_batch + h * stride_head + n * stride_token + d);
    }
};

Metric contiguous(const Array& x, const Shape& s) {
    return {x.dtype(), s, x.data(), s.heads * s.tokens * s.dim, s.tokens * s.dim, s.dim};
}

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

Plan run_match(const Metric& m, int64_t r, int64_t prefix, const Threads& threads) {
    const Shape& s = m.shape;
    tome::MatchParams p = params_of(m, r, prefix);
    Plan plan{s.batch, s.tokens, s.tokens - tome::cut_r(p), {}, {}, {}};
    plan.assign.assign(static_cast<size_t>(s.batch * s.tokens), -77);
    plan.members.assign(static_cast<size_t>(s.batch * s.tokens), -77);
    plan.offsets.assign(static_cast<size_t>(s.batch * (plan.rows + 1)), -77);
    p.assign = plan.assign.data(), p.members = plan.members.data();
    p.offsets = plan.offsets.data();
    EXPECT_TRUE(tome::match(p, threads));
    return plan;
}

bool in_set_b(const Metric& m, int64_t n) {
    if (m.targets == nullptr) return n % 2 == 1;
    return std::find(m.targets->begin(), m.targets->end(), n) != m.targets->end();
}

struct Oracle {
    Plan plan;
    double margin = kInf;  // how far the nearest decision is from going the other way
};

constexpr int64_t kDropped = -1;

// One image of the oracle: which token every token joins.
std::vector<int64_t> oracle_joins(const Metric& m, int64_t b, int64_t r, int64_t prefix,
                                  double& margin) {
    const Shape& s = m.shape;
    std::vector<std::vector<double>> unit(static_cast<size_t>(s.tokens));
    std::vector<bool> finite(static_cast<size_t>(s.tokens), true);
    std::vector<int64_t> joins, set_a, set_b;
    for (int64_t n = 0; n < s.tokens; ++n) {
        joins.push_back(n);
        if (n >= prefix && m.hides(b, n)) {
            joins[n] = kDropped;
        } else if (n >= prefix) {
            (in_set_b(m, n) ? set_b : set_a).push_back(n);
        }
        double squares = 0;
        for (int64_t d = 0; d < s.dim; ++d) {
            double mean = 0;
            for (int64_t h = 0; h < s.heads; ++h) mean += m.at(b, h, n, d) / double(s.heads);
            unit[n].push_back(mean);
            squares += mean * mean;
            if (!std::isfinite(mean)) finite[n] = false;
        }
        for (double& value : unit[n]) value = squares > 0 ? value / std::sqrt(squares) : 0.0;
    }
    if (m.targets == nullptr) r = std::min(r, int64_t(set_b.size()));
    if (m.targets != nullptr && set_b.empty()) {
        // The first ones of what does not fit, and the first target, which stands.
        const int64_t seen = prefix + int64_t(set_a.size()), rows = s.tokens - r;
        const int64_t first = m.targets->front();
        if (seen > rows) joins[first] = first;
        for (int64_t k = 0; k < seen + 1 - rows && seen > rows; ++k) joins[set_a[k]] = first;
        return joins;
    }
    r = std::min(r, int64_t(set_a.size()));
    const double least = m.by_cost() ? -(1 - m.threshold) / 2 : m.threshold;
    int64_t near = 0;
    struct Best {
        double score;
        int64_t from, to;
    };
    std::vector<Best> best;
    for (int64_t i : set_a) {
        Best top{-kInf, i, set_b.empty() ? i : set_b[0]};
        double second = -kInf;
        for (int64_t j : set_b) {
            double score = finite[i] && finite[j] ? 0.0 : -kInf;
            for (int64_t d = 0; score != -kInf && d < s.dim; ++d) score += unit[i][d] * unit[j][d];
            second = std::max(second, std::min(score, top.score));
            if (score > top.score) top = {score, i, j};
        }
        if (second != -kInf) margin = std::min(margin, top.score - second);
        if (top.score != -kInf && m.by_cost()) {
            top.score = -m.cost(b, top.score, i, top.to);
        }
        near += top.score != -kInf && top.score >= least;
        margin = std::min(margin, std::abs(top.score - least));
        best.push_back(top);
    }
    if (m.targets == nullptr) near = std::min(near, int64_t(set_b.size()));
    r = std::max(r, near);
    std::stable_sort(best.begin(), best.end(),
                     [](const Best& x, const Best& y) { return x.score > y.score; });
    for (int64_t k = 0; k < r; ++k) joins[best[k].from] = best[k].to;
    if (r > 0 && r < int64_t(best.size()) && best[r].score != -kInf) {
        margin = std::min(margin, best[r - 1].score - best[r].score);
    }
    return joins;
}

Oracle oracle_match(const Metric& m, int64_t r, int64_t prefix) {
    const Shape& s = m.shape;
    const int64_t behind = std::max<int64_t>(0, s.tokens - prefix);
    int64_t most = behind / 2;
    if (m.targets != nullptr) {
        most = m.targets->empty() ? 0 : behind - int64_t(m.targets->size());
    }
    r = std::max<int64_t>(0, std::min(r, most));
    const bool merges = r > 0 || (m.threshold < kInf && most > 0);
    Oracle out;
    std::vector<int32_t> assign(static_cast<size_t>(s.batch * s.tokens));
    for (int64_t b = 0; b < s.batch; ++b) {
        std::vector<int64_t> joins(static_cast<size_t>(s.tokens));
        std::iota(joins.begin(), joins.end(), 0);
        if (merges) joins = oracle_joins(m, b, r, prefix, out.margin);
        int32_t* row_of = assign.data() + b * s.tokens;
        int32_t row = 0;
        // Rows: prefix, A tokens that stay, B tokens. Without merging: the identity.
        for (int group = 0; group < 3; ++group) {
            for (int64_t n = 0; n < s.tokens; ++n) {
                const int of = n < prefix || !merges ? 0 : in_set_b(m, n) ? 2 : 1;
                if (of == group && joins[n] == n) row_of[n] = row++;
            }
        }
        for (int64_t n = 0; n < s.tokens; ++n) {
            row_of[n] = joins[n] == kDropped ? -1 : row_of[joins[n]];
        }
    }
    out.plan = plan_of(assign, s.batch, s.tokens, s.tokens - r);
    return out;
}

// Random tokens whose every decision is clear by far more than float32 rounding.
Array tie_free(DType dtype, const Shape& s, int64_t r, int64_t prefix,
               const float* weight = nullptr, const std::vector<int32_t>* targets = nullptr,
               const float* size = nullptr, const float* importance = nullptr,
               double threshold = kInf) {
    for (unsigned seed = 1; seed < 200; ++seed) {
        Array x = random_array(dtype, s.batch * s.heads * s.tokens * s.dim, seed);
        Metric m = contiguous(x, s);
        m.weight = weight, m.targets = targets, m.size = size, m.importance = importance;
        m.threshold = threshold;
        if (oracle_match(m, r, prefix).margin > 3e-6) return x;
    }
    throw std::runtime_error("no tie-free data for this shape");
}

class MatchTest : public PerDType {};
INSTANTIATE_TEST_SUITE_P(DTypes, MatchTest, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return dtype_name(info.param); });

struct Case {
    Shape shape;
    int64_t r, prefix;
};

TEST_P(MatchTest, AgreesWithOracle) {
    const Case cases[] = {
        {{1, 1, 197, 64}, 16, 1},  {{5, 3, 50, 33}, 8, 2},   {{3, 1, 17, 7}, 100, 0},
        {{2, 12, 65, 64}, 20, 5},  {{2, 2, 31, 5}, 1, 0},    {{1, 1, 90, 130}, 45, 3},
        {{3, 2, 12, 2}, 4, 1},     {{1, 1, 258, 16}, 60, 1}, {{7, 1, 40, 31}, 19, 2},
        {{1, 1, 1200, 256}, 9, 0},  // more of set B than is packed at a time, split over threads
    };
    for (const auto& [shape, r, prefix] : cases) {
        SCOPED_TRACE(::testing::Message() << "tokens " << shape.tokens << " dim " << shape.dim);
        const Array x = tie_free(GetParam(), shape, r, prefix);
        const Plan want = oracle_match(contiguous(x, shape), r, prefix).plan;
        for_each_isa([&, &shape = shape, r = r, prefix = prefix] {
            EXPECT_EQ(run_match(contiguous(x, shape), r, prefix, Threads::serial()), want);
            EXPECT_EQ(run_match(contiguous(x, shape), r, prefix, pool()), want);
        });
    }
}

TEST_P(MatchTest, ReadsTheKeysOfPackedQkvInPlace) {
    const Shape s{2, 3, 37, 16};
    const Array keys = tie_free(GetParam(), s, 9, 1);
    // (batch, tokens, 3, heads, dim): q and v hold NaN, so that reading them would show.
    Array qkv(GetParam(), s.batch * s.tokens * 3 * s.heads * s.dim);
    for (int64_t i = 0; i < qkv.count(); ++i) qkv.set(i, kNaN);
    Metric view{
        GetParam(),         s, qkv.at(s.heads * s.dim), s.tokens * 3 * s.heads * s.dim, s.dim,
        3 * s.heads * s.dim};
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t n = 0; n < s.tokens; ++n) {
                for (int64_t d = 0; d < s.dim; ++d) {
                    qkv.set((((b * s.tokens + n) * 3 + 1) * s.heads + h) * s.dim + d,
                            contiguous(keys, s).at(b, h, n, d));
                }
            }
        }
    }
    for_each_isa([&] {
        EXPECT_EQ(run_match(view, 9, 1, pool()), oracle_match(contiguous(keys, s), 9, 1).plan);
    });
}

TEST_P(MatchTest, TiesGoToTheLowerIndex) {
    // Unit vectors along axes: every score is exactly 0 or 1 in any order of summation.
    for (int64_t dim : {1, 4, 19, 64}) {
        const Shape s{2, 1, 83, dim};
        Array x(GetParam(), s.batch * s.tokens * dim);
        std::mt19937 engine(3);
        for (int64_t i = 0; i < s.batch * s.tokens; ++i) {
            const auto axis = int64_t(engine() % uint64_t(std::min<int64_t>(dim, 5)));
            for (int64_t d = 0; d < dim; ++d) x.set(i * dim + d, d == axis ? 2.0 : 0.0);
        }
        for (int64_t r : {1, 10, 41}) {
            const Plan want = oracle_match(contiguous(x, s), r, 1).plan;
            for_each_isa([&] { EXPECT_EQ(run_match(contiguous(x, s), r, 1, pool()), want); });
        }
    }
}

TEST_P(MatchTest, EqualTokensTieWhereverTheyAre) {
    // A vector whose squares do not sum exactly, at every place of a tile and a panel.
    const Shape s{1, 2, 151, 37};
    Array x(GetParam(), s.heads * s.tokens * s.dim);
    const Array token = random_array(GetParam(), s.heads * s.dim, 5);
    for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t n = 0; n < s.tokens; ++n) {
            for (int64_t d = 0; d < s.dim; ++d) {
                x.set((h * s.tokens + n) * s.dim + d, token[h * s.dim + d]);
            }
        }
    }
    std::vector<int32_t> assign(151);  // tokens 0, 2, .. 2 (r - 1) join token 1
    const int32_t r = 30, first_b = 76 - r;
    for (int32_t n = 0; n < 151; ++n) {
        assign[static_cast<size_t>(n)] = n % 2 ? first_b + n / 2 : n < 2 * r ? first_b : n / 2 - r;
    }
    const Plan want = plan_of(assign, 1, 151, 151 - r);
    for_each_isa([&] { EXPECT_EQ(run_match(contiguous(x, s), r, 0, pool()), want); });
}

TEST_P(MatchTest, BadTokensDoNotCorruptOthers) {
    const Shape s{3, 2, 60, 24};
    for (int64_t r : {5, 25, 29}) {
        Array x = tie_free(GetParam(), s, r, 2);
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
        const Plan want = oracle_match(contiguous(x, s), r, 2).plan;
        for_each_isa([&] { EXPECT_EQ(run_match(contiguous(x, s), r, 2, pool()), want); });
    }
}

TEST_P(MatchTest, ZeroVectorsScoreZero) {
    const Shape s{1, 1, 12, 3};
    Array x(GetParam(), 36);
    for (int64_t i = 0; i < 36; ++i) x.set(i, 0.0);
    // B tokens 1 and 3 point one way, A tokens 0 and 2 the other: both prefer the zero token 5.
    for (int64_t n : {1, 3}) x.set(n * 3, 1.0);
    for (int64_t n : {0, 2}) x.set(n * 3, -1.0);
    for_each_isa([&] {
        const Plan got = run_match(contiguous(x, s), 2, 0, pool());
        EXPECT_EQ(got, oracle_match(contiguous(x, s), 2, 0).plan);
        EXPECT_EQ(got.assign[0], got.assign[5]);
        EXPECT_EQ(got.assign[2], got.assign[5]);
    });
}

TEST_P(MatchTest, LengthDoesNotMatter) {
    const Shape s{1, 1, 64, 40};
    // Far past where squares overflow or vanish in the arithmetic's own precision.
    const int exponent = GetParam() == DType::kFloat64   ? 900
                         : GetParam() == DType::kFloat16 ? 8
                                                         : 110;
    const Array x = tie_free(GetParam(), s, 20, 0);
    const Plan want = oracle_match(contiguous(x, s), 20, 0).plan;
    const int lowest = GetParam() == DType::kFloat16 ? 0 : -exponent;  // float16 rounds below
    for (int by : {exponent, lowest}) {
        Array scaled(GetParam(), x.count());
        for (int64_t i = 0; i < x.count(); ++i) {
            scaled.set(i, std::ldexp(x[i], i / s.dim % 3 == 0 ? by : 0));
        }
        for_each_isa([&] { EXPECT_EQ(run_match(contiguous(scaled, s), 20, 0, pool()), want); });
    }
}

TEST_P(MatchTest, CutsRAndTakesDegenerateShapes) {
    for (int64_t tokens : {0, 1, 2, 3, 4, 9}) {
        for (int64_t prefix : {0, 1, 2, 5, 20}) {
            for (int64_t r : {int64_t{-3}, int64_t{0}, int64_t{1}, int64_t{4},
                              std::numeric_limits<int64_t>::max()}) {
                for (int64_t dim : {0, 1, 3}) {
                    for (int64_t batch : {0, 2}) {
                        const Shape s{batch, 1, tokens, dim};
                        Array x(GetParam(), batch * tokens * dim);
                        for (int64_t i = 0; i < x.count(); ++i) x.set(i, i % 3 == 0 ? 1.0 : 0.0);
                        const Plan want = oracle_match(contiguous(x, s), r, prefix).plan;
                        for_each_isa([&] {
                            EXPECT_EQ(run_match(contiguous(x, s), r, prefix, pool()), want)
                                << "tokens " << tokens << " prefix " << prefix << " r " << r
                                << " dim " << dim;
                        });
                    }
                }
            }
        }
    }
}

// Weights of every kind of image: none hidden, some, all but one, one set, all.
std::vector<float> some_weights(const Shape& s, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<float> out;
    for (int64_t b = 0; b < s.batch; ++b) {
        const auto one = int64_t(engine() % uint64_t(std::max<int64_t>(1, s.tokens)));
        for (int64_t n = 0; n < s.tokens; ++n) {
            const bool seen[] = {true,
                                 engine() % 3 != 0,
                                 engine() % 3 == 0,
                                 n == one,
                                 n % 2 == 0,
                                 n % 2 == 1,
                                 false,
                                 n < one};
            out.push_back(seen[b % 8] ? float(1 + engine() % 3) : n % 3 == 0 ? -0.0f : 0.0f);
        }
    }
    return out;
}

TEST_P(MatchTest, HiddenTokensTakeNoPart) {
    for (const auto& [shape, r, prefix] : {Case{{8, 1, 50, 33}, 8, 2},
                                           {{8, 3, 31, 16}, 15, 0},
                                           {{8, 1, 64, 20}, 100, 1},
                                           {{8, 1, 7, 4}, 2, 1},
                                           {{8, 2, 90, 5}, 1, 3}}) {
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, r " << r);
        const std::vector<float> weight = some_weights(shape, 17);
        Array x = tie_free(GetParam(), shape, r, prefix, weight.data());
        const auto view = [&, &shape = shape] {
            Metric m = contiguous(x, shape);
            m.weight = weight.data();
            return m;
        };
        const Plan want = oracle_match(view(), r, prefix).plan;
        for_each_isa([&, &shape = shape, r = r, prefix = prefix] {
            EXPECT_EQ(run_match(view(), r, prefix, Threads::serial()), want);
            EXPECT_EQ(run_match(view(), r, prefix, pool()), want);
            Metric all = contiguous(x, shape);
            const std::vector<float> ones(weight.size(), 1.0f);
            all.weight = ones.data();
            EXPECT_EQ(run_match(all, r, prefix, pool()),
                      run_match(contiguous(x, shape), r, prefix, pool()));
        });
        // What they hold changes nothing.
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t n = prefix; n < shape.tokens; ++n) {
                if (!view().hides(b, n)) continue;
                for (int64_t h = 0; h < shape.heads; ++h) {
                    x.set(((b * shape.heads + h) * shape.tokens + n) * shape.dim, kNaN);
                }
            }
        }
        for_each_isa(
            [&, r = r, prefix = prefix] { EXPECT_EQ(run_match(view(), r, prefix, pool()), want); });
    }
}

TEST_P(MatchTest, TargetsAreWhatOthersMergeInto) {
    const Shape shape{8, 2, 45, 12};
    const std::vector<float> weight = some_weights(shape, 23);
    const std::vector<int32_t> sets[] = {
        {2}, {44}, {5, 6, 7, 8}, {2, 7, 12, 17, 22, 27, 32, 37, 42}, {3, 5, 43, 44}};
    for (const auto& targets : sets) {
        for (int64_t r : {1, 9, 30, 100}) {
            for (const float* weights : {static_cast<const float*>(nullptr), weight.data()}) {
                const Array x = tie_free(GetParam(), shape, r, 2, weights, &targets);
                Metric m = contiguous(x, shape);
                m.weight = weights, m.targets = &targets;
                SCOPED_TRACE(::testing::Message() << targets.size() << " targets, r " << r);
                const Plan want = oracle_match(m, r, 2).plan;
                for_each_isa([&] {
                    EXPECT_EQ(run_match(m, r, 2, Threads::serial()), want);
                    EXPECT_EQ(run_match(m, r, 2, pool()), want);
                });
            }
        }
    }
    std::vector<int32_t> all(43), none;
    std::iota(all.begin(), all.end(), 2);
    const Array x = random_array(GetParam(), shape.batch * shape.heads * 45 * 12, 1);
    for (const auto* targets : {&all, &none}) {    // nothing to merge, or nothing to merge into
        if (targets->data() == nullptr) continue;  // stands for the odd positions
        Metric m = contiguous(x, shape);
        m.targets = targets;
        EXPECT_EQ(run_match(m, 7, 2, pool()).rows, 45);
    }
}

TEST_P(MatchTest, RanksByWhatMergingCosts) {
    const std::vector<int32_t> targets = {3, 4, 9, 15, 16, 29};
    for (const auto& [shape, r, prefix] :
         {Case{{3, 2, 31, 16}, 9, 2}, {{8, 1, 50, 33}, 8, 1}, {{1, 3, 197, 64}, 13, 1}}) {
        SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, r " << r);
        std::mt19937 engine(5);
        std::vector<float> size, importance;
        for (int64_t i = 0; i < shape.batch * shape.tokens; ++i) {
            size.push_back(float(1 + engine() % 9));
            importance.push_back(0.1f + float(engine() % 100) / 100);
        }
        const std::vector<float> weight = some_weights(shape, 11);
        for (int given = 1; given < 8; ++given) {
            const float* sizes = given % 2 != 0 ? size.data() : nullptr;
            const float* counts = given / 2 % 2 != 0 ? importance.data() : nullptr;
            const float* weights = given / 4 != 0 ? weight.data() : nullptr;
            const auto* into = shape.tokens == 31 ? &targets : nullptr;
            const Array x = tie_free(GetParam(), shape, r, prefix, weights, into, sizes, counts);
            Metric m = contiguous(x, shape);
            m.weight = weights, m.targets = into, m.size = sizes, m.importance = counts;
            const Plan want = oracle_match(m, r, prefix).plan;
            for_each_isa([&, r = r, prefix = prefix] {
                EXPECT_EQ(run_match(m, r, prefix, Threads::serial()), want) << given;
                EXPECT_EQ(run_match(m, r, prefix, pool()), want) << given;
            });
        }
    }
}

// Another number of tokens in each image, at least r; with hidden ones, targets and costs too.
TEST_P(MatchTest, MergesWhatIsAsSimilarAsTheThreshold) {
    const Shape shape{4, 2, 61, 8};
    const std::vector<int32_t> targets = {3, 4, 9, 15, 16, 29, 44, 45, 60};
    const std::vector<float> weight = some_weights(shape, 11);
    std::mt19937 engine(5);
    std::vector<float> size;
    for (int64_t i = 0; i < shape.batch * shape.tokens; ++i)
        size.push_back(float(1 + engine() % 3));
    for (int given = 0; given < 8; ++given) {
        const float* weights = given % 2 != 0 ? weight.data() : nullptr;
        const auto* into = given / 2 % 2 != 0 ? &targets : nullptr;
        const float* sizes = given / 4 != 0 ? size.data() : nullptr;
        for (const double threshold : {-9.0, 0.55, 0.7, 0.999}) {
            for (const int64_t r : {0, 9}) {
                SCOPED_TRACE(::testing::Message() << given << ", " << threshold << ", r " << r);
                const Array x =
                    tie_free(GetParam(), shape, r, 2, weights, into, sizes, nullptr, threshold);
                Metric m = contiguous(x, shape);
                m.weight = weights, m.targets = into, m.size = sizes, m.threshold = threshold;
                const Plan want = oracle_match(m, r, 2).plan;
                for_each_isa([&, r = r] {
                    EXPECT_EQ(run_match(m, r, 2, Threads::serial()), want);
                    EXPECT_EQ(run_match(m, r, 2, pool()), want);
                });
            }
        }
    }
}

TEST_P(MatchTest, AThresholdNeverMergesWhatMayNot) {
    const Shape shape{1, 1, 12, 4};
    Array x = random_array(GetParam(), 12 * 4, 1);
    for (int64_t i = 0; i < 12 * 4; ++i) x.set(i, std::numeric_limits<double>::quiet_NaN());
    Metric m = contiguous(x, shape);
    m.threshold = -1e300;
    const Plan plan = run_match(m, 0, 1, pool());
    EXPECT_EQ(plan.offsets.back(), 12);
    for (int64_t row = 0; row < 12; ++row) EXPECT_EQ(plan.offsets[size_t(row)], row);
    const std::vector<float> hidden(12, 0.0f);
    m.weight = hidden.data();
    for (int32_t row : run_match(m, 0, 0, pool()).assign) EXPECT_EQ(row, -1);
}

TEST_P(MatchTest, RefusesTargetsOutOfRangeOrOrder) {
    const Shape shape{2, 1, 12, 4};
    const Array x = random_array(GetParam(), 2 * 12 * 4, 1);
    for (const auto& [targets, at] : std::vector<std::pair<std::vector<int32_t>, int64_t>>{
             {{3, 3}, 1}, {{5, 4}, 1}, {{0, 4}, 0}, {{-1}, 0}, {{4, 12}, 1}, {{INT32_MAX}, 0}}) {
        Metric m = contiguous(x, shape);
        m.targets = &targets;
        const tome::Status status = tome::match(params_of(m, 3, 1), pool());  // writes nothing
        EXPECT_EQ(status.code, tome::Status::kTargetsNotOrdered);
        EXPECT_EQ(status.index, at);
        EXPECT_EQ(status.value, targets[size_t(at)]);
    }
}

TEST_P(MatchTest, PaddedImagesGiveWhatTheyGiveAlone) {
    const Shape padded{1, 2, 60, 24};
    const Array x = random_array(GetParam(), padded.heads * padded.tokens * padded.dim, 3);
    for (int64_t tokens : {1, 2, 5, 30, 41, 59, 60}) {
        for (int64_t r : {1, 9, 20, 30}) {
            for (int64_t prefix : {0, 1, 2}) {
                if (tokens < prefix) continue;
                std::vector<float> weight(60, 0.0f);
                std::fill_n(weight.begin(), tokens, 1.0f);
                Metric m = contiguous(x, padded), alone = m;
                m.weight = weight.data();
                alone.shape.tokens = tokens;
                const Plan got = run_match(m, r, prefix, pool());
                const Plan want = run_match(alone, r, prefix, pool());
                SCOPED_TRACE(::testing::Message()
                             << tokens << " tokens, r " << r << ", " << prefix);
                EXPECT_TRUE(std::equal(want.assign.begin(), want.assign.end(), got.assign.begin()));
                EXPECT_TRUE(
                    std::equal(want.members.begin(), want.members.end(), got.members.begin()));
                for (size_t n = size_t(tokens); n < 60; ++n) EXPECT_EQ(got.assign[n], -1);
                const int64_t rows = std::min(want.rows, got.rows);
                for (int64_t m = 0; m <= rows; ++m) EXPECT_EQ(got.offsets[m], want.offsets[m]);
                for (int64_t m = rows; m <= got.rows; ++m) EXPECT_EQ(got.offsets[m], tokens);
            }
        }
    }
}

TEST_P(MatchTest, AnImageDoesNotDependOnItsBatchOrTheThreads) {
    const Shape s{5, 2, 99, 48};  // ties and near-ties included: no oracle, the same bits
    const Array x = random_array(GetParam(), s.batch * s.heads * s.tokens * s.dim, 9);
    for_each_isa([&] {
        const Plan all = run_match(contiguous(x, s), 30, 1, Threads::serial());
        EXPECT_EQ(run_match(contiguous(x, s), 30, 1, pool()), all);
        for (int64_t b = 0; b < s.batch; ++b) {
            Metric one = contiguous(x, {1, s.heads, s.tokens, s.dim});
            one.data = x.at(b * one.stride_batch);
            const Plan alone = run_match(one, 30, 1, pool());
            const auto begin = all.assign.begin() + b * s.tokens;
            EXPECT_EQ(alone.assign, std::vector<int32_t>(begin, begin + s.tokens));
        }
    });
}

TEST_P(MatchTest, TakesAnyNumbers) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    const Shape s{2, 1, 9, 4};
    const Array x = random_array(GetParam(), 2 * 9 * 4, 1);
    const std::vector<int32_t> targets{2, 5};
    Metric m = contiguous(x, s);
    EXPECT_EQ(run_match(m, kMost, 1, pool()), run_match(m, 4, 1, pool()));
    for (int64_t prefix : {int64_t{9}, int64_t{10}, kMost - 1, kMost}) {
        EXPECT_EQ(run_match(m, kMost, prefix, pool()), run_match(m, 0, 0, pool())) << prefix;
    }
    m.targets = &targets;
    EXPECT_EQ(run_match(m, kMost, 1, pool()), run_match(m, 6, 1, pool()));
    EXPECT_EQ(tome::cut_r(params_of(m, 3, kMost)), 0);
}

TEST(CutR, FollowsItsRule) {
    static_assert(tome::cut_r(197, 16, 1) == 16);
    static_assert(tome::cut_r(197, 1000, 1) == 98);
    static_assert(tome::cut_r(10, 5, 9) == 0);
    static_assert(tome::cut_r(3, 5, 20) == 0);
    static_assert(tome::cut_r(10, -1, 0) == 0);
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    static_assert(tome::cut_r(197, kMost, 1) == 98);
    static_assert(tome::cut_r(197, std::numeric_limits<int64_t>::min(), 1) == 0);
    static_assert(tome::cut_r(10, 3, kMost) == 0);
    EXPECT_EQ(tome::cut_r(0, 1, 0), 0);
}

}  // namespace
}  // namespace tome_test
