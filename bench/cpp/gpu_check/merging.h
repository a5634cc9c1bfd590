// merge, unmerge and their relatives, and a block's kernels in a row: how each is set up and
// judged.
#pragma once

#include "matching.h"

namespace gpu_check {

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
