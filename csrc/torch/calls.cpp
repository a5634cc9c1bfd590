#include "calls.h"

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

const float* optional_data(const std::optional<Tensor>& x) {
    return x.has_value() ? data<float>(*x) : nullptr;
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
    assign = int_table(metric, params.batch, params.tokens);
    members = int_table(metric, params.batch, params.tokens);
    offsets = int_table(metric, params.batch, rows + 1);
    params.assign = mutable_data<int32_t>(assign);
    params.members = mutable_data<int32_t>(members);
    params.offsets = mutable_data<int32_t>(offsets);
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
    params.size = optional_data(size);
    params.members = data<int32_t>(members);
    params.offsets = data<int32_t>(offsets);
    out = empty_like_with(x, {params.batch, params.rows, params.channels}, x.scalar_type());
    out_size = empty_like_with(x, {params.batch, params.rows}, ScalarType::Float);
    params.out = out.mutable_data_ptr();
    params.out_size = mutable_data<float>(out_size);
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
    params.size = optional_data(size);
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

}  // namespace tome::torch_layer
