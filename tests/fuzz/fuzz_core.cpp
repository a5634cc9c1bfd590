// A libFuzzer target: every function of tome_core that takes a plan, tokens or heads, on shapes,
// strides, values and plans that the input's bytes choose, bad plans among them.
//
// What it demands: no access outside the arrays (their memory ends where they do, and
// AddressSanitizer watches), a refused plan leaves every output untouched, results are those of the
// oracles of tests/cpp where inputs are finite, and the same bits on one thread and on several.
#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include "attention_inputs.h"
#include "attention_oracle.h"
#include "helpers.h"
#include "merge_add_norm_oracle.h"
#include "tome_core/thread_pool.h"

namespace tome_test {
namespace {

// Choices read from the front of the input; when it has ended, those of an engine that it seeds.
class Choices {
  public:
    Choices(const uint8_t* data, size_t size) : data_(data), end_(data + size) {
        for (const uint8_t* p = data_; p < end_; ++p) seed_ = seed_ * 31 + *p;
        engine_.seed(seed_);
    }

    int64_t between(int64_t low, int64_t high) {
        const auto span = static_cast<uint64_t>(high - low) + 1;
        return low + static_cast<int64_t>(byte() * 256ull + byte()) % static_cast<int64_t>(span);
    }
    bool one_in(int64_t n) { return between(1, n) == 1; }

    // `wild` values may be anything that a float can hold.
    double value(bool wild) {
        static constexpr double kSpecials[] = {kNaN,  kInf,  -kInf,   0.0,  -0.0,  1e-42,
                                               -1e-5, 65504, 3.39e38, -1e9, 1e-30, 1.0};
        const int64_t drawn = between(0, 0xffff);
        if (wild && drawn % 8 == 0) return kSpecials[size_t(drawn / 8) % std::size(kSpecials)];
        return double(drawn - 0x8000) / 0x2000;
    }

  private:
    unsigned byte() { return data_ < end_ ? *data_++ : static_cast<unsigned>(engine_() & 0xff); }

    const uint8_t* data_;
    const uint8_t* end_;
    uint32_t seed_ = 0;
    std::mt19937 engine_;
};

DType some_dtype(Choices& c) { return kDTypes[size_t(c.between(0, 3))]; }

// Mostly small: what is odd happens around the widths of vectors and tiles.
int64_t some_count(Choices& c, int64_t most) {
    return c.one_in(4) ? c.between(0, most) : c.between(0, std::min<int64_t>(most, 9));
}

Array some_values(Choices& c, DType dtype, int64_t count, bool wild) {
    Array out(dtype, count);
    for (int64_t i = 0; i < count; ++i) out.set(i, c.value(wild));
    return out;
}

// Sizes as they are allowed: 0 or more. Empty stands for none.
std::vector<float> some_sizes(Choices& c, int64_t count, bool wild) {
    std::vector<float> out;
    if (c.one_in(3)) return out;
    for (int64_t i = 0; i < count; ++i) {
        const auto size = static_cast<float>(c.between(0, 5));
        out.push_back(wild && c.one_in(16) ? size * 1e30f : size);
    }
    return out;
}

bool all_finite(const Array& x) {
    for (int64_t i = 0; i < x.count(); ++i) {
        if (!std::isfinite(x[i])) return false;
    }
    return true;
}

template <class T>
const T* or_null(const std::vector<T>& x) {
    return x.empty() ? nullptr : x.data();
}

// Tokens (batch, tokens, channels) with room between the rows, of which the last one ends the
// memory.
struct Rows {
    int64_t stride_batch, stride_row;
    Array memory;

    Rows(Choices& c, DType dtype, int64_t batch, int64_t rows, int64_t channels, bool wild)
        : stride_row(channels + (c.one_in(3) ? c.between(0, 5) : 0)), memory(dtype, 0) {
        stride_batch = rows * stride_row + (c.one_in(3) ? c.between(0, 7) : 0);
        const bool none = batch * rows * channels == 0;
        const int64_t last = (batch - 1) * stride_batch + (rows - 1) * stride_row + channels;
        memory = some_values(c, dtype, none ? 0 : last, wild);
    }
    double at(int64_t b, int64_t n, int64_t channel) const {
        return memory[b * stride_batch + n * stride_row + channel];
    }
};

// A plan, and perhaps an entry of it spoiled.
struct SomePlan {
    Plan plan;
    bool valid = true;

