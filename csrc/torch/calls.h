// From tensors to the kernels' params, the same for every device: arguments are checked, brought
// into the strides that the kernels take, and outputs allocated. A call holds the tensors that its
// params point into.
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

struct MatchCall {
    MatchParams params{};
    Tensor metric, assign, members, offsets;

    MatchCall(const Tensor& metric, int64_t r, int64_t num_prefix_tokens);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {assign, members, offsets}; }
};

struct SelectCall {
    SelectParams params{};
    Tensor scores, assign, members, offsets;

    SelectCall(const Tensor& scores, int64_t keep, int64_t num_prefix_tokens, bool fuse);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {assign, members, offsets}; }
};

struct PlanCall {
    PlanParams params{};
    Tensor assign, members, offsets;

    PlanCall(const Tensor& assign, int64_t num_rows);
    std::tuple<Tensor, Tensor> outputs() const { return {members, offsets}; }
};

struct MergeCall {
    MergeParams params{};
    Tensor x, members, offsets, out, out_size;
    std::optional<Tensor> size;

    MergeCall(const Tensor& x, const std::optional<Tensor>& size, const Tensor& members,
              const Tensor& offsets, const std::string& reduce);
    std::tuple<Tensor, Tensor> outputs() const { return {out, out_size}; }
};

struct MergeAddNormCall {
    MergeAddNormParams params{};
    Tensor x, branch, members, offsets, out, out_size, normed;
    std::optional<Tensor> size, scale, weight, bias;

    MergeAddNormCall(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& size,
                     const Tensor& members, const Tensor& offsets,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, double eps);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {out, out_size, normed}; }
};

struct MergeBackwardCall {
    MergeBackwardParams params{};
    Tensor grad, members, offsets, out;
    std::optional<Tensor> size;

    MergeBackwardCall(const Tensor& grad, const std::optional<Tensor>& size, const Tensor& members,
                      const Tensor& offsets, const std::string& reduce);
};

struct UnmergeCall {
    UnmergeParams params{};
    Tensor x, assign, out;

    UnmergeCall(const Tensor& x, const Tensor& assign);
};

// What attention and its gradient share.
struct AttentionTensors {
    Tensor q, k, v;
    std::optional<Tensor> size;

    AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& size);
    AttentionInputs inputs(std::optional<double> scale) const;
};

struct AttentionCall {
    AttentionParams params{};
    AttentionTensors tensors;
    Tensor out, lse;

    AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v,
                  const std::optional<Tensor>& size, std::optional<double> scale);
    std::tuple<Tensor, Tensor> outputs() const { return {out, lse}; }
};

struct AttentionBackwardCall {
    AttentionBackwardParams params{};
    AttentionTensors tensors;
    Tensor grad, out, lse, grad_q, grad_k, grad_v;

    AttentionBackwardCall(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                          const std::optional<Tensor>& size, const Tensor& out, const Tensor& lse,
                          std::optional<double> scale);
    std::tuple<Tensor, Tensor, Tensor> outputs() const { return {grad_q, grad_k, grad_v}; }
};

struct ClsAttentionCall {
    ClsAttentionParams params{};
    Tensor q, k, out;
    std::optional<Tensor> size;

    ClsAttentionCall(const Tensor& q, const Tensor& k, const std::optional<Tensor>& size,
                     std::optional<double> scale);
};

}  // namespace tome::torch_layer
