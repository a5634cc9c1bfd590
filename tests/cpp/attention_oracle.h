// Attention, its gradients and cls_attention by plain loops in double precision, from the same
// params structs that the kernels take; and how far rounding may take a result from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "helpers.h"
#include "tome_core/attention.h"

namespace tome_test {

using Doubles = std::vector<double>;

// A row of a strided tensor (batch, heads, tokens, dim), as doubles.
inline Doubles row_of(DType dtype, const void* data, const tome::HeadStrides& strides, int64_t b,
                      int64_t h, int64_t n, int64_t dim) {
    Doubles row(static_cast<size_t>(dim));
    const int64_t at = b * strides.batch + h * strides.head + n * strides.token;
    for (int64_t d = 0; d < dim; ++d) row[size_t(d)] = load(dtype, data, at + d);
    return row;
}

inline double dot(const Doubles& x, const Doubles& y) {
    double sum = 0;
    for (size_t d = 0; d < x.size(); ++d) sum += x[d] * y[d];
    return sum;
}
inline double dot_of_sizes(const Doubles& x, const Doubles& y) {
    double sum = 0;
    for (size_t d = 0; d < x.size(); ++d) sum += std::fabs(x[d] * y[d]);
    return sum;
}

// The softmax row of one query.
struct SoftmaxRow {
    Doubles p;           // (keys); all 0 if all keys are hidden
    double lse = 0;      // natural logarithm of the sum of exp(logits); 0 if all keys are hidden
    double largest = 0;  // of the visible keys: |scale| * sum |q k| + |log size|, what logits round
};

inline SoftmaxRow softmax_row(const Doubles& q, const std::vector<Doubles>& k, const float* size,
                              double scale) {
    SoftmaxRow row{Doubles(k.size()), 0, 0};
    Doubles logits(k.size());
    double top = -kInf;
    for (size_t n = 0; n < k.size(); ++n) {
        const double weight = size ? double{size[n]} : 1.0;
        logits[n] = weight == 0 ? -kInf : scale * dot(q, k[n]) + std::log(weight);
        top = std::max(top, logits[n]);
        if (weight != 0) {
            const double terms = std::fabs(scale) * dot_of_sizes(q, k[n]);
            row.largest = std::max(row.largest, terms + std::fabs(std::log(weight)));
        }
    }
    if (top == -kInf) return row;
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit - top);
    row.lse = top + std::log(sum);
    for (size_t n = 0; n < k.size(); ++n) row.p[n] = std::exp(logits[n] - top) / sum;
    return row;
}

// How far a logit computed in float32 may be from the exact one: dim products and sums, the scale,
// the logarithm, and conversions between bases, each at most 2^-24 of the terms' sizes. The same is
// the relative error of exp(logit), for errors far below 1.
inline double logit_error(DType dtype, double largest, int64_t dim) {
    const double unit = dtype == DType::kFloat64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24);
    return static_cast<double>(dim + 8) * unit * largest;
}

// --- forward -----------------------------------------------------------------------------------

struct AttentionOracle {
    Doubles out;        // (batch, queries, heads, dim)
    Doubles out_error;  // the same shape: how far rounding in params.dtype may go
    Doubles lse;        // (batch, heads, queries)
    Doubles lse_error;
};

// The bound on |out - exact|, to first order, of any implementation that takes logits and sums in
// float32, rounds the softmax weights to dtype before they meet v, and rounds the result:
//   sum_n p_n |v_n| * (roundoff            weights
//                      + 2 * logit_error   weights and their sum
//                      + keys * 2^-24)     the sums over keys
//   + roundoff * |out|
// Weights that are subnormal in float16 add up to 2^-25 each, relative to the row's largest weight.
inline AttentionOracle attention_oracle(const tome::AttentionParams& p) {
    AttentionOracle o;
    o.out.resize(size_t(p.batch * p.queries * p.heads * p.dim));
    o.out_error = o.out;
    o.lse.resize(size_t(p.batch * p.heads * p.queries));
    o.lse_error = o.lse;
    const double unit = sum_roundoff_of(p.dtype);
    const double rounding = roundoff_of(p.dtype);
    const double least = p.dtype == DType::kFloat16 ? std::ldexp(1.0, -25) : 0.0;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.heads; ++h) {
            std::vector<Doubles> k, v;
            for (int64_t n = 0; n < p.keys; ++n) {
                k.push_back(row_of(p.dtype, p.k, p.k_strides, b, h, n, p.dim));
                v.push_back(row_of(p.dtype, p.v, p.v_strides, b, h, n, p.dim));
            }
            const float* size = p.size ? p.size + b * p.keys : nullptr;
            for (int64_t m = 0; m < p.queries; ++m) {
                const Doubles q = row_of(p.dtype, p.q, p.q_strides, b, h, m, p.dim);
                const SoftmaxRow row = softmax_row(q, k, size, p.scale);
                const double logit = logit_error(p.dtype, row.largest, p.dim);
                const double per_term = rounding + 2 * logit + double(p.keys + 8) * unit;
                const auto at_row = size_t((b * p.heads + h) * p.queries + m);
                o.lse[at_row] = row.lse;
                o.lse_error[at_row] =
                    logit + double(p.keys + 8) * unit + unit * 4 * (1 + std::fabs(row.lse));
                const double top =
                    row.p.empty() ? 0.0 : *std::max_element(row.p.begin(), row.p.end());
                for (int64_t d = 0; d < p.dim; ++d) {
                    double sum = 0, sizes = 0, lost = 0;
                    for (size_t n = 0; n < row.p.size(); ++n) {
                        if (row.p[n] == 0) continue;
                        sum += row.p[n] * v[n][size_t(d)];
                        sizes += row.p[n] * std::fabs(v[n][size_t(d)]);
                        lost += least * top * std::fabs(v[n][size_t(d)]);
                    }
                    const auto at = size_t(((b * p.queries + m) * p.heads + h) * p.dim + d);
                    o.out[at] = sum;
                    o.out_error[at] =
                        sizes * per_term + lost + rounding * std::fabs(sum) + 1e-30 + least;
                }
            }
        }
    }
    return o;
}

