#include "calls.h"

#include <cmath>
#include <limits>

#include "checks.h"

namespace tome::torch_layer {
namespace {

void check_prefix(int64_t num_prefix_tokens) {
    TOME_EXPECT(num_prefix_tokens >= 0, "num_prefix_tokens: expected a number >= 0, got ",
                num_prefix_tokens);
}

void check_targets(const Tensor& targets, const Tensor& metric, int64_t num_prefix_tokens) {
    TOME_EXPECT(targets.dim() == 1 && targets.scalar_type() == ScalarType::Int,
                "targets: expected (T,) int32, got ", describe(targets));
    const int64_t tokens = metric.size(metric.dim() - 2);
    TOME_EXPECT(targets.size(0) <= std::max<int64_t>(0, tokens - num_prefix_tokens),
                "targets: expected at most as many as tokens behind the prefix, got ",
                describe(targets));
    check_same_device(metric, "metric", targets, "targets");
}

void check_plan_tensor(const Tensor& x, const char* name) {
    TOME_EXPECT(x.dim() == 2 && x.scalar_type() == ScalarType::Int, name,
                ": expected (B, N) int32, got ", describe(x));
}

// Of (batch, count, channels), as a plan has them: what does not fit a plan is x's fault, not the
// plan's. A count below 0 accepts any.
void check_planned(const Tensor& x, const char* name, int64_t batch, const char* count_name,
                   int64_t count) {
    const bool fits = x.size(0) == batch && (count < 0 || x.size(1) == count);
    TOME_EXPECT(fits, name, ": expected (B, ", count_name, ", C) = (", batch, ", ",
                count < 0 ? count_name : std::to_string(count), ", C) as in the plan, got ",
                describe(x));
}

// Tokens, or with `rows` the rows of a plan, and its tensors.
void check_merge(const Tensor& x, const char* name, bool rows, const OptionalTensor& size,
                 const Tensor& members, const Tensor& offsets) {
    TOME_EXPECT(x.dim() == 3, name, ": expected (B, N, C), got ", describe(x));
    float_dtype(x, name);
    check_plan_tensor(members, "members");
    check_table(offsets, "offsets", members.size(0), -1, "M + 1", ScalarType::Int);
    TOME_EXPECT(offsets.size(1) > 0, "offsets: expected at least one column, got ",
                describe(offsets));
    check_planned(x, name, members.size(0), rows ? "M" : "N",
                  rows ? offsets.size(1) - 1 : members.size(1));
    check_same_device(x, name, members, "members");
    check_same_device(x, name, offsets, "offsets");
    if (size.has_value()) {
        check_table(*size, "size", x.size(0), members.size(1), "N", ScalarType::Float);
        check_same_device(x, name, *size, "size");
    }
}

// (batch, heads, tokens, dim) twice, alike but for the number of tokens.
void check_heads(const Tensor& q, const char* q_name, const Tensor& k, const char* k_name) {
    TOME_EXPECT(q.dim() == 4, q_name, ": expected (B, H, M, D), got ", describe(q));
    float_dtype(q, q_name);
    const bool fits = k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                      k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type();
    TOME_EXPECT(fits, k_name, ": expected (B, H, N, D) = (", q.size(0), ", ", q.size(1), ", N, ",
                q.size(3), ") ", dtype_name(q.scalar_type()), " as ", q_name, " is, got ",
                describe(k));
    check_same_device(q, q_name, k, k_name);
}

// (channels) of x's dtype.
void check_channels(const OptionalTensor& v, const char* name, const Tensor& x) {
    if (!v.has_value()) return;
    const bool fits =
        v->dim() == 1 && v->size(0) == x.size(2) && v->scalar_type() == x.scalar_type();
    TOME_EXPECT(fits, name, ": expected (C = ", x.size(2), ",) ", dtype_name(x.scalar_type()),
                " as x is, got ", describe(*v));
    check_same_device(x, "x", *v, name);
}

void check_key_sizes(const Tensor& k, const OptionalTensor& size) {
    if (!size.has_value()) return;
    check_table(*size, "size", k.size(0), k.size(2), "N", ScalarType::Float);
    check_same_device(k, "k", *size, "size");
}

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

OptionalTensor optional_contiguous(const OptionalTensor& x) {
    if (!x.has_value()) return std::nullopt;
    return as_contiguous(*x);
}

template <class T>
const T* optional_data(const OptionalTensor& x) {
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

void MatchCall::take(Tensor given, int64_t r, int64_t num_prefix_tokens,
                     OptionalTensor given_weight, OptionalTensor given_targets,
                     OptionalTensor given_size, OptionalTensor given_importance,
                     std::optional<double> threshold) {
    TOME_EXPECT(given.dim() == 3 || given.dim() == 4,
                "metric: expected (B, N, D) or (B, H, N, D), got ", describe(given));
    params.dtype = float_dtype(given, "metric");
    const bool has_heads = given.dim() == 4;
    const int64_t n = given.dim() - 2;
    TOME_EXPECT(!has_heads || given.size(1) > 0, "metric: expected at least one head, got ",
                describe(given));
    TOME_EXPECT(given.size(n) <= INT32_MAX, "metric: expected at most 2^31 - 1 tokens, got ",
                describe(given));
    check_prefix(num_prefix_tokens);
    const auto check_of_tokens = [&](const OptionalTensor& table, const char* name) {
        if (!table.has_value()) return;
        check_table(*table, name, given.size(0), given.size(n), "N", ScalarType::Float);
        check_same_device(given, "metric", *table, name);
    };
    check_of_tokens(given_weight, "weight");
    if (given_targets.has_value()) check_targets(*given_targets, given, num_prefix_tokens);
    check_of_tokens(given_size, "size");
    check_of_tokens(given_importance, "importance");
    if (threshold.has_value()) {
        TOME_EXPECT(!std::isnan(*threshold), "threshold: expected a number, got nan");
        params.threshold = *threshold;
    }
    weight = optional_contiguous(given_weight);
    size = optional_contiguous(given_size);
    importance = optional_contiguous(given_importance);
    targets = optional_contiguous(given_targets);
    metric = with_contiguous_last_dim(given);
    params.metric = metric.const_data_ptr();
    params.batch = metric.size(0);
    params.heads = has_heads ? metric.size(1) : 1;
    params.tokens = metric.size(n);
    params.dim = metric.size(n + 1);
    params.stride_batch = metric.stride(0);
    params.stride_head = has_heads ? metric.stride(1) : 0;
    params.stride_token = metric.stride(n);
    params.r = r;
    params.num_prefix_tokens = std::min(num_prefix_tokens, params.tokens);
    params.weight = optional_data<float>(weight);
    params.size = optional_data<float>(size);
    params.importance = optional_data<float>(importance);
    params.targets = optional_data<int32_t>(targets);
    params.num_targets = targets.has_value() ? targets->size(0) : 0;
    // No targets may lie at no address, which would stand for the odd positions.
    if (targets.has_value() && params.num_targets == 0) {
        params.r = 0;
        params.threshold = std::numeric_limits<double>::infinity();
    }
    const int64_t rows = params.tokens - cut_r(params);
    allocate_plan(*this, metric, rows);
}

void SelectCall::take(Tensor given, int64_t keep, int64_t num_prefix_tokens, bool fuse) {
    TOME_EXPECT(given.dim() == 2 && (given.scalar_type() == ScalarType::Float ||
                                     given.scalar_type() == ScalarType::Double),
                "scores: expected (B, N) float32 or float64, got ", describe(given));
    TOME_EXPECT(given.size(1) < INT32_MAX, "scores: expected fewer than 2^31 - 1 tokens, got ",
                describe(given));
    TOME_EXPECT(keep >= 0, "keep: expected a number >= 0, got ", keep);
    check_prefix(num_prefix_tokens);
    scores = with_contiguous_last_dim(given);
    params.scores = scores.const_data_ptr();
    params.dtype = float_dtype(scores, "scores");
    params.batch = scores.size(0);
    params.tokens = scores.size(1);
    params.stride_batch = scores.stride(0);
    params.keep = keep;
    params.num_prefix_tokens = std::min(num_prefix_tokens, params.tokens);
    params.fuse = fuse;
    const int64_t rows = select_rows(params.tokens, keep, num_prefix_tokens, fuse);
    allocate_plan(*this, scores, rows);
}

void PlanCall::take(Tensor given, int64_t num_rows) {
    check_plan_tensor(given, "assign");
    TOME_EXPECT(num_rows >= 0 && num_rows < INT32_MAX,
                "num_rows: expected a number >= 0 and < 2^31 - 1, got ", num_rows);
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

void MergeCall::take(Tensor given, OptionalTensor given_size, Tensor given_members,
                     Tensor given_offsets, std::string reduce) {
    check_merge(given, "x", false, given_size, given_members, given_offsets);
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

void MergeAddNormCall::take(Tensor given_x, Tensor given_branch, OptionalTensor given_size,
                            Tensor given_members, Tensor given_offsets, OptionalTensor given_scale,
                            OptionalTensor given_weight, OptionalTensor given_bias, double eps,
                            bool keep_norms) {
    check_merge(given_x, "x", false, given_size, given_members, given_offsets);
    check_same_as(given_branch, "branch", given_x, "x");
    check_channels(given_scale, "scale", given_x);
    check_channels(given_weight, "weight", given_x);
    check_channels(given_bias, "bias", given_x);
    TOME_EXPECT(eps >= 0, "eps: expected a number >= 0, got ", eps);
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
    params.keep_norms = keep_norms;
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

void MergeBackwardCall::take(Tensor given, OptionalTensor given_size, Tensor given_members,
                             Tensor given_offsets, std::string reduce) {
    check_merge(given, "grad", true, given_size, given_members, given_offsets);
    params.reduce = parse_reduce(reduce);
    TOME_EXPECT(params.reduce != Reduce::kAmax,
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

void UnmergeCall::take(Tensor given, Tensor given_assign) {
    TOME_EXPECT(given.dim() == 3, "x: expected (B, M, C), got ", describe(given));
    float_dtype(given, "x");
    check_plan_tensor(given_assign, "assign");
    check_planned(given, "x", given_assign.size(0), "M", -1);
    check_same_device(given, "x", given_assign, "assign");
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

AttentionInputs AttentionTensors::take(const Tensor& given_q, const Tensor& given_k,
                                       const Tensor& given_v, const OptionalTensor& given_size,
                                       std::optional<double> scale) {
    check_heads(given_q, "q", given_k, "k");
    TOME_EXPECT(same_shape(given_k, given_v) && given_v.scalar_type() == given_k.scalar_type(),
                "v: expected the shape and dtype of k, ", describe(given_k), ", got ",
                describe(given_v));
    check_same_device(given_q, "q", given_v, "v");
    check_key_sizes(given_k, given_size);
    q = with_contiguous_last_dim(given_q);
    k = with_contiguous_last_dim(given_k);
    v = with_contiguous_last_dim(given_v);
    size = optional_contiguous(given_size);
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

void AttentionCall::take(Tensor q, Tensor k, Tensor v, OptionalTensor size,
                         std::optional<double> scale) {
    AttentionInputs& inputs = params;
    inputs = tensors.take(q, k, v, size, scale);
    out = empty_heads_like(q, params.batch, params.heads, params.queries, params.dim);
    lse = empty_like_with(q, {params.batch, params.heads, params.queries}, accumulate_dtype(q));
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr();
}

void AttentionBackwardCall::take(Tensor given_grad, Tensor q, Tensor k, Tensor v,
                                 OptionalTensor size, Tensor given_out, Tensor given_lse,
                                 std::optional<double> scale) {
    AttentionInputs& inputs = params;
    inputs = tensors.take(q, k, v, size, scale);
    check_same_as(given_grad, "grad", q, "q");
    check_same_as(given_out, "out", q, "q");
    const ScalarType dtype = accumulate_dtype(q);
    TOME_EXPECT(given_lse.dim() == 3 && given_lse.size(0) == q.size(0) &&
                    given_lse.size(1) == q.size(1) && given_lse.size(2) == q.size(2) &&
                    given_lse.scalar_type() == dtype,
                "lse: expected (B, H, M) = (", q.size(0), ", ", q.size(1), ", ", q.size(2), ") ",
                dtype_name(dtype), ", got ", describe(given_lse));
    check_same_device(q, "q", given_lse, "lse");
    grad = with_contiguous_last_dim(given_grad);
    out = as_heads(given_out);
    lse = as_contiguous(given_lse);
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

void ClsAttentionCall::take(Tensor given_q, Tensor given_k, OptionalTensor given_size,
                            std::optional<double> scale) {
    check_heads(given_q, "q", given_k, "k");
    TOME_EXPECT(given_q.size(1) > 0 && given_q.size(2) > 0,
                "q: expected at least one head and one token, got ", describe(given_q));
    check_key_sizes(given_k, given_size);
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
