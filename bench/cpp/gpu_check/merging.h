// match, select, plan, merge, unmerge and their relatives: how each is set up and judged.
#pragma once

#include "tome_core/cuda.h"
#include "trial.h"

namespace gpu_check {

struct Plan {
    int64_t batch, tokens, rows;
    Ints assign, members, offsets;
};

inline Plan plan_of(Ints assign, int64_t batch, int64_t tokens, int64_t rows) {
    Plan p{batch,
           tokens,
           rows,
           std::move(assign),
           Ints(size_t(batch * tokens)),
           Ints(size_t(batch * (rows + 1)))};
    if (!tome::plan({p.assign.data(), batch, tokens, rows, p.members.data(), p.offsets.data()},
                    threads())) {
        p.rows = -1;  // refused
    }
    return p;
}

// Some rows stay empty, and one token in eight is dropped.
inline Plan random_plan(const Case& c, Random& random) {
    Ints assign;
    const int64_t rows = c.tokens - c.r;
    for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
        const bool drop = random.below(8) == 0;
        assign.push_back(drop ? -1 : static_cast<int32_t>(random.below(rows)));
    }
    return plan_of(assign, c.batch, c.tokens, rows);
}

inline Floats random_sizes(const Case& c, Random& random) {
    Floats out;
    for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t n = 0; n < c.tokens; ++n) {
            const auto size = static_cast<float>(1 + random.below(5));
            const bool hidden = random.below(4) == 0 || (c.batch > 1 && b == 1);
            out.push_back(c.sizes == Sizes::kZeros && hidden ? 0.0f : size);
        }
    }
    if (c.sizes == Sizes::kNone) out.clear();
    return out;
}

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

// x (batch, tokens, channels), rows a little apart for some layouts.
struct Rows {
    Array memory;
    int64_t stride_batch, stride_row;
};

inline Rows random_rows(const Case& c, int64_t count, Random& random) {
    const int64_t apart = c.layout == Layout::kOdd ? c.dim + 3 : c.dim;
    return {random_array(c.dtype, c.batch * count * apart, random), count * apart, apart};
}

// One rounding of the result, and those of sums in float32 (float64).
inline double merge_limit(DType dtype, double want) {
    const double sums = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    return roundoff(dtype) * std::fabs(want) * 1.01 + 64 * sums;
}

// `sums`: how many elements of x went into each, at most.
inline void judge_merge(Verdict& v, const Case& c, const Rows& x, const Floats& size,
                        const Plan& plan, const Trial& t) {
    const Array exact = x.memory.exact();
    Array out(exact.dtype(), c.batch * plan.rows * c.dim);
    Floats out_size(static_cast<size_t>(c.batch * plan.rows));
    tome::merge({exact.data(), exact.dtype(), c.batch, c.tokens, plan.rows, c.dim, x.stride_batch,
                 x.stride_row, size.empty() ? nullptr : size.data(), plan.members.data(),
                 plan.offsets.data(), c.reduce, out.data(), out_size.data()},
                threads());
    const double terms = c.reduce == tome::Reduce::kSum ? 16.0 : 1.0;
    compare(
        v, t["out"], [&](int64_t i) { return out[i]; },
        [&](int64_t i) { return terms * merge_limit(c.dtype, out[i]); });
    compare(
        v, t["out_size"], [&](int64_t i) { return double(out_size[size_t(i)]); },
        [](int64_t) { return 1e-30; });
}