    SomePlan(Choices& c, int64_t batch, int64_t tokens, int64_t rows) {
        std::vector<int32_t> assign;
        for (int64_t i = 0; i < batch * tokens; ++i) {
            assign.push_back(static_cast<int32_t>(c.between(-1, rows - 1)));
        }
        plan = plan_of(assign, batch, tokens, rows);
        if (c.one_in(3)) spoil(c, plan.members);
        if (c.one_in(3)) spoil(c, plan.offsets);
        if (c.one_in(3)) spoil(c, plan.assign);
        valid = describes_groups();
    }

    // By its definition in merge.h: offsets ascend from 0 to at most N, and every token is a member
    // at most once.
    bool describes_groups() const {
        for (int64_t b = 0; b < plan.batch; ++b) {
            const int32_t* offsets = plan.offsets.data() + b * (plan.rows + 1);
            if (offsets[0] != 0 || offsets[plan.rows] > plan.tokens) return false;
            for (int64_t m = 0; m < plan.rows; ++m) {
                if (offsets[m] > offsets[m + 1]) return false;
            }
            std::set<int32_t> seen;
            for (int64_t n = 0; n < plan.tokens; ++n) {
                const int32_t member = plan.members[size_t(b * plan.tokens + n)];
                if (member < 0 || member >= plan.tokens) return false;
                if (!seen.insert(member).second) return false;
            }
        }
        return true;
    }
    bool assigns_rows() const {
        return std::all_of(plan.assign.begin(), plan.assign.end(),
                           [&](int32_t row) { return row >= -1 && row < plan.rows; });
    }

