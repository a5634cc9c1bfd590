// The operators on the CPU: tome_core on torch's own threads.

#include "calls.h"
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
            TOME_REFUSE(op, ": expected assign entries from -1 to M - 1 = ", rows - 1,
                        ", got assign[", status.batch, ", ", status.index, "] = ", status.value);
        case Status::kMemberOutOfRange:
            TOME_REFUSE(op, ": expected members entries from 0 to N - 1 = ", tokens - 1,
                        ", got members[", status.batch, ", ", status.index, "] = ", status.value);
        case Status::kMemberRepeated:
            TOME_REFUSE(op, ": expected every token once in members, got token ", status.value,
                        " again at members[", status.batch, ", ", status.index, "]");
        case Status::kOffsetsNotOrdered:
            TOME_REFUSE(op,
                        ": expected offsets that start at 0, never decrease and end at most "
                        "at N = ",
                        tokens, ", got offsets[", status.batch, ", ", status.index,
                        "] = ", status.value);
        case Status::kTargetsNotOrdered:
            TOME_REFUSE(op, ": expected ascending targets behind the prefix, below N = ", tokens,
                        ", got targets[", status.index, "] = ", status.value);
    }
}

Status compute(const MatchParams& p) { return match(p, torch_threads()); }
void compute(const SelectParams& p) { select(p, torch_threads()); }
Status compute(const PlanParams& p) { return plan(p, torch_threads()); }
Status compute(const MergeParams& p) { return merge(p, torch_threads()); }
Status compute(const MergeAddNormParams& p) { return merge_add_norm(p, torch_threads()); }
Status compute(const MergeBackwardParams& p) { return merge_backward(p, torch_threads()); }
Status compute(const UnmergeParams& p) { return unmerge(p, torch_threads()); }
void compute(const AttentionParams& p) { attention(p, torch_threads()); }
void compute(const AttentionBackwardParams& p) { attention_backward(p, torch_threads()); }
void compute(const ClsAttentionParams& p) { cls_attention(p, torch_threads()); }

struct Cpu {
    template <class Call, class... Args>
    static auto run(const Call& call, const Args&...) {
        if constexpr (requires { compute(call.params).code; }) {
            int64_t rows = 0;
            if constexpr (requires { call.params.rows; }) rows = call.params.rows;
            check_status(compute(call.params), Call::kName, call.params.tokens, rows);
        } else {
            compute(call.params);
        }
        return call.outputs();
    }
};

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CPU, m) {
    using namespace tome::torch_layer;
    register_calls<Cpu>(m, AllCalls{});
}
