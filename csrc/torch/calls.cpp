#include "calls.h"

#include <cmath>

#include "checks.h"

namespace tome::torch_layer {
namespace {

template <class T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
    return static_cast<T*>(x.mutable_data_ptr());
}

Tensor int_table(const Tensor& like, int64_t rows, int64_t columns) {
    return empty_like_with(like, {rows, columns}, ScalarType::Int);
}

std::optional<Tensor> optional_contiguous(const std::optional<Tensor>& x) {
    if (!x.has_value()) return std::nullopt;
    return as_contiguous(*x);
}

template <class T>
const T* optional_data(const std::optional<Tensor>& x) {
    return x.has_value() ? data<T>(*x) : nullptr;
}

HeadStrides head_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// As F.scaled_dot_product_attention does it.
double scale_of(std::optional<double> scale, int64_t dim) {
    return scale.has_value() ? *scale
                             : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, dim)));
}

// (batch, heads, tokens, dim) that lies in memory as (batch, tokens, heads, dim), x itself if it
// does already.
Tensor as_heads(const Tensor& x) {
    const Tensor tokens_first = torch::stable::transpose(x, 1, 2);
    return tokens_first.is_contiguous()
               ? x
               : torch::stable::transpose(torch::stable::contiguous(tokens_first), 1, 2);
}

// The plan that a call makes, on the device of `like`.
template <class Call>
void allocate_plan(Call& call, const Tensor& like, int64_t rows) {
    call.assign = int_table(like, call.params.batch, call.params.tokens);
    call.members = int_table(like, call.params.batch, call.params.tokens);
    call.offsets = int_table(like, call.params.batch, rows + 1);
    call.params.assign = mutable_data<int32_t>(call.assign);
    call.params.members = mutable_data<int32_t>(call.members);
    call.params.offsets = mutable_data<int32_t>(call.offsets);
}

}  // namespace

MatchCall::MatchCall(const Tensor& given, int64_t r, int64_t num_prefix_tokens) {
    check_match(given, num_prefix_tokens);
    metric = with_contiguous_last_dim(given);
    const bool has_heads = metric.dim() == 4;
    const int64_t n = metric.dim() - 2;
    params.metric = metric.const_data_ptr();
    params.dtype = float_dtype(metric, "metric");
    params.batch = metric.size(0);
    params.heads = has_heads ? metric.size(1) : 1;
    params.tokens = metric.size(n);
    params.dim = metric.size(n + 1);
    params.stride_batch = metric.stride(0);
    params.stride_head = has_heads ? metric.stride(1) : 0;
    params.stride_token = metric.stride(n);
    params.r = r;
    params.num_prefix_tokens = num_prefix_tokens;
    const int64_t rows = params.tokens - cut_r(params.tokens, r, num_prefix_tokens);
    allocate_plan(*this, metric, rows);
}

SelectCall::SelectCall(const Tensor& given, int64_t keep, int64_t num_prefix_tokens, bool fuse) {
    check_select(given, keep, num_prefix_tokens);
    scores = with_contiguous_last_dim(given);
    params.scores = scores.const_data_ptr();
    params.dtype = float_dtype(scores, "scores");
    params.batch = scores.size(0);
    params.tokens = scores.size(1);
    params.stride_batch = scores.stride(0);
    params.keep = keep;
    params.num_prefix_tokens = num_prefix_tokens;
    params.fuse = fuse;
    const int64_t rows = select_rows(params.tokens, keep, num_prefix_tokens, fuse);
    allocate_plan(*this, scores, rows);
}

PlanCall::PlanCall(const Tensor& given, int64_t num_rows) {
    check_plan_args(given, num_rows);
    assign = as_contiguous(given);
    params.batch = assign.size(0);
    params.tokens = assign.size(1);
    params.rows = num_rows;
    members = int_table(assign, params.batch, params.tokens);
    offsets = int_table(assign, params.batch, num_rows + 1);
    params.assign = data<int32_t>(assign);
    params.members = mutable_data<int32_t>(members);
    params.offsets = mutable_data<int32_t>(offsets);
}