  private:
    static void spoil(Choices& c, std::vector<int32_t>& table) {
        static constexpr int32_t kWrong[] = {-1, 0, 1, 70, -2, 1 << 30, INT32_MIN, INT32_MAX};
        if (table.empty()) return;
        const auto at = size_t(c.between(0, int64_t(table.size()) - 1));
        table[at] = kWrong[size_t(c.between(0, 7))];
    }
};

// --- one function each -------------------------------------------------------------------------

// On one thread and on three: the same bits in everything it returns.
template <class Run>
auto on_any_threads(const Run& run) {
    auto result = run(Threads::serial());
    EXPECT_TRUE(run(pool()) == result) << "threads change the result";
    return result;
}

double similarity(const Array& metric, int64_t a, int64_t b, int64_t dim) {
    double dot = 0, a_squares = 0, b_squares = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const double x = metric[a * dim + d], y = metric[b * dim + d];
        dot += x * y, a_squares += x * x, b_squares += y * y;
    }
    return a_squares == 0 || b_squares == 0 ? 0.0 : dot / std::sqrt(a_squares * b_squares);
}

void fuzz_match(Choices& c) {
    const DType dtype = some_dtype(c);
    const int64_t batch = c.between(0, 3), heads = c.between(1, 3), tokens = some_count(c, 90);
    const int64_t dim = some_count(c, 70), prefix = c.one_in(8) ? tokens + 3 : some_count(c, 4);
    const bool wild = c.one_in(2);
    const Array metric = some_values(c, dtype, batch * heads * tokens * dim, wild);
    const std::vector<float> weight = some_sizes(c, batch * tokens, false);
    const std::vector<float> size = some_sizes(c, batch * tokens, wild);
    const std::vector<float> importance = some_sizes(c, batch * tokens, wild);
    std::vector<int32_t> targets;
    for (int64_t n = prefix; n < tokens; ++n) {
        if (c.one_in(3)) targets.push_back(static_cast<int32_t>(n));
    }
    const bool spoiled = !targets.empty() && c.one_in(8);
    if (spoiled) targets.back() = c.one_in(2) ? static_cast<int32_t>(tokens) : -1;
    const bool has_targets = !targets.empty() && (spoiled || c.one_in(2));

    tome::MatchParams p{};
    p.metric = metric.data(), p.dtype = dtype;
    p.batch = batch, p.heads = heads, p.tokens = tokens, p.dim = dim;
    p.stride_batch = heads * tokens * dim, p.stride_head = tokens * dim, p.stride_token = dim;
    p.r = c.between(-2, 60), p.num_prefix_tokens = prefix;
    p.weight = or_null(weight);
    p.size = or_null(size), p.importance = or_null(importance);
    if (c.one_in(4)) p.threshold = double(c.between(-4, 5)) / 4;
    if (has_targets) p.targets = targets.data(), p.num_targets = int64_t(targets.size());
    const int64_t rows = tokens - tome::cut_r(p);

    constexpr int32_t kPoison = -77;
    const Plan plan = on_any_threads([&](const Threads& threads) {
        const std::vector<int32_t> per_token(size_t(batch * tokens), kPoison);
        Plan got{batch,     tokens,    rows,
                 per_token, per_token, std::vector<int32_t>(size_t(batch * (rows + 1)), kPoison)};
        p.assign = got.assign.data(), p.members = got.members.data();
        p.offsets = got.offsets.data();
        EXPECT_EQ(bool(tome::match(p, threads)), !spoiled);
        return got;
    });
    const auto untouched = [&](int32_t entry) { return entry == kPoison; };
    if (spoiled) {
        EXPECT_TRUE(std::all_of(plan.assign.begin(), plan.assign.end(), untouched));
        EXPECT_TRUE(std::all_of(plan.offsets.begin(), plan.offsets.end(), untouched));
        return;
    }
    EXPECT_EQ(plan, plan_of(plan.assign, batch, tokens, rows));
    if (!tome::may_merge(p)) return;
    for (int64_t b = 0; b < batch; ++b) {
        const int32_t* assign = plan.assign.data() + b * tokens;
        const auto hidden = [&](int64_t n) {
            return n >= prefix && p.weight != nullptr && weight[size_t(b * tokens + n)] == 0;
        };
        const bool none_visible =
            has_targets && std::all_of(targets.begin(), targets.end(), hidden);
        const int64_t stands = none_visible ? targets.front() : -1;
        for (int64_t n = 0; n < tokens; ++n) {
            // Where all targets are hidden, the first may stand for the others.
            if (n != stands) {
                EXPECT_EQ(assign[n] == -1, hidden(n)) << "only hidden tokens are dropped";
            }
            if (n < prefix) {
                EXPECT_EQ(assign[n], n);
            }
        }
        if (wild || heads != 1 || has_targets || p.weight != nullptr) continue;
        // Whatever merged, merged into the most similar, up to rounding.
        const Array image = [&] {
            Array part(dtype, tokens * dim);
            for (int64_t i = 0; i < part.count(); ++i) part.set(i, metric[b * tokens * dim + i]);
            return part;
        }();
        for (int64_t a = prefix + prefix % 2; a < tokens; a += 2) {
            double best = -kInf, taken = kInf;
            for (int64_t t = prefix + 1 - prefix % 2; t < tokens; t += 2) {
                const double found = similarity(image, a, t, dim);
                best = std::max(best, found);
                if (assign[t] == assign[a]) taken = found;
            }
            if (taken != kInf) {
                EXPECT_GE(taken, best - 1e-5);
            }
        }
    }
}

void fuzz_plan(Choices& c) {
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 90), rows = some_count(c, 90);
    const SomePlan some(c, batch, tokens, rows);
    Plan got = some.plan;
    std::fill(got.members.begin(), got.members.end(), -77);
    std::fill(got.offsets.begin(), got.offsets.end(), -77);
    const Plan before = got;
    const bool fits = some.assigns_rows();
    EXPECT_EQ(bool(tome::plan({some.plan.assign.data(), batch, tokens, rows, got.members.data(),
                               got.offsets.data()},
                              pool())),
              fits);
    EXPECT_EQ(got, fits ? plan_of(some.plan.assign, batch, tokens, rows) : before);
}

