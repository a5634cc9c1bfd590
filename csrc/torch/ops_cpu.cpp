// The operators on the CPU: tome_core on torch's own threads.

#include <optional>
#include <string>
#include <tuple>

#include "calls.h"
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

std::tuple<Tensor, Tensor, Tensor> match(Tensor metric, int64_t r, int64_t num_prefix_tokens) {
    const MatchCall call(metric, r, num_prefix_tokens);
    tome::match(call.params, torch_threads());
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> select(Tensor scores, int64_t keep, int64_t num_prefix_tokens,
                                          bool fuse) {
    const SelectCall call(scores, keep, num_prefix_tokens, fuse);
    tome::select(call.params, torch_threads());
    return call.outputs();
}

std::tuple<Tensor, Tensor> plan(Tensor assign, int64_t num_rows) {
    const PlanCall call(assign, num_rows);
    const PlanParams& p = call.params;
    check_status(tome::plan(p, torch_threads()), "plan", p.tokens, p.rows);
    return call.outputs();
}

std::tuple<Tensor, Tensor> merge(Tensor x, std::optional<Tensor> size, Tensor members,
                                 Tensor offsets, std::string reduce) {
    const MergeCall call(x, size, members, offsets, reduce);
    const MergeParams& p = call.params;
    check_status(tome::merge(p, torch_threads()), "merge", p.tokens, p.rows);
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> merge_add_norm(Tensor x, Tensor branch,
                                                  std::optional<Tensor> size, Tensor members,
                                                  Tensor offsets, std::optional<Tensor> scale,
                                                  std::optional<Tensor> weight,
                                                  std::optional<Tensor> bias, double eps) {
    const MergeAddNormCall call(x, branch, size, members, offsets, scale, weight, bias, eps);
    const MergeAddNormParams& p = call.params;
    check_status(tome::merge_add_norm(p, torch_threads()), "merge_add_norm", p.tokens, p.rows);
    return call.outputs();
}

Tensor merge_backward(Tensor grad, std::optional<Tensor> size, Tensor members, Tensor offsets,
                      std::string reduce) {
    const MergeBackwardCall call(grad, size, members, offsets, reduce);
    const MergeBackwardParams& p = call.params;
    check_status(tome::merge_backward(p, torch_threads()), "merge_backward", p.tokens, p.rows);
    return call.out;
}

Tensor unmerge(Tensor x, Tensor assign) {
    const UnmergeCall call(x, assign);
    const UnmergeParams& p = call.params;
    check_status(tome::unmerge(p, torch_threads()), "unmerge", p.tokens, p.rows);
    return call.out;
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> size,
                                             std::optional<double> scale) {
    const AttentionCall call(q, k, v, size, scale);
    tome::attention(call.params, torch_threads());
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      std::optional<Tensor> size, Tensor out,
                                                      Tensor lse, std::optional<double> scale) {
    const AttentionBackwardCall call(grad, q, k, v, size, out, lse, scale);
    tome::attention_backward(call.params, torch_threads());
    return call.outputs();
}

Tensor cls_attention(Tensor q, Tensor k, std::optional<Tensor> size, std::optional<double> scale) {
    const ClsAttentionCall call(q, k, size, scale);
    tome::cls_attention(call.params, torch_threads());
    return call.out;
}

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CPU, m) {
    m.impl("match", TORCH_BOX(&tome::torch_layer::match));
    m.impl("select", TORCH_BOX(&tome::torch_layer::select));
    m.impl("plan", TORCH_BOX(&tome::torch_layer::plan));
    m.impl("merge", TORCH_BOX(&tome::torch_layer::merge));
    m.impl("merge_add_norm", TORCH_BOX(&tome::torch_layer::merge_add_norm));
    m.impl("merge_backward", TORCH_BOX(&tome::torch_layer::merge_backward));
    m.impl("unmerge", TORCH_BOX(&tome::torch_layer::unmerge));
    m.impl("attention_forward", TORCH_BOX(&tome::torch_layer::attention_forward));
    m.impl("attention_backward", TORCH_BOX(&tome::torch_layer::attention_backward));
    m.impl("cls_attention", TORCH_BOX(&tome::torch_layer::cls_attention));
}
