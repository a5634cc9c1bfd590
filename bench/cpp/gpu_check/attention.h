// Attention, its gradient and the class token's: how each is set up and judged.
#pragma once

#include "plans.h"

namespace gpu_check {

struct AttentionData {
    Heads q, k, v;
    Floats size;
    double scale;
};

// Hides of the first image one key in four and, where there are more than 160, the first 130; of
// the next all; of another the last. What is hidden holds NaN or an infinity.
inline void spoil_hidden(const Case& c, AttentionData& x) {
    const double values[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
    for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
        const int64_t b = i / c.tokens, n = i % c.tokens;
        const bool of_first = n % 4 == 1 || (c.tokens > 160 && n < 130);
        if (!(b % 3 == 0 ? of_first : b % 3 == 1 || n == c.tokens - 1)) continue;
        x.size[size_t(i)] = 0;
        for (int64_t h = 0; h < c.heads; ++h) {
            for (Heads* t : {&x.k, &x.v}) {
                const int64_t at =
                    t->offset + b * t->strides.batch + h * t->strides.head + n * t->strides.token;
                for (int64_t d = 0; d < c.dim; ++d) t->memory.set(at + d, values[(n + h) % 3]);
            }
        }
    }
}

inline std::shared_ptr<AttentionData> attention_data(const Case& c, Random& random) {
    const auto heads = [&](int64_t tokens, Layout mixed) {
        const Layout layout = c.layout == Layout::kMixed ? mixed : c.layout;
        return random_heads(c.dtype, c.batch, c.heads, tokens, c.dim, layout, random);
    };
    Heads q = heads(c.queries, Layout::kHeads), k = heads(c.tokens, Layout::kPacked);
    Heads v = heads(c.tokens, Layout::kOdd);
    auto x = std::make_shared<AttentionData>(AttentionData{std::move(q), std::move(k), std::move(v),
                                                           random_sizes(c, random),
                                                           1.0 / std::sqrt(double(c.dim))});
    if (c.sizes == Sizes::kSpoiled) spoil_hidden(c, *x);
    return x;
}

inline tome::AttentionInputs attention_inputs(const Case& c, const AttentionData& x, DType dtype,
                                              const void* q, const void* k, const void* v,
                                              const float* size) {
    return {q,        k,     v,           dtype,       c.batch,     c.heads, c.queries,
            c.tokens, c.dim, x.q.strides, x.k.strides, x.v.strides, size,    x.scale};
}

// q, k and v in float32, with what attention makes of them.
struct Reference {
    Array q, k, v, out, lse;
    tome::AttentionInputs inputs;