// `out` against the CPU; `normed` against the norm, in float64, of what the device stored in `out`.
inline void judge_merge_add_norm(Verdict& v, const Case& c, const Rows& x, const Rows& branch,
                                 const std::vector<Array>& vectors, const Floats& size,
                                 const Plan& plan, const Trial& t) {
    const Array a = x.memory.exact(), b = branch.memory.exact();
    std::vector<Array> exact;
    for (const Array& vector : vectors) exact.push_back(vector.exact());
    Array out(a.dtype(), c.batch * plan.rows * c.dim), normed = out;
    Floats out_size(static_cast<size_t>(c.batch * plan.rows));
    tome::MergeAddNormParams p{};
    p.x = a.data(), p.branch = b.data(), p.dtype = a.dtype();
    p.batch = c.batch, p.tokens = c.tokens, p.rows = plan.rows, p.channels = c.dim;
    p.x_stride_batch = x.stride_batch, p.x_stride_token = x.stride_row;
    p.branch_stride_batch = branch.stride_batch, p.branch_stride_token = branch.stride_row;
    if (!exact.empty()) {
        p.scale = exact[0].data(), p.weight = exact[1].data(), p.bias = exact[2].data();
    }
    p.eps = 1e-6, p.keep_norms = c.keep_norms;
    p.size = size.empty() ? nullptr : size.data();
    p.members = plan.members.data(), p.offsets = plan.offsets.data();
    p.out = out.data(), p.normed = normed.data(), p.out_size = out_size.data();
    tome::merge_add_norm(p, threads());
    const Output &got = t["sum"], &got_normed = t["normed"];
    compare(
        v, got, [&](int64_t i) { return out[i]; },
        [&](int64_t i) { return 4 * merge_limit(c.dtype, out[i]); });
    compare(
        v, t["sum_size"], [&](int64_t i) { return double(out_size[size_t(i)]); },
        [](int64_t) { return 1e-30; });
    std::vector<double> want(static_cast<size_t>(got.count)), limit = want;
    const double unit = c.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    for (int64_t row = 0; row < c.batch * plan.rows; ++row) {
        double mean = 0, square = 0;
        for (int64_t d = 0; d < c.dim; ++d) mean += got[row * c.dim + d] / double(c.dim);
        for (int64_t d = 0; d < c.dim; ++d) {
            const double from = got[row * c.dim + d] - mean;
            square += from * from / double(c.dim);
        }
        for (int64_t d = 0; d < c.dim; ++d) {
            const auto i = static_cast<size_t>(row * c.dim + d);
            const double plain = (got[int64_t(i)] - mean) / std::sqrt(square + 1e-6);
            const double scaled = exact.empty() ? plain : plain * exact[1][d];
            want[i] = exact.empty() ? scaled : scaled + exact[2][d];
            limit[i] = roundoff(c.dtype) * std::fabs(want[i]) * 1.01 +
                       unit * (64 + 64 * std::fabs(scaled) + double(c.dim));
        }
    }
    compare(
        v, got_normed, [&](int64_t i) { return want[size_t(i)]; },
        [&](int64_t i) { return limit[size_t(i)]; });
}

inline tome::MergeAddNormParams merge_add_norm_params(const Case& c, Trial& t, const Rows& x,
                                                      const Rows& branch,
                                                      const std::vector<Array>& vectors,
                                                      const float* size, const int32_t* members,
                                                      const int32_t* offsets, int64_t rows) {
    tome::MergeAddNormParams p{};
    p.x = t.put(x.memory), p.branch = t.put(branch.memory), p.dtype = c.dtype;
    p.batch = c.batch, p.tokens = c.tokens, p.rows = rows, p.channels = c.dim;
    p.x_stride_batch = x.stride_batch, p.x_stride_token = x.stride_row;
    p.branch_stride_batch = branch.stride_batch, p.branch_stride_token = branch.stride_row;
    if (!vectors.empty()) {
        p.scale = t.put(vectors[0]), p.weight = t.put(vectors[1]), p.bias = t.put(vectors[2]);
    }
    p.eps = 1e-6, p.keep_norms = c.keep_norms;
    p.size = size, p.members = members, p.offsets = offsets;
    p.out = t.out("sum", Type::kFloat, c.dtype, c.batch * rows * c.dim);
    p.normed = t.out("normed", Type::kFloat, c.dtype, c.batch * rows * c.dim);
    p.out_size = t.out_floats("sum_size", c.batch * rows);
    return p;
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
    t.workspace =
        std::make_unique<Memory>(std::max<size_t>(tome::match_cuda_workspace_bytes(p), 1));
    t.run = [p, &t] { return tome::match_cuda(p, t.workspace->data(), nullptr); };
    t.judge = [&c, &t, m](Verdict& v) { judge_match(v, c, *m, t); };
}