MergeCall::MergeCall(const Tensor& given, const std::optional<Tensor>& given_size,
                     const Tensor& given_members, const Tensor& given_offsets,
                     const std::string& reduce) {
    check_merge(given, "x", given.dim() == 3 ? given.size(1) : 0, given_size, given_members,
                given_offsets);
    params.reduce = parse_reduce(reduce);
    x = with_contiguous_last_dim(given);
    members = as_contiguous(given_members);
    offsets = as_contiguous(given_offsets);
    size = optional_contiguous(given_size);
    params.x = x.const_data_ptr();
    params.dtype = float_dtype(x, "x");
    params.batch = x.size(0);
    params.tokens = x.size(1);
    params.rows = offsets.size(1) - 1;
    params.channels = x.size(2);
    params.stride_batch = x.stride(0);
    params.stride_token = x.stride(1);
    params.size = optional_data<float>(size);
    params.members = data<int32_t>(members);
    params.offsets = data<int32_t>(offsets);
    out = empty_like_with(x, {params.batch, params.rows, params.channels}, x.scalar_type());
    out_size = empty_like_with(x, {params.batch, params.rows}, ScalarType::Float);
    params.out = out.mutable_data_ptr();
    params.out_size = mutable_data<float>(out_size);
}

MergeAddNormCall::MergeAddNormCall(const Tensor& given_x, const Tensor& given_branch,
                                   const std::optional<Tensor>& given_size,
                                   const Tensor& given_members, const Tensor& given_offsets,
                                   const std::optional<Tensor>& given_scale,
                                   const std::optional<Tensor>& given_weight,
                                   const std::optional<Tensor>& given_bias, double eps) {
    check_merge(given_x, "x", given_x.dim() == 3 ? given_x.size(1) : 0, given_size, given_members,
                given_offsets);
    check_add_norm(given_x, given_branch, given_scale, given_weight, given_bias, eps);
    x = with_contiguous_last_dim(given_x);
    branch = with_contiguous_last_dim(given_branch);
    members = as_contiguous(given_members);
    offsets = as_contiguous(given_offsets);
    size = optional_contiguous(given_size);
    scale = optional_contiguous(given_scale);
    weight = optional_contiguous(given_weight);
    bias = optional_contiguous(given_bias);
    params.x = x.const_data_ptr();
    params.branch = branch.const_data_ptr();
    params.dtype = float_dtype(x, "x");
    params.batch = x.size(0);
    params.tokens = x.size(1);
    params.rows = offsets.size(1) - 1;
    params.channels = x.size(2);
    params.x_stride_batch = x.stride(0);
    params.x_stride_token = x.stride(1);
    params.branch_stride_batch = branch.stride(0);
    params.branch_stride_token = branch.stride(1);
    params.scale = optional_data<void>(scale);
    params.weight = optional_data<void>(weight);
    params.bias = optional_data<void>(bias);
    params.eps = eps;
    params.size = optional_data<float>(size);
    params.members = data<int32_t>(members);
    params.offsets = data<int32_t>(offsets);
    out = empty_like_with(x, {params.batch, params.rows, params.channels}, x.scalar_type());
    out_size = empty_like_with(x, {params.batch, params.rows}, ScalarType::Float);
    normed = empty_like_with(x, {params.batch, params.rows, params.channels}, x.scalar_type());
    params.out = out.mutable_data_ptr();
    params.out_size = mutable_data<float>(out_size);
    params.normed = normed.mutable_data_ptr();
}

MergeBackwardCall::MergeBackwardCall(const Tensor& given, const std::optional<Tensor>& given_size,
                                     const Tensor& given_members, const Tensor& given_offsets,
                                     const std::string& reduce) {
    check_merge(given, "grad", -1, given_size, given_members, given_offsets);
    STD_TORCH_CHECK(given.size(1) == given_offsets.size(1) - 1,
                    "grad: expected (B, M = ", given_offsets.size(1) - 1, ", C), got ",
                    describe(given));
    params.reduce = parse_reduce(reduce);
    STD_TORCH_CHECK(params.reduce != Reduce::kAmax,
                    "reduce: expected 'mean' or 'sum' in merge_backward, got 'amax'");
    grad = with_contiguous_last_dim(given);
    members = as_contiguous(given_members);
    offsets = as_contiguous(given_offsets);
    size = optional_contiguous(given_size);
    params.grad = grad.const_data_ptr();
    params.dtype = float_dtype(grad, "grad");
    params.batch = grad.size(0);
    params.tokens = members.size(1);
    params.rows = grad.size(1);
    params.channels = grad.size(2);
    params.stride_batch = grad.stride(0);
    params.stride_row = grad.stride(1);
    params.size = optional_data<float>(size);
    params.members = data<int32_t>(members);
    params.offsets = data<int32_t>(offsets);
    out = empty_like_with(grad, {params.batch, params.tokens, params.channels}, grad.scalar_type());
    params.out = out.mutable_data_ptr();
}