struct Merged {
    bool taken;
    Array out;
    std::vector<float> size;

    bool operator==(const Merged&) const = default;
};

void fuzz_merge(Choices& c) {
    const DType dtype = some_dtype(c);
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 60), rows = some_count(c, 60);
    const int64_t channels = some_count(c, 200);
    const bool wild = c.one_in(2);
    const SomePlan some(c, batch, tokens, rows);
    const Rows x(c, dtype, batch, tokens, channels, wild);
    const std::vector<float> size = some_sizes(c, batch * tokens, wild);
    const auto reduce = static_cast<tome::Reduce>(c.between(0, 2));
    const Merged got = on_any_threads([&](const Threads& threads) {
        Merged run{false, Array(dtype, batch * rows * channels),
                   std::vector<float>(size_t(batch * rows), -77.0f)};
        const tome::MergeParams p{x.memory.data(),
                                  dtype,
                                  batch,
                                  tokens,
                                  rows,
                                  channels,
                                  x.stride_batch,
                                  x.stride_row,
                                  or_null(size),
                                  some.plan.members.data(),
                                  some.plan.offsets.data(),
                                  reduce,
                                  run.out.data(),
                                  run.size.data()};
        run.taken = bool(tome::merge(p, threads));
        return run;
    });
    EXPECT_EQ(got.taken, some.valid);
    if (!some.valid) {
        EXPECT_TRUE(got.out.untouched());
        EXPECT_TRUE(
            std::all_of(got.size.begin(), got.size.end(), [](float s) { return s == -77; }));
        return;
    }
    if (wild) return;
    for (int64_t flat = 0; flat < batch * rows; ++flat) {
        const int64_t b = flat / rows;
        const int32_t* offsets = some.plan.offsets.data() + b * (rows + 1) + flat % rows;
        const int32_t* members = some.plan.members.data() + b * tokens;
        const auto size_of = [&](int64_t n) {
            return size.empty() ? 1.0 : double(size[size_t(b * tokens + n)]);
        };
        const int64_t count = offsets[1] - offsets[0];
        double total = 0;
        for (int64_t m = offsets[0]; m < offsets[1]; ++m) total += size_of(members[m]);
        EXPECT_EQ(got.size[size_t(flat)], static_cast<float>(total));
        for (int64_t channel = 0; channel < channels; ++channel) {
            double sum = 0, terms = 0, most = -kInf;
            const bool even = reduce == tome::Reduce::kMean && (count == 1 || total == 0);
            for (int64_t m = offsets[0]; m < offsets[1]; ++m) {
                const double value = x.at(b, members[m], channel);
                const double weight = even ? 1.0 : size_of(members[m]);
                sum += weight * value, terms += weight * std::fabs(value);
                most = std::max(most, value);
            }
            const double divisor = reduce == tome::Reduce::kSum || count == 0 ? 1.0
                                   : even                                     ? double(count)
                                                                              : total;
            const double want = count == 0                      ? 0.0
                                : reduce == tome::Reduce::kAmax ? most
                                                                : sum / divisor;
            const double allowed =
                reduce == tome::Reduce::kAmax
                    ? 0.0
                    : roundoff_of(dtype) * std::fabs(want) * 1.01 +
                          double(count + 4) * sum_roundoff_of(dtype) * terms / divisor +
                          (dtype == DType::kFloat16 ? 0x1p-25 : 0.0);
            EXPECT_LE(std::fabs(got.out[flat * channels + channel] - want), allowed);
        }
    }
}

