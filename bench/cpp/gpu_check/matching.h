// match: how it is set up and judged.
#pragma once

#include "plans.h"

namespace gpu_check {

// Scores of an image in float64: cosines of the mean keys of its A tokens and its B tokens.
inline std::vector<std::vector<double>> exact_scores(const Case& c, const Heads& keys,
                                                     int64_t image, const std::vector<int64_t>& a,
                                                     const std::vector<int64_t>& b) {
    const auto unit = [&](int64_t n) {
        std::vector<double> mean(size_t(c.dim), 0.0);
        double square = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
            for (int64_t h = 0; h < c.heads; ++h) {
                mean[size_t(d)] += keys.memory[keys.offset + image * keys.strides.batch +
                                               h * keys.strides.head + n * keys.strides.token + d];
            }
            square += mean[size_t(d)] * mean[size_t(d)];
        }
        for (double& x : mean) x /= std::sqrt(square);  // NaN where a token holds no numbers
        return mean;
    };
    std::vector<std::vector<double>> units, scores;
    for (int64_t j : b) units.push_back(unit(j));
    for (int64_t i : a) {
        const std::vector<double> u = unit(i);
        scores.emplace_back();
        for (const std::vector<double>& w : units) {
            double sum = 0;
            for (size_t d = 0; d < u.size(); ++d) sum += u[d] * w[d];
            scores.back().push_back(std::isnan(sum) ? -HUGE_VAL : sum);
        }
    }
    return scores;
}

// What a match works on, in the host's memory.
struct Matching {
    Heads keys;
    Floats weight;            // empty: nothing is hidden
    Ints targets;             // empty: the odd positions
    Floats size, importance;  // empty: pairs rank by similarity

    explicit Matching(const Case& c, Random& random)
        : keys(random_heads(c.dtype, c.batch, c.heads, c.tokens, c.dim, c.layout, random)) {
        if (c.sizes == Sizes::kZeros) weight = random_sizes(c, random);
        for (int64_t n = c.prefix; c.targets && n < c.tokens; ++n) {
            if (random.below(3) == 0) targets.push_back(static_cast<int32_t>(n));
        }
        if (c.costs) {
            size = random_sizes(c, random);
            for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
                importance.push_back(static_cast<float>(0.1 + std::fabs(random.normal())));
            }
        }
        if (c.sizes == Sizes::kSpoiled) spoil(c);
    }

    // Of every seven tokens one holds NaN or an infinity, one is huge and one tiny: as far as
    // float32 and bfloat16 go, beyond what float32 has of their squares.
    void spoil(const Case& c) {
        const double values[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
        const bool narrow = c.dtype == DType::kFloat16;
        for (int64_t i = 0; i < c.batch * c.heads * c.tokens; ++i) {
            const int64_t b = i / c.heads / c.tokens, h = i / c.tokens % c.heads, n = i % c.tokens;
            const int64_t at = keys.offset + b * keys.strides.batch + h * keys.strides.head +
                               n * keys.strides.token;
            if (n % 7 == 3 && h == 0) keys.memory.set(at + n % c.dim, values[n % 3]);
            if (narrow || (n % 7 != 5 && n % 7 != 6)) continue;
            for (int64_t d = at; d < at + c.dim; ++d) {
                keys.memory.set(d, keys.memory[d] * (n % 7 == 5 ? 0x1p90 : 0x1p-90));
            }
        }
    }
    bool is_target(int64_t n) const {
        if (targets.empty()) return n % 2 == 1;
        return std::binary_search(targets.begin(), targets.end(), static_cast<int32_t>(n));
    }
};

// Whether an image's choices, where they differ from the CPU's, were between scores that are equal
// up to rounding.
inline bool is_a_tie(const Case& c, const Matching& m, int64_t image, const int32_t* got,
                     int64_t r) {
    std::vector<int64_t> a, b;
    for (int64_t n = c.prefix; n < c.tokens; ++n) (m.is_target(n) ? b : a).push_back(n);
    const auto num_a = static_cast<int64_t>(a.size()), num_b = static_cast<int64_t>(b.size());
    const int64_t first_b_row = c.prefix + num_a - r;
    const double tolerance =
        c.dtype == DType::kFloat64 ? 1e-12 : 2 * (7e-7 + double(c.dim) * 0x1p-24);
    const auto scores = exact_scores(c, m.keys, image, a, b);
    // What a pair ranks by, greatest first, and how far off that may be.
    struct Rank {
        double value, off;
    };
    const auto rank = [&](int64_t i, int64_t j, double score) -> Rank {
        if (m.size.empty()) return {score, tolerance / 2};
        const auto at = [&](const Floats& x, int64_t n) {
            return double(x[size_t(image * c.tokens + n)]);
        };
        const double size_a = at(m.size, a[size_t(i)]), size_b = at(m.size, b[size_t(j)]);
        const double factor = size_a * size_b / (size_a + size_b) * at(m.importance, a[size_t(i)]);
        return {(score - 1) * factor, (tolerance / 2 + 0x1p-21) * factor};
    };
    int64_t row = c.prefix, merged = 0;
    double least_merged = HUGE_VAL, most_kept = -HUGE_VAL;
    for (int64_t n = 0; n < c.prefix; ++n) {
        if (got[n] != n) return false;
    }
    for (int64_t j = 0; j < num_b; ++j) {
        if (got[b[size_t(j)]] != first_b_row + j) return false;
    }
    for (int64_t i = 0; i < num_a; ++i) {
        const std::vector<double>& mine = scores[size_t(i)];
        const double best = *std::max_element(mine.begin(), mine.end());
        const auto near = [&](int64_t j) { return mine[size_t(j)] >= best - tolerance; };
        const int64_t to = got[a[size_t(i)]] - first_b_row;
        if (to < 0) {
            if (got[a[size_t(i)]] != row++) return false;
            double least = HUGE_VAL;  // whichever of those near the best it was compared by
            for (int64_t j = 0; j < num_b; ++j) {
                // The score that it computed of that one was no less than the best, but for this.
                const Rank its = rank(i, j, best);
                if (near(j)) least = std::min(least, its.value - its.off);
            }
            most_kept = std::max(most_kept, least);
            continue;
        }
        if (to >= num_b || !near(to)) return false;
        ++merged;
        const Rank its = rank(i, to, mine[size_t(to)]);
        least_merged = std::min(least_merged, its.value + its.off);
    }
    return merged == r && least_merged >= most_kept;
}