UnmergeCall::UnmergeCall(const Tensor& given, const Tensor& given_assign) {
    check_unmerge(given, given_assign);
    x = with_contiguous_last_dim(given);
    assign = as_contiguous(given_assign);
    params.x = x.const_data_ptr();
    params.dtype = float_dtype(x, "x");
    params.batch = x.size(0);
    params.tokens = assign.size(1);
    params.rows = x.size(1);
    params.channels = x.size(2);
    params.stride_batch = x.stride(0);
    params.stride_row = x.stride(1);
    params.assign = data<int32_t>(assign);
    out = empty_like_with(x, {params.batch, params.tokens, params.channels}, x.scalar_type());
    params.out = out.mutable_data_ptr();
}

AttentionTensors::AttentionTensors(const Tensor& given_q, const Tensor& given_k,
                                   const Tensor& given_v, const std::optional<Tensor>& given_size) {
    check_attention(given_q, given_k, given_v, given_size);
    q = with_contiguous_last_dim(given_q);
    k = with_contiguous_last_dim(given_k);
    v = with_contiguous_last_dim(given_v);
    size = optional_contiguous(given_size);
}

AttentionInputs AttentionTensors::inputs(std::optional<double> scale) const {
    AttentionInputs p{};
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.dtype = float_dtype(q, "q");
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.queries = q.size(2);
    p.keys = k.size(2);
    p.dim = q.size(3);
    p.q_strides = head_strides(q);
    p.k_strides = head_strides(k);
    p.v_strides = head_strides(v);
    p.size = optional_data<float>(size);
    p.scale = scale_of(scale, p.dim);
    return p;
}

AttentionCall::AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& size, std::optional<double> scale)
    : tensors(q, k, v, size) {
    AttentionInputs& inputs = params;
    inputs = tensors.inputs(scale);
    out = empty_heads_like(q, params.batch, params.heads, params.queries, params.dim);
    lse = empty_like_with(q, {params.batch, params.heads, params.queries}, accumulate_dtype(q));
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr();
}

AttentionBackwardCall::AttentionBackwardCall(const Tensor& given_grad, const Tensor& q,
                                             const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& size,
                                             const Tensor& given_out, const Tensor& given_lse,
                                             std::optional<double> scale)
    : tensors(q, k, v, size) {
    check_same_as(given_grad, "grad", q, "q");
    check_same_as(given_out, "out", q, "q");
    check_lse(given_lse, q);
    grad = with_contiguous_last_dim(given_grad);
    out = as_heads(given_out);
    lse = as_contiguous(given_lse);
    AttentionInputs& inputs = params;
    inputs = tensors.inputs(scale);
    params.grad = grad.const_data_ptr();
    params.grad_strides = head_strides(grad);
    params.out = out.const_data_ptr();
    params.lse = lse.const_data_ptr();
    grad_q = empty_heads_like(q, params.batch, params.heads, params.queries, params.dim);
    grad_k = empty_heads_like(q, params.batch, params.heads, params.keys, params.dim);
    grad_v = empty_heads_like(q, params.batch, params.heads, params.keys, params.dim);
    params.grad_q = grad_q.mutable_data_ptr();
    params.grad_k = grad_k.mutable_data_ptr();
    params.grad_v = grad_v.mutable_data_ptr();
}

ClsAttentionCall::ClsAttentionCall(const Tensor& given_q, const Tensor& given_k,
                                   const std::optional<Tensor>& given_size,
                                   std::optional<double> scale) {
    check_cls_attention(given_q, given_k, given_size);
    q = with_contiguous_last_dim(given_q);
    k = with_contiguous_last_dim(given_k);
    size = optional_contiguous(given_size);
    params.q = q.const_data_ptr();
    params.k = k.const_data_ptr();
    params.dtype = float_dtype(q, "q");
    params.batch = q.size(0);
    params.heads = q.size(1);
    params.keys = k.size(2);
    params.dim = q.size(3);
    params.q_stride_batch = q.stride(0);
    params.q_stride_head = q.stride(1);
    params.k_strides = head_strides(k);
    params.size = optional_data<float>(size);
    params.scale = scale_of(scale, params.dim);
    out = empty_like_with(q, {params.batch, params.keys}, accumulate_dtype(q));
    params.out = out.mutable_data_ptr();
}

}  // namespace tome::torch_layer