inline void set_up_select(const Case& c, Trial& t, Random& random) {
    const DType dtype = c.dtype == DType::kFloat64 ? c.dtype : DType::kFloat32;
    auto scores = std::make_shared<Array>(dtype, c.batch * c.tokens);
    for (int64_t i = 0; i < scores->count(); ++i) {
        // With `fuse` few different scores, so that there are ties, and a NaN.
        scores->set(i, c.fuse ? double(random.below(7)) - 3.0 : random.normal());
        if (c.fuse && i % 97 == 5) scores->set(i, std::nan(""));
    }
    const int64_t keep = c.tokens - c.prefix - c.r;
    const int64_t rows = tome::select_rows(c.tokens, keep, c.prefix, c.fuse);
    tome::SelectParams p{};
    p.scores = t.put(*scores), p.dtype = dtype, p.batch = c.batch, p.tokens = c.tokens;
    p.stride_batch = c.tokens, p.keep = keep, p.num_prefix_tokens = c.prefix, p.fuse = c.fuse;
    p.assign = t.out_ints("assign", c.batch * c.tokens);
    p.members = t.out_ints("members", c.batch * c.tokens);
    p.offsets = t.out_ints("offsets", c.batch * (rows + 1));
    t.run = [p] { return tome::select_cuda(p, nullptr); };
    t.judge = [&c, &t, p, rows, scores](Verdict& v) {
        Ints assign(size_t(c.batch * c.tokens)), members = assign,
                                                 offsets(size_t(c.batch * (rows + 1)));
        tome::SelectParams cpu = p;
        cpu.scores = scores->data(), cpu.assign = assign.data();
        cpu.members = members.data(), cpu.offsets = offsets.data();
        tome::select(cpu, threads());
        compare_ints(v, t["assign"], assign);
        compare_ints(v, t["members"], members);
        compare_ints(v, t["offsets"], offsets);
    };
}

inline void set_up_plan(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    const tome::PlanParams p{t.put(plan->assign),
                             c.batch,
                             c.tokens,
                             plan->rows,
                             t.out_ints("members", c.batch * c.tokens),
                             t.out_ints("offsets", c.batch * (plan->rows + 1))};
    t.run = [p] { return tome::plan_cuda(p, nullptr); };
    t.judge = [&t, plan](Verdict& v) {
        compare_ints(v, t["members"], plan->members);
        compare_ints(v, t["offsets"], plan->offsets);
    };
}

inline void set_up_merge(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    const tome::MergeParams p{t.put(x->memory),
                              c.dtype,
                              c.batch,
                              c.tokens,
                              plan->rows,
                              c.dim,
                              x->stride_batch,
                              x->stride_row,
                              size->empty() ? nullptr : t.put(*size),
                              t.put(plan->members),
                              t.put(plan->offsets),
                              c.reduce,
                              t.out("out", Type::kFloat, c.dtype, c.batch * plan->rows * c.dim),
                              t.out_floats("out_size", c.batch * plan->rows)};
    t.run = [p] { return tome::merge_cuda(p, nullptr); };
    t.judge = [&c, &t, plan, x, size](Verdict& v) { judge_merge(v, c, *x, *size, *plan, t); };
}

inline void set_up_merge_backward(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto grad = std::make_shared<Rows>(random_rows(c, plan->rows, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    const tome::MergeBackwardParams p{
        t.put(grad->memory),
        c.dtype,
        c.batch,
        c.tokens,
        plan->rows,
        c.dim,
        grad->stride_batch,
        grad->stride_row,
        size->empty() ? nullptr : t.put(*size),
        t.put(plan->members),
        t.put(plan->offsets),
        c.reduce,
        t.out("grad_x", Type::kFloat, c.dtype, c.batch * c.tokens * c.dim)};
    t.run = [p] { return tome::merge_backward_cuda(p, nullptr); };
    t.judge = [&c, &t, p, plan, grad, size](Verdict& v) {
        const Array exact = grad->memory.exact();
        Array want(exact.dtype(), c.batch * c.tokens * c.dim);
        tome::MergeBackwardParams cpu = p;
        cpu.grad = exact.data(), cpu.dtype = exact.dtype(), cpu.out = want.data();
        cpu.size = size->empty() ? nullptr : size->data();
        cpu.members = plan->members.data(), cpu.offsets = plan->offsets.data();
        tome::merge_backward(cpu, threads());
        compare(
            v, t["grad_x"], [&](int64_t i) { return want[i]; },
            [&](int64_t i) { return merge_limit(c.dtype, want[i]); });
    };
}

inline void set_up_unmerge(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, plan->rows, random));
    const tome::UnmergeParams p{t.put(x->memory),
                                c.dtype,
                                c.batch,
                                c.tokens,
                                plan->rows,
                                c.dim,
                                x->stride_batch,
                                x->stride_row,
                                t.put(plan->assign),
                                t.out("out", Type::kFloat, c.dtype, c.batch * c.tokens * c.dim)};
    t.run = [p] { return tome::unmerge_cuda(p, nullptr); };
    t.judge = [&c, &t, p, plan, x](Verdict& v) {
        Array want(c.dtype, c.batch * c.tokens * c.dim);
        tome::UnmergeParams cpu = p;
        cpu.x = x->memory.data(), cpu.assign = plan->assign.data(), cpu.out = want.data();
        tome::unmerge(cpu, threads());
        compare(v, t["out"], [&](int64_t i) { return want[i]; }, [](int64_t) { return 1e-30; });
    };
}

