// Argument checks shared by the CPU and CUDA operators: every message says what was expected and
// what came. Raised as RuntimeError in Python.
#pragma once

#include <optional>
#include <string>

#include "stable.h"
#include "tome_core/merge.h"
#include "tome_core/types.h"

namespace tome::torch_layer {

// "(2, 197, 64) float32", as tome_ext.ops.describe shows it.
std::string describe(const Tensor& x);

// The kernels' dtype, or an error that names the argument.
DType float_dtype(const Tensor& x, const char* name);

// What sums of x are taken in: float32, float64 for float64.
ScalarType accumulate_dtype(const Tensor& x);

Reduce parse_reduce(const std::string& reduce);

// x itself where its last dimension is contiguous, else a contiguous copy.
Tensor with_contiguous_last_dim(const Tensor& x);

void check_match(const Tensor& metric, int64_t num_prefix_tokens);
void check_select(const Tensor& scores, int64_t keep, int64_t num_prefix_tokens);
void check_plan_args(const Tensor& assign, int64_t num_rows);
void check_merge(const Tensor& x, const char* name, int64_t tokens,
                 const std::optional<Tensor>& size, const Tensor& members, const Tensor& offsets);
// What merge_add_norm takes beside the arguments of merge.
void check_add_norm(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                    double eps);
void check_unmerge(const Tensor& x, const Tensor& assign);
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& size);
// `of` names the tensor whose shape and dtype x must have.
void check_same_as(const Tensor& x, const char* name, const Tensor& of, const char* of_name);
void check_lse(const Tensor& lse, const Tensor& q);
void check_cls_attention(const Tensor& q, const Tensor& k, const std::optional<Tensor>& size);

}  // namespace tome::torch_layer