// A match's inputs where it runs; null where there are none.
struct MatchInputs {
    const void* keys;
    const float* weight;
    const int32_t* targets;
    const float *size, *importance;
};

inline tome::MatchParams match_params(const Case& c, const Matching& m, const MatchInputs& in) {
    tome::MatchParams p{};
    p.metric = in.keys, p.dtype = c.dtype;
    p.batch = c.batch, p.heads = c.heads, p.tokens = c.tokens, p.dim = c.dim;
    p.stride_batch = m.keys.strides.batch, p.stride_head = m.keys.strides.head;
    p.stride_token = m.keys.strides.token, p.r = c.r, p.num_prefix_tokens = c.prefix;
    p.weight = in.weight, p.size = in.size, p.importance = in.importance;
    p.targets = in.targets, p.num_targets = static_cast<int64_t>(m.targets.size());
    if (c.near) p.threshold = 0.25;  // which some of random keys are
    return p;
}

// The plan that a device wrote: consistent, and the CPU's up to ties (none where tokens are hidden,
// or a threshold counts: how many an image removes, and so its order of rows, is then its own).
inline void judge_match(Verdict& v, const Case& c, Matching& m, const Trial& t) {
    const auto host = [](auto& x) { return x.empty() ? nullptr : x.data(); };
    tome::MatchParams p = match_params(c, m,
                                       {m.keys.memory.at(m.keys.offset), host(m.weight),
                                        host(m.targets), host(m.size), host(m.importance)});
    const int64_t r = tome::cut_r(p), rows = c.tokens - r;
    const Output& assign = t["assign"];
    const Plan own =
        plan_of({assign.ints(), assign.ints() + assign.count}, c.batch, c.tokens, rows);
    Plan want{c.batch,
              c.tokens,
              rows,
              Ints(size_t(c.batch * c.tokens)),
              Ints(size_t(c.batch * c.tokens)),
              Ints(size_t(c.batch * (rows + 1)))};
    p.assign = want.assign.data(), p.members = want.members.data();
    p.offsets = want.offsets.data();
    if (!tome::match(p, threads())) return v.fail("the CPU refuses", "assign");
    if (own.rows < 0) {
        compare_ints(v, assign, want.assign);
        return v.fail("not a plan", "assign");
    }
    for (int64_t b = 0; b < c.batch; ++b) {
        const int32_t *mine = assign.ints() + b * c.tokens, *its = &want.assign[b * c.tokens];
        if (std::equal(mine, mine + c.tokens, its)) continue;
        if (!m.weight.empty() || c.near || !is_a_tie(c, m, b, mine, r)) {
            compare_ints(v, assign, want.assign);
            return v.fail("not the best matches", "assign");
        }
        for (int64_t n = 0; n < c.tokens; ++n) v.ties += mine[n] != its[n];
    }
    compare_ints(v, t["members"], own.members);
    compare_ints(v, t["offsets"], own.offsets);
}

inline void set_up_match(const Case& c, Trial& t, Random& random) {
    auto m = std::make_shared<Matching>(c, random);
    const auto put = [&t](auto& x) { return x.empty() ? nullptr : t.put(x); };
    tome::MatchParams p = match_params(
        c, *m, {t.put(m->keys), put(m->weight), put(m->targets), put(m->size), put(m->importance)});
    const int64_t rows = c.tokens - tome::cut_r(p);
    p.assign = t.out_ints("assign", c.batch * c.tokens);
    p.members = t.out_ints("members", c.batch * c.tokens);
    p.offsets = t.out_ints("offsets", c.batch * (rows + 1));
    void* space = t.work(tome::match_cuda_workspace_bytes(p));
    t.run = [p, space] { return tome::match_cuda(p, space, nullptr); };
    t.judge = [&c, &t, m](Verdict& v) { judge_match(v, c, *m, t); };
}

}  // namespace gpu_check
