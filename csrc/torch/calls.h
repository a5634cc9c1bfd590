// The operators: what each is called, takes and returns, the same for every device. A call checks
// its arguments, brings them into the strides that the kernels take, allocates the outputs, and
// holds the tensors that its params point into. What runs it is a backend: ops_cpu.cpp and
// cuda/ops_cuda.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "stable.h"
#include "tome_core/attention.h"
#include "tome_core/match.h"
#include "tome_core/merge.h"
#include "tome_core/select.h"

namespace tome::torch_layer {

using OptionalTensor = std::optional<Tensor>;

// `take` has the arguments of kSchema, in their order.
struct MatchCall {
    static constexpr const char* kName = "match";
    static constexpr const char* kSchema =
        "(Tensor metric, int r, int num_prefix_tokens=0, *, Tensor? weight=None, Tensor? "
        "targets=None, Tensor? size=None, Tensor? importance=None, float? threshold=None) -> "
        "(Tensor assign, Tensor members, Tensor offsets)";
    MatchParams params{};
    Tensor metric, assign, members, offsets;
    OptionalTensor weight, targets, size, importance;

    void take(Tensor metric, int64_t r, int64_t num_prefix_tokens, OptionalTensor weight,
              OptionalTensor targets, OptionalTensor size, OptionalTensor importance,
              std::optional<double> threshold);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {assign, members, offsets}; }
};

struct SelectCall {
    static constexpr const char* kName = "select";
    static constexpr const char* kSchema =
        "(Tensor scores, int keep, int num_prefix_tokens=0, bool fuse=False) -> (Tensor assign, "
        "Tensor members, Tensor offsets)";
    SelectParams params{};
    Tensor scores, assign, members, offsets;

    void take(Tensor scores, int64_t keep, int64_t num_prefix_tokens, bool fuse);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {assign, members, offsets}; }
};

struct PlanCall {
    static constexpr const char* kName = "plan";
    static constexpr const char* kSchema =
        "(Tensor assign, int num_rows) -> (Tensor members, Tensor offsets)";
    PlanParams params{};
    Tensor assign, members, offsets;

    void take(Tensor assign, int64_t num_rows);
    std::tuple<Tensor, Tensor> outputs() const { return {members, offsets}; }
};

struct MergeCall {
    static constexpr const char* kName = "merge";
    static constexpr const char* kSchema =
        "(Tensor x, Tensor? size, Tensor members, Tensor offsets, str reduce=\"mean\") -> (Tensor, "
        "Tensor)";
    MergeParams params{};
    Tensor x, members, offsets, out, out_size;
    OptionalTensor size;

    void take(Tensor x, OptionalTensor size, Tensor members, Tensor offsets, std::string reduce);
    std::tuple<Tensor, Tensor> outputs() const { return {out, out_size}; }
};

struct MergeAddNormCall {
    static constexpr const char* kName = "merge_add_norm";
    static constexpr const char* kSchema =
        "(Tensor x, Tensor branch, Tensor? size, Tensor members, Tensor offsets, Tensor? "
        "scale=None, Tensor? weight=None, Tensor? bias=None, float eps=1e-6, bool "
        "keep_norms=False) -> (Tensor, Tensor, Tensor)";
    MergeAddNormParams params{};
    Tensor x, branch, members, offsets, out, out_size, normed;
    OptionalTensor size, scale, weight, bias;

    void take(Tensor x, Tensor branch, OptionalTensor size, Tensor members, Tensor offsets,
              OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, double eps,
              bool keep_norms);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {out, out_size, normed}; }
};

struct MergeBackwardCall {
    static constexpr const char* kName = "merge_backward";
    static constexpr const char* kSchema =
        "(Tensor grad, Tensor? size, Tensor members, Tensor offsets, str reduce=\"mean\") -> "
        "Tensor";
    MergeBackwardParams params{};
    Tensor grad, members, offsets, out;
    OptionalTensor size;

    void take(Tensor grad, OptionalTensor size, Tensor members, Tensor offsets, std::string reduce);
    Tensor outputs() const { return out; }
};

struct UnmergeCall {
    static constexpr const char* kName = "unmerge";
    static constexpr const char* kSchema = "(Tensor x, Tensor assign) -> Tensor";
    UnmergeParams params{};
    Tensor x, assign, out;

    void take(Tensor x, Tensor assign);
    Tensor outputs() const { return out; }
};

// What attention and its gradient share.
struct AttentionTensors {
    Tensor q, k, v;
    OptionalTensor size;

    AttentionInputs take(const Tensor& q, const Tensor& k, const Tensor& v,
                         const OptionalTensor& size, std::optional<double> scale);
};

struct AttentionCall {
    static constexpr const char* kName = "attention_forward";
    static constexpr const char* kSchema =
        "(Tensor q, Tensor k, Tensor v, Tensor? size=None, float? scale=None) -> (Tensor out, "
        "Tensor lse)";
    AttentionParams params{};
    AttentionTensors tensors;
    Tensor out, lse;

    void take(Tensor q, Tensor k, Tensor v, OptionalTensor size, std::optional<double> scale);
    std::tuple<Tensor, Tensor> outputs() const { return {out, lse}; }
};

struct AttentionBackwardCall {
    static constexpr const char* kName = "attention_backward";
    static constexpr const char* kSchema =
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? size, Tensor out, Tensor lse, float? "
        "scale=None) -> (Tensor, Tensor, Tensor)";
    AttentionBackwardParams params{};
    AttentionTensors tensors;
    Tensor grad, out, lse, grad_q, grad_k, grad_v;

    void take(Tensor grad, Tensor q, Tensor k, Tensor v, OptionalTensor size, Tensor out,
              Tensor lse, std::optional<double> scale);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {grad_q, grad_k, grad_v}; }
};

struct ClsAttentionCall {
    static constexpr const char* kName = "cls_attention";
    static constexpr const char* kSchema =
        "(Tensor q, Tensor k, Tensor? size=None, float? scale=None) -> Tensor";
    ClsAttentionParams params{};
    Tensor q, k, out;
    OptionalTensor size;

    void take(Tensor q, Tensor k, OptionalTensor size, std::optional<double> scale);
    Tensor outputs() const { return out; }
};

template <class... Calls>
struct CallList {};
using AllCalls =
    CallList<MatchCall, SelectCall, PlanCall, MergeCall, MergeAddNormCall, MergeBackwardCall,
             UnmergeCall, AttentionCall, AttentionBackwardCall, ClsAttentionCall>;

// The function that a backend registers for a call.
template <class Backend, class Call, class Take = decltype(&Call::take)>
struct Operator;
template <class Backend, class Call, class... Args>
struct Operator<Backend, Call, void (Call::*)(Args...)> {
    static auto run(Args... args) {
        Call call;
        call.take(args...);
        return Backend::run(call, args...);
    }
};

// Backend::run(call, args...) computes call.outputs(), or has something else compute them.
template <class Backend, class Library, class... Calls>
void register_calls(Library& library, CallList<Calls...>) {
    (library.impl(Calls::kName, TORCH_BOX((&Operator<Backend, Calls>::run))), ...);
}

}  // namespace tome::torch_layer
