// What the checks of arguments are made of: every message says what was expected and what came.
// tome_ext/reference.py has the same checks.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "stable.h"
#include "tome_core/merge.h"
#include "tome_core/types.h"

// The message is put together only when it is needed. Up to torch 2.14 Python makes ValueError of
// std::invalid_argument and RuntimeError of std::runtime_error; from 2.15 on the latter of both,
// and tome_ext/ops.py tells an error of an argument, by whose name it begins, from one of a plan.
// STD_TORCH_CHECK would add a file and line of ours.
#define TOME_EXPECT(condition, ...) \
    if (!(condition)) throw std::invalid_argument(::tome::torch_layer::text_of(__VA_ARGS__))
#define TOME_REFUSE(...) throw std::runtime_error(::tome::torch_layer::text_of(__VA_ARGS__))

namespace tome::torch_layer {

template <class... Parts>
std::string text_of(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

const char* dtype_name(ScalarType dtype);

// "(2, 197, 64) float32"
std::string describe(const Tensor& x);

// The kernels' dtype, or an error that names the argument.
DType float_dtype(const Tensor& x, const char* name);

// What sums of x are taken in: float32, float64 for float64.
ScalarType accumulate_dtype(const Tensor& x);

Reduce parse_reduce(const std::string& reduce);

// x itself where its last dimension is contiguous, else a contiguous copy.
Tensor with_contiguous_last_dim(const Tensor& x);

bool same_shape(const Tensor& x, const Tensor& y);
void check_same_device(const Tensor& x, const char* x_name, const Tensor& y, const char* y_name);

// (batch, columns) of the given dtype; columns < 0 accepts any number.
void check_table(const Tensor& x, const char* name, int64_t batch, int64_t columns,
                 const char* columns_name, ScalarType dtype);

// `of` names the tensor whose shape and dtype x must have.
void check_same_as(const Tensor& x, const char* name, const Tensor& of, const char* of_name);

}  // namespace tome::torch_layer