// --- backward ----------------------------------------------------------------------------------

// Gradients, and beside each the sum of the sizes of the terms it is a sum of, the measure of what
// rounding may do to it.
struct AttentionGradients {
    Doubles grad_q, grad_k, grad_v;     // (batch, tokens, heads, dim)
    Doubles sizes_q, sizes_k, sizes_v;  // the same shapes
    double largest_logit = 0;           // SoftmaxRow::largest over all rows
};

// From q, k, v, size and grad alone: params.out and params.lse are not read.
inline AttentionGradients attention_backward_oracle(const tome::AttentionBackwardParams& p) {
    AttentionGradients o;
    o.grad_q.resize(size_t(p.batch * p.queries * p.heads * p.dim));
    o.grad_k.resize(size_t(p.batch * p.keys * p.heads * p.dim));
    o.sizes_q = o.grad_q;
    o.grad_v = o.sizes_k = o.sizes_v = o.grad_k;
    const auto dim = size_t(p.dim);
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.heads; ++h) {
            std::vector<Doubles> k, v;
            for (int64_t n = 0; n < p.keys; ++n) {
                k.push_back(row_of(p.dtype, p.k, p.k_strides, b, h, n, p.dim));
                v.push_back(row_of(p.dtype, p.v, p.v_strides, b, h, n, p.dim));
            }
            const float* size = p.size ? p.size + b * p.keys : nullptr;
            for (int64_t m = 0; m < p.queries; ++m) {
                const Doubles q = row_of(p.dtype, p.q, p.q_strides, b, h, m, p.dim);
                const Doubles grad = row_of(p.dtype, p.grad, p.grad_strides, b, h, m, p.dim);
                const SoftmaxRow row = softmax_row(q, k, size, p.scale);
                o.largest_logit = std::max(o.largest_logit, row.largest);
                double delta = 0, delta_size = 0;  // sum over keys of p * grad_p
                for (size_t n = 0; n < row.p.size(); ++n) {
                    if (row.p[n] == 0) continue;
                    delta += row.p[n] * dot(grad, v[n]);
                    delta_size += row.p[n] * dot_of_sizes(grad, v[n]);
                }
                const auto at_q = size_t((b * p.queries + m) * p.heads + h) * dim;
                for (size_t n = 0; n < row.p.size(); ++n) {
                    if (row.p[n] == 0) continue;
                    const double w = row.p[n];
                    const double s = p.scale * w * (dot(grad, v[n]) - delta);
                    const double s_size =
                        std::fabs(p.scale) * w * (dot_of_sizes(grad, v[n]) + delta_size);
                    const size_t at_k =
                        (size_t(b * p.keys + int64_t(n)) * size_t(p.heads) + size_t(h)) * dim;
                    for (size_t d = 0; d < dim; ++d) {
                        o.grad_v[at_k + d] += w * grad[d];
                        o.sizes_v[at_k + d] += w * std::fabs(grad[d]);
                        o.grad_k[at_k + d] += s * q[d];
                        o.sizes_k[at_k + d] += s_size * std::fabs(q[d]);
                        o.grad_q[at_q + d] += s * k[n][d];
                        o.sizes_q[at_q + d] += s_size * std::fabs(k[n][d]);
                    }
                }
            }
        }
    }
    return o;
}

// --- cls_attention -----------------------------------------------------------------------------

struct ClsAttentionOracle {
    Doubles out;    // (batch, keys)
    Doubles error;  // how far float32 may go: logits, the sum over keys and that over heads
};

inline ClsAttentionOracle cls_attention_oracle(const tome::ClsAttentionParams& p) {
    ClsAttentionOracle o;
    o.out.resize(size_t(p.batch * p.keys));
    o.error = o.out;
    const double unit = p.dtype == DType::kFloat64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24);
    const tome::HeadStrides q_strides{p.q_stride_batch, p.q_stride_head, 0};
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.heads; ++h) {
            std::vector<Doubles> k;
            for (int64_t n = 0; n < p.keys; ++n) {
                k.push_back(row_of(p.dtype, p.k, p.k_strides, b, h, n, p.dim));
            }
            const Doubles q = row_of(p.dtype, p.q, q_strides, b, h, 0, p.dim);
            const SoftmaxRow row =
                softmax_row(q, k, p.size ? p.size + b * p.keys : nullptr, p.scale);
            const double logit = logit_error(p.dtype, row.largest, p.dim);
            for (size_t n = 0; n < row.p.size(); ++n) {
                const double share = row.p[n] / double(p.heads);
                const size_t at = size_t(b * p.keys) + n;
                o.out[at] += share;
                o.error[at] += share * (2 * logit + double(p.keys + p.heads + 16) * unit) + 1e-37;
            }
        }
    }
    return o;
}

}  // namespace tome_test
