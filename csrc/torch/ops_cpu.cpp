// The operators on the CPU: check, allocate, call tome_core on torch's own threads.

#include <tuple>

#include "checks.h"
#include "stable.h"
#include "tome_core/tome_core.h"

namespace tome::torch_layer {
namespace {

Threads torch_threads() {
    const auto run = [](void*, int64_t count, int64_t grain, Threads::Body body, void* context) {
        torch::stable::parallel_for(0, count, grain,
                                    [&](int64_t begin, int64_t end) { body(context, begin, end); });
    };
    return {run, nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

void check_status(const Status& status, const char* op, int64_t tokens, int64_t rows) {
    switch (status.code) {
        case Status::kOk:
            return;
        case Status::kAssignOutOfRange:
            STD_TORCH_CHECK(false, op, ": expected assign entries from -1 to M - 1 = ", rows - 1,
                            ", got assign[", status.batch, ", ", status.index,
                            "] = ", status.value);
        case Status::kMemberOutOfRange:
            STD_TORCH_CHECK(false, op, ": expected members entries from 0 to N - 1 = ", tokens - 1,
                            ", got members[", status.batch, ", ", status.index,
                            "] = ", status.value);
        case Status::kMemberRepeated:
            STD_TORCH_CHECK(false, op, ": expected every token once in members, got token ",
                            status.value, " again at members[", status.batch, ", ", status.index,
                            "]");
        case Status::kOffsetsNotOrdered:
            STD_TORCH_CHECK(false, op,
                            ": expected offsets that start at 0, never decrease and end at most "
                            "at N = ",
                            tokens, ", got offsets[", status.batch, ", ", status.index,
                            "] = ", status.value);
    }
}

template <class T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
    return static_cast<T*>(x.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> match(Tensor metric, int64_t r, int64_t num_prefix_tokens) {
    check_match(metric, num_prefix_tokens);
    metric = with_contiguous_last_dim(metric);
    const bool has_heads = metric.dim() == 4;
    const int64_t n = metric.dim() - 2;
    MatchParams p{};
    p.metric = metric.const_data_ptr();
    p.dtype = float_dtype(metric, "metric");
    p.batch = metric.size(0);
    p.heads = has_heads ? metric.size(1) : 1;
    p.tokens = metric.size(n);
    p.dim = metric.size(n + 1);
    p.stride_batch = metric.stride(0);
    p.stride_head = has_heads ? metric.stride(1) : 0;
    p.stride_token = metric.stride(n);
    p.r = r;
    p.num_prefix_tokens = num_prefix_tokens;
    const int64_t rows = p.tokens - cut_r(p.tokens, r, num_prefix_tokens);
    Tensor assign = empty_like_with(metric, {p.batch, p.tokens}, ScalarType::Int);
    Tensor members = empty_like_with(metric, {p.batch, p.tokens}, ScalarType::Int);
    Tensor offsets = empty_like_with(metric, {p.batch, rows + 1}, ScalarType::Int);
    p.assign = mutable_data<int32_t>(assign);
    p.members = mutable_data<int32_t>(members);
    p.offsets = mutable_data<int32_t>(offsets);
    tome::match(p, torch_threads());
    return {assign, members, offsets};
}

std::tuple<Tensor, Tensor> plan(Tensor assign, int64_t num_rows) {
    check_plan_args(assign, num_rows);
    assign = as_contiguous(assign);
    const int64_t batch = assign.size(0), tokens = assign.size(1);
    Tensor members = empty_like_with(assign, {batch, tokens}, ScalarType::Int);
    Tensor offsets = empty_like_with(assign, {batch, num_rows + 1}, ScalarType::Int);
    const PlanParams p{
        data<int32_t>(assign),         batch, tokens, num_rows, mutable_data<int32_t>(members),
        mutable_data<int32_t>(offsets)};
    check_status(tome::plan(p, torch_threads()), "plan", tokens, num_rows);
    return {members, offsets};
}

std::tuple<Tensor, Tensor> merge(Tensor x, std::optional<Tensor> size, Tensor members,
                                 Tensor offsets, std::string reduce) {
    check_merge(x, "x", x.dim() == 3 ? x.size(1) : 0, size, members, offsets);
    MergeParams p{};
    p.reduce = parse_reduce(reduce);
    x = with_contiguous_last_dim(x);
    members = as_contiguous(members);
    offsets = as_contiguous(offsets);
    if (size.has_value()) size = as_contiguous(*size);
    p.x = x.const_data_ptr();
    p.dtype = float_dtype(x, "x");
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.rows = offsets.size(1) - 1;
    p.channels = x.size(2);
    p.stride_batch = x.stride(0);
    p.stride_token = x.stride(1);
    p.size = size.has_value() ? data<float>(*size) : nullptr;
    p.members = data<int32_t>(members);
    p.offsets = data<int32_t>(offsets);
    Tensor out = empty_like_with(x, {p.batch, p.rows, p.channels}, x.scalar_type());
    Tensor out_size = empty_like_with(x, {p.batch, p.rows}, ScalarType::Float);
    p.out = out.mutable_data_ptr();
    p.out_size = mutable_data<float>(out_size);
    check_status(tome::merge(p, torch_threads()), "merge", p.tokens, p.rows);
    return {out, out_size};
}

Tensor merge_backward(Tensor grad, std::optional<Tensor> size, Tensor members, Tensor offsets,
                      std::string reduce) {
    check_merge(grad, "grad", -1, size, members, offsets);
    STD_TORCH_CHECK(grad.size(1) == offsets.size(1) - 1,
                    "grad: expected (B, M = ", offsets.size(1) - 1, ", C), got ", describe(grad));
    MergeBackwardParams p{};
    p.reduce = parse_reduce(reduce);
    STD_TORCH_CHECK(p.reduce != Reduce::kAmax,
                    "reduce: expected 'mean' or 'sum' in merge_backward, got 'amax'");
    grad = with_contiguous_last_dim(grad);
    members = as_contiguous(members);
    offsets = as_contiguous(offsets);
    if (size.has_value()) size = as_contiguous(*size);
    p.grad = grad.const_data_ptr();
    p.dtype = float_dtype(grad, "grad");
    p.batch = grad.size(0);
    p.tokens = members.size(1);
    p.rows = grad.size(1);
    p.channels = grad.size(2);
    p.stride_batch = grad.stride(0);
    p.stride_row = grad.stride(1);
    p.size = size.has_value() ? data<float>(*size) : nullptr;
    p.members = data<int32_t>(members);
    p.offsets = data<int32_t>(offsets);
    Tensor out = empty_like_with(grad, {p.batch, p.tokens, p.channels}, grad.scalar_type());
    p.out = out.mutable_data_ptr();
    check_status(tome::merge_backward(p, torch_threads()), "merge_backward", p.tokens, p.rows);
    return out;
}

Tensor unmerge(Tensor x, Tensor assign) {
    check_unmerge(x, assign);
    x = with_contiguous_last_dim(x);
    assign = as_contiguous(assign);
    UnmergeParams p{};
    p.x = x.const_data_ptr();
    p.dtype = float_dtype(x, "x");
    p.batch = x.size(0);
    p.tokens = assign.size(1);
    p.rows = x.size(1);
    p.channels = x.size(2);
    p.stride_batch = x.stride(0);
    p.stride_row = x.stride(1);
    p.assign = data<int32_t>(assign);
    Tensor out = empty_like_with(x, {p.batch, p.tokens, p.channels}, x.scalar_type());
    p.out = out.mutable_data_ptr();
    check_status(tome::unmerge(p, torch_threads()), "unmerge", p.tokens, p.rows);
    return out;
}

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CPU, m) {
    m.impl("match", TORCH_BOX(&tome::torch_layer::match));
    m.impl("plan", TORCH_BOX(&tome::torch_layer::plan));
    m.impl("merge", TORCH_BOX(&tome::torch_layer::merge));
    m.impl("merge_backward", TORCH_BOX(&tome::torch_layer::merge_backward));
    m.impl("unmerge", TORCH_BOX(&tome::torch_layer::unmerge));
}