inline void set_up_merge_add_norm(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto branch = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    auto vectors = std::make_shared<std::vector<Array>>();
    for (int i = 0; i < 3 && !size->empty(); ++i) {
        vectors->push_back(random_array(c.dtype, c.dim, random));
    }
    const float* sizes = size->empty() ? nullptr : t.put(*size);
    const int32_t *members = t.put(plan->members), *offsets = t.put(plan->offsets);
    const tome::MergeAddNormParams p =
        merge_add_norm_params(c, t, *x, *branch, *vectors, sizes, members, offsets, plan->rows);
    t.run = [p] { return tome::merge_add_norm_cuda(p, nullptr); };
    t.judge = [&c, &t, plan, x, branch, size, vectors](Verdict& v) {
        judge_merge_add_norm(v, c, *x, *branch, *vectors, *size, *plan, t);
    };
}

// A block's kernels with nothing to wait for between them, where an overlap that lets one begin too
// early would show. Channels of x: heads * dim.
inline void set_up_chain(const Case& c, Trial& t, Random& random) {
    c.fuse ? set_up_select(c, t, random) : set_up_match(c, t, random);
    const auto match = t.run;
    const auto judge = t.judge;
    auto flat = std::make_shared<Case>(c);
    flat->dim = c.heads * c.dim, flat->layout = Layout::kHeads;
    const int64_t rows = t["offsets"].count / c.batch - 1;
    auto x = std::make_shared<Rows>(random_rows(*flat, c.tokens, random));
    auto branch = std::make_shared<Rows>(random_rows(*flat, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    auto vectors = std::make_shared<std::vector<Array>>();
    for (int i = 0; i < 3; ++i) vectors->push_back(random_array(c.dtype, flat->dim, random));
    const float* sizes = t.put(*size);
    auto* assign = reinterpret_cast<int32_t*>(t["assign"].memory->data());
    auto* members = reinterpret_cast<int32_t*>(t["members"].memory->data());
    auto* offsets = reinterpret_cast<int32_t*>(t["offsets"].memory->data());
    void* merged = t.out("out", Type::kFloat, c.dtype, c.batch * rows * flat->dim);
    const tome::MergeParams p{t.put(x->memory),
                              c.dtype,
                              c.batch,
                              c.tokens,
                              rows,
                              flat->dim,
                              x->stride_batch,
                              x->stride_row,
                              sizes,
                              members,
                              offsets,
                              tome::Reduce::kMean,
                              merged,
                              t.out_floats("out_size", c.batch * rows)};
    const tome::MergeAddNormParams q =
        merge_add_norm_params(*flat, t, *x, *branch, *vectors, sizes, members, offsets, rows);
    const tome::UnmergeParams u{
        merged,
        c.dtype,
        c.batch,
        c.tokens,
        rows,
        flat->dim,
        rows * flat->dim,
        flat->dim,
        assign,
        t.out("unmerged", Type::kFloat, c.dtype, c.batch * c.tokens * flat->dim)};
    t.run = [=] {
        cudaError_t error = match();
        if (error == cudaSuccess) error = tome::merge_cuda(p, nullptr);
        if (error == cudaSuccess) error = tome::merge_add_norm_cuda(q, nullptr);
        return error == cudaSuccess ? tome::unmerge_cuda(u, nullptr) : error;
    };
    t.judge = [=, &t](Verdict& v) {
        judge(v);
        const Output &plan_out = t["assign"], &out = t["out"];
        const Plan plan = plan_of({plan_out.ints(), plan_out.ints() + plan_out.count}, flat->batch,
                                  flat->tokens, rows);
        if (plan.rows < 0) return;
        judge_merge(v, *flat, *x, *size, plan, t);
        judge_merge_add_norm(v, *flat, *x, *branch, *vectors, *size, plan, t);
        const auto source = [&](int64_t i) {
            const int64_t n = i / flat->dim, b = n / flat->tokens;
            const int64_t row = plan.assign[size_t(n)];
            return row < 0 ? 0.0 : out[(b * rows + row) * flat->dim + i % flat->dim];
        };
        compare(v, t["unmerged"], source, [](int64_t) { return 1e-30; });
    };
}

}  // namespace gpu_check