void fuzz_merge_backward(Choices& c) {
    const DType dtype = some_dtype(c);
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 60), rows = some_count(c, 60);
    const int64_t channels = some_count(c, 200);
    const SomePlan some(c, batch, tokens, rows);
    const Rows grad(c, dtype, batch, rows, channels, c.one_in(2));
    const std::vector<float> size = some_sizes(c, batch * tokens, false);
    const bool sum = c.one_in(2);
    const Merged got = on_any_threads([&](const Threads& threads) {
        Merged run{false, Array(dtype, batch * tokens * channels), {}};
        const tome::MergeBackwardParams p{grad.memory.data(),
                                          dtype,
                                          batch,
                                          tokens,
                                          rows,
                                          channels,
                                          grad.stride_batch,
                                          grad.stride_row,
                                          or_null(size),
                                          some.plan.members.data(),
                                          some.plan.offsets.data(),
                                          sum ? tome::Reduce::kSum : tome::Reduce::kMean,
                                          run.out.data()};
        run.taken = bool(tome::merge_backward(p, threads));
        return run;
    });
    EXPECT_EQ(got.taken, some.valid);
    if (!some.valid) EXPECT_TRUE(got.out.untouched());
    if (!some.valid || !sum || !size.empty()) return;
    // Without sizes the adjoint of the sum copies: a token gets the bits of its row's gradient.
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t row = 0; row < rows; ++row) {
            const int32_t* offsets = some.plan.offsets.data() + b * (rows + 1) + row;
            for (int64_t m = offsets[0]; m < offsets[1]; ++m) {
                const int64_t n = some.plan.members[size_t(b * tokens + m)];
                for (int64_t channel = 0; channel < channels; ++channel) {
                    const double want = grad.at(b, row, channel);
                    const double found = got.out[(b * tokens + n) * channels + channel];
                    EXPECT_TRUE(found == want || (std::isnan(found) && std::isnan(want)));
                }
            }
        }
    }
}

void fuzz_unmerge(Choices& c) {
    const DType dtype = some_dtype(c);
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 60), rows = some_count(c, 60);
    const int64_t channels = some_count(c, 200);
    const SomePlan some(c, batch, tokens, rows);
    const Rows x(c, dtype, batch, rows, channels, c.one_in(2));
    const Merged got = on_any_threads([&](const Threads& threads) {
        Merged run{false, Array(dtype, batch * tokens * channels), {}};
        const tome::UnmergeParams p{x.memory.data(), dtype,        batch,
                                    tokens,          rows,         channels,
                                    x.stride_batch,  x.stride_row, some.plan.assign.data(),
                                    run.out.data()};
        run.taken = bool(tome::unmerge(p, threads));
        return run;
    });
    EXPECT_EQ(got.taken, some.assigns_rows());
    if (!got.taken) {
        EXPECT_TRUE(got.out.untouched());
        return;
    }
    const Array zero = [&] {
        Array one(dtype, 1);
        one.set(0, 0.0);
        return one;
    }();
    for (int64_t i = 0; i < got.out.count(); ++i) {
        const int64_t flat = i / channels, b = flat / tokens;
        const int32_t row = some.plan.assign[size_t(flat)];
        EXPECT_TRUE(row == -1
                        ? got.out.same(i, zero, 0)
                        : got.out.same(i, x.memory,
                                       b * x.stride_batch + row * x.stride_row + i % channels));
    }
}

void fuzz_merge_add_norm(Choices& c) {
    const DType dtype = some_dtype(c);
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 40), rows = some_count(c, 40);
    const int64_t channels = some_count(c, 200);
    const bool wild = c.one_in(2);
    const SomePlan some(c, batch, tokens, rows);
    const Rows x(c, dtype, batch, tokens, channels, wild);
    const Rows branch(c, dtype, batch, tokens, channels, wild);
    const Array vectors[] = {some_values(c, dtype, channels, wild),
                             some_values(c, dtype, channels, wild),
                             some_values(c, dtype, channels, wild)};
    const bool given[] = {c.one_in(2), c.one_in(2), c.one_in(2)};
    const std::vector<float> size = some_sizes(c, batch * tokens, wild);
    const double eps = c.one_in(8) ? 1.0 : 1e-5;
    const bool keep_norms = c.one_in(2);
    bool taken = false;
    const MergeAddNormOutputs got = on_any_threads([&](const Threads& threads) {
        MergeAddNormOutputs run{Array(dtype, batch * rows * channels),
                                Array(dtype, batch * rows * channels),
                                std::vector<float>(size_t(batch * rows), -77.0f)};
        tome::MergeAddNormParams p{};
        p.x = x.memory.data(), p.branch = branch.memory.data(), p.dtype = dtype;
        p.batch = batch, p.tokens = tokens, p.rows = rows, p.channels = channels;
        p.x_stride_batch = x.stride_batch, p.x_stride_token = x.stride_row;
        p.branch_stride_batch = branch.stride_batch, p.branch_stride_token = branch.stride_row;
        p.scale = given[0] ? vectors[0].data() : nullptr;
        p.weight = given[1] ? vectors[1].data() : nullptr;
        p.bias = given[2] ? vectors[2].data() : nullptr;
        p.eps = eps, p.keep_norms = keep_norms;
        p.size = or_null(size);
        p.members = some.plan.members.data(), p.offsets = some.plan.offsets.data();
        p.out = run.out.data(), p.normed = run.normed.data(), p.out_size = run.size.data();
        taken = bool(tome::merge_add_norm(p, threads));
        if (taken && !wild) expect_merge_add_norm(p);
        return run;
    });
    EXPECT_EQ(taken, some.valid);
    if (!taken) EXPECT_TRUE(got.out.untouched() && got.normed.untouched());
}