    Reference(const Case& c, const AttentionData& x)
        : q(x.q.memory.exact()),
          k(x.k.memory.exact()),
          v(x.v.memory.exact()),
          out(DType::kFloat32, c.batch * c.queries * c.heads * c.dim),
          lse(DType::kFloat32, c.batch * c.heads * c.queries),
          inputs(attention_inputs(c, x, DType::kFloat32, q.at(x.q.offset), k.at(x.k.offset),
                                  v.at(x.v.offset), x.size.empty() ? nullptr : x.size.data())) {
        tome::attention({inputs, out.data(), lse.data()}, threads());
    }
};

// Results are rounded once, and the weights before them; the rest is float32.
inline double row_error(DType dtype) { return 3 * roundoff(dtype) + 1e-5; }

inline void set_up_attention(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    const void *q = t.put(x->q), *k = t.put(x->k), *values = t.put(x->v);
    const float* size = x->size.empty() ? nullptr : t.put(x->size);
    void* out = t.out("out", Type::kFloat, c.dtype, c.batch * c.queries * c.heads * c.dim);
    void* lse = t.out("lse", Type::kFloat, DType::kFloat32, c.batch * c.heads * c.queries);
    const tome::AttentionParams p{attention_inputs(c, *x, c.dtype, q, k, values, size), out, lse};
    t.run = [p] { return tome::attention_cuda(p, nullptr); };
    t.judge = [&c, &t, x](Verdict& v) {
        const Reference want(c, *x);
        // What rounding every weight may do to a sum of p v is at most its share of the sum of
        // p |v|.
        Array sizes_of_v = want.v, sums = want.out, unused = want.lse;
        for (int64_t i = 0; i < sizes_of_v.count(); ++i) {
            sizes_of_v.set(i, std::fabs(sizes_of_v[i]));
        }
        tome::AttentionInputs inputs = want.inputs;
        inputs.v = sizes_of_v.at(x->v.offset);
        tome::attention({inputs, sums.data(), unused.data()}, threads());
        compare(
            v, t["out"], [&](int64_t i) { return want.out[i]; },
            [&](int64_t i) {
                return 1.01 * roundoff(c.dtype) * (std::fabs(want.out[i]) + sums[i]) +
                       1e-5 * sums[i] + 1e-30;
            });
        compare_rows(v, t["out"], want.out, c.dim, row_error(c.dtype), 1e-30);
        compare(
            v, t["lse"], [&](int64_t i) { return want.lse[i]; },
            [&](int64_t i) { return 4e-6 * (1 + std::fabs(want.lse[i])); });
    };
}

inline void set_up_attention_backward(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    auto grad = std::make_shared<Heads>(
        random_heads(c.dtype, c.batch, c.heads, c.queries, c.dim,
                     c.layout == Layout::kOdd ? Layout::kOdd : Layout::kHeads, random));
    auto want = std::make_shared<Reference>(c, *x);
    auto out = std::make_shared<Array>(c.dtype, want->out.count());  // as a forward rounds it
    for (int64_t i = 0; i < out->count(); ++i) out->set(i, want->out[i]);
    tome::AttentionBackwardParams p{};
    const void *q = t.put(x->q), *k = t.put(x->k), *values = t.put(x->v);
    const float* size = x->size.empty() ? nullptr : t.put(x->size);
    static_cast<tome::AttentionInputs&>(p) = attention_inputs(c, *x, c.dtype, q, k, values, size);
    p.grad = t.put(*grad), p.grad_strides = grad->strides;
    p.out = t.put(*out), p.lse = t.put(want->lse);
    const int64_t row = c.heads * c.dim;
    p.grad_q = t.out("grad_q", Type::kFloat, c.dtype, c.batch * c.queries * row);
    p.grad_k = t.out("grad_k", Type::kFloat, c.dtype, c.batch * c.tokens * row);
    p.grad_v = t.out("grad_v", Type::kFloat, c.dtype, c.batch * c.tokens * row);
    void* space = t.work(tome::attention_backward_cuda_workspace_bytes(p));
    t.run = [p, space] { return tome::attention_backward_cuda(p, space, nullptr); };
    t.judge = [&c, &t, x, grad, want, out, row](Verdict& v) {
        Array g = grad->memory.exact(), rounded = out->exact();
        Array grad_q(DType::kFloat32, c.batch * c.queries * row);
        Array grad_k(DType::kFloat32, c.batch * c.tokens * row), grad_v = grad_k;
        tome::AttentionBackwardParams cpu{};
        static_cast<tome::AttentionInputs&>(cpu) = want->inputs;
        cpu.grad = g.at(grad->offset), cpu.grad_strides = grad->strides;
        cpu.out = rounded.data(), cpu.lse = want->lse.data();
        cpu.grad_q = grad_q.data(), cpu.grad_k = grad_k.data(), cpu.grad_v = grad_v.data();
        tome::attention_backward(cpu, threads());
        // The floor is what float32 leaves where terms cancel.
        const double floor = 1e-5, relative = row_error(c.dtype) + roundoff(c.dtype);
        compare_rows(v, t["grad_q"], grad_q, c.dim, relative, floor);
        compare_rows(v, t["grad_k"], grad_k, c.dim, relative, floor);
        compare_rows(v, t["grad_v"], grad_v, c.dim, relative, floor);
    };
}

inline void set_up_cls_attention(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    tome::ClsAttentionParams p{};
    p.q = t.put(x->q), p.k = t.put(x->k), p.dtype = c.dtype;
    p.batch = c.batch, p.heads = c.heads, p.keys = c.tokens, p.dim = c.dim;
    p.q_stride_batch = x->q.strides.batch, p.q_stride_head = x->q.strides.head;
    p.k_strides = x->k.strides, p.size = x->size.empty() ? nullptr : t.put(x->size);
    p.scale = x->scale;
    p.out = t.out("out", Type::kFloat, DType::kFloat32, c.batch * c.tokens);
    void* space = t.work(tome::cls_attention_cuda_workspace_bytes(p));
    t.run = [p, space] { return tome::cls_attention_cuda(p, space, nullptr); };
    t.judge = [&c, &t, p, x](Verdict& v) {
        Array q = x->q.memory.exact(), k = x->k.memory.exact();
        Array want(DType::kFloat32, c.batch * c.tokens);
        tome::ClsAttentionParams cpu = p;
        cpu.q = q.at(x->q.offset), cpu.k = k.at(x->k.offset), cpu.dtype = DType::kFloat32;
        cpu.size = x->size.empty() ? nullptr : x->size.data(), cpu.out = want.data();
        tome::cls_attention(cpu, threads());
        compare(
            v, t["out"], [&](int64_t i) { return want[i]; },
            [&](int64_t i) { return 2e-5 * std::fabs(want[i]) + 1e-12; });
    };
}

}  // namespace gpu_check