// (batch, heads, tokens, dim), in either order of heads and tokens.
struct Heads {
    tome::HeadStrides strides;
    Array memory;

    Heads(Choices& c, DType dtype, const AttentionShape& s, int64_t tokens, bool wild)
        : strides(c.one_in(2)
                      ? tome::HeadStrides{s.heads * tokens * s.dim, tokens * s.dim, s.dim}
                      : tome::HeadStrides{s.heads * tokens * s.dim, s.dim, s.heads * s.dim}),
          memory(some_values(c, dtype, s.batch * s.heads * tokens * s.dim, wild)) {}
};

void expect_near(const Array& got, const Doubles& want, const Doubles& allowed) {
    for (int64_t i = 0; i < got.count(); ++i) {
        EXPECT_LE(std::fabs(got[i] - want[size_t(i)]), allowed[size_t(i)]) << "element " << i;
    }
}

void fuzz_attention(Choices& c) {
    const DType dtype = some_dtype(c);
    const AttentionShape s{c.between(0, 2), c.between(1, 3), some_count(c, 70), some_count(c, 70),
                           some_count(c, 70)};
    const bool wild = c.one_in(2);
    const Heads q(c, dtype, s, s.queries, wild), k(c, dtype, s, s.keys, wild);
    const Heads v(c, dtype, s, s.keys, wild), grad(c, dtype, s, s.queries, wild);
    const std::vector<float> size = some_sizes(c, s.batch * s.keys, wild);
    const DType sums = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    const int64_t per_query = s.batch * s.queries * s.heads, per_key = s.batch * s.keys * s.heads;

    tome::AttentionParams p{};
    p.q = q.memory.data(), p.k = k.memory.data(), p.v = v.memory.data(), p.dtype = dtype;
    p.batch = s.batch, p.heads = s.heads, p.queries = s.queries, p.keys = s.keys, p.dim = s.dim;
    p.q_strides = q.strides, p.k_strides = k.strides, p.v_strides = v.strides;
    p.size = or_null(size);
    p.scale = c.one_in(8) ? c.value(false) : 1 / std::sqrt(double(s.dim + 1));
    const auto [out, lse] = on_any_threads([&](const Threads& threads) {
        std::pair run{Array(dtype, per_query * s.dim), Array(sums, per_query)};
        p.out = run.first.data(), p.lse = run.second.data();
        tome::attention(p, threads);
        return run;
    });
    if (!wild) {
        const AttentionOracle want = attention_oracle(p);
        expect_near(out, want.out, want.out_error);
        expect_near(lse, want.lse, want.lse_error);
    }

    tome::AttentionBackwardParams back{};
    static_cast<tome::AttentionInputs&>(back) = p;
    back.grad = grad.memory.data(), back.grad_strides = grad.strides;
    back.out = out.data(), back.lse = lse.data();
    on_any_threads([&](const Threads& threads) {
        std::vector<Array> run{Array(dtype, per_query * s.dim), Array(dtype, per_key * s.dim),
                               Array(dtype, per_key * s.dim)};
        back.grad_q = run[0].data(), back.grad_k = run[1].data(), back.grad_v = run[2].data();
        tome::attention_backward(back, threads);
        if (!wild) {
            for (const Array& gradient : run) EXPECT_TRUE(all_finite(gradient));
        }
        return run;
    });

    if (s.queries == 0) return;
    tome::ClsAttentionParams cls{};
    cls.q = q.memory.data(), cls.k = k.memory.data(), cls.dtype = dtype;
    cls.batch = s.batch, cls.heads = s.heads, cls.keys = s.keys, cls.dim = s.dim;
    cls.q_stride_batch = q.strides.batch, cls.q_stride_head = q.strides.head;
    cls.k_strides = k.strides, cls.size = or_null(size), cls.scale = p.scale;
    on_any_threads([&](const Threads& threads) {
        Array run(sums, s.batch * s.keys);
        cls.out = run.data();
        tome::cls_attention(cls, threads);
        if (!wild) {
            const ClsAttentionOracle want = cls_attention_oracle(cls);
            expect_near(run, want.out, want.error);
        }
        return run;
    });
}

void fuzz_select(Choices& c) {
    const DType dtype = c.one_in(2) ? DType::kFloat32 : DType::kFloat64;
    const int64_t batch = c.between(0, 3), tokens = some_count(c, 90);
    const int64_t keep = some_count(c, 100), prefix = c.one_in(8) ? tokens + 3 : some_count(c, 4);
    const int64_t stride = tokens + (c.one_in(2) ? 0 : 3);
    const bool fuse = c.one_in(2);
    const Array scores =
        some_values(c, dtype, batch == 0 ? 0 : (batch - 1) * stride + tokens, c.one_in(2));
    const int64_t rows = tome::select_rows(tokens, keep, prefix, fuse);
    const Plan plan = on_any_threads([&](const Threads& threads) {
        const std::vector<int32_t> per_token(size_t(batch * tokens), -77);
        Plan got{batch,     tokens,    rows,
                 per_token, per_token, std::vector<int32_t>(size_t(batch * (rows + 1)), -77)};
        tome::select({scores.data(), dtype, batch, tokens, stride, keep, prefix, fuse,
                      got.assign.data(), got.members.data(), got.offsets.data()},
                     threads);
        return got;
    });
    EXPECT_EQ(plan, plan_of(plan.assign, batch, tokens, rows));
    const int64_t kept = tome::cut_keep(tokens, keep, prefix);
    for (int64_t b = 0; b < batch; ++b) {
        double least_kept = kInf, most_left = -kInf;
        bool nan_kept = false, number_left = false;
        for (int64_t n = std::min(prefix, tokens); n < tokens; ++n) {
            const double score = scores[b * stride + n];
            const int32_t row = plan.assign[size_t(b * tokens + n)];
            const bool stays = row >= 0 && row < kept;
            if (std::isnan(score)) {
                nan_kept |= stays;
            } else if (stays) {
                least_kept = std::min(least_kept, score);
            } else {
                number_left = true;
                most_left = std::max(most_left, score);
            }
        }
        EXPECT_GE(least_kept, most_left);
        EXPECT_FALSE(nan_kept && number_left) << "NaN ranks last";
    }
}

}  // namespace
}  // namespace tome_test

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    // A failed expectation stops the process, and libFuzzer keeps the input.
    ::testing::GTEST_FLAG(break_on_failure) = true;
    ::testing::InitGoogleTest(argc, *argv);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace tome_test;
    static const std::vector<Isa> sets = isas();
    static constexpr void (*kTargets[])(Choices&) = {
        fuzz_match,   fuzz_plan,           fuzz_merge,     fuzz_merge_backward,
        fuzz_unmerge, fuzz_merge_add_norm, fuzz_attention, fuzz_select};
    Choices choices(data, size);
    const auto target = size_t(choices.between(0, int64_t(std::size(kTargets)) - 1));
    const UseIsa use(sets[size_t(choices.between(0, int64_t(sets.size()) - 1))]);
    kTargets[target](choices);
    return 0;
}
