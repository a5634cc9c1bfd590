// LibTorch's stable ABI, the only door to torch: nothing here or behind it is at:: or c10::, so one
// build serves every torch from 2.10 on. Aliases and helpers shared by all operator files.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

// As torch 2.10 calls it.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace tome::torch_layer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x itself if it is contiguous: torch::stable::contiguous asks the dispatcher either way.
inline Tensor as_contiguous(const Tensor& x) {
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// An uninitialised tensor on the device of `like`. Straight through the C interface:
// torch::stable::new_empty boxes its arguments for the dispatcher, which costs small operators
// more than the allocation itself.
inline Tensor empty_strided_like(const Tensor& like, std::initializer_list<int64_t> sizes,
                                 const int64_t* strides, ScalarType dtype) {
    int32_t device_type = 0;
    int32_t device_index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
    const int32_t shim_dtype =
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                           sizes.begin(), strides, shim_dtype,
                                                           device_type, device_index, &handle));
    return Tensor(handle);
}

// A contiguous one.
inline Tensor empty_like_with(const Tensor& like, std::initializer_list<int64_t> sizes,
                              ScalarType dtype) {
    int64_t strides[4];
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
        strides[d] = step;
        step *= std::max<int64_t>(1, sizes.begin()[d]);
    }
    return empty_strided_like(like, sizes, strides, dtype);
}

// (batch, heads, tokens, dim) that lies in memory as (batch, tokens, heads, dim): what a projection
// over all heads reads without a copy.
inline Tensor empty_heads_like(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                               int64_t dim) {
    const auto at_least_1 = [](int64_t x) { return std::max<int64_t>(1, x); };
    const int64_t token = at_least_1(heads) * at_least_1(dim);
    const int64_t strides[4] = {at_least_1(tokens) * token, at_least_1(dim), token, 1};
    return empty_strided_like(like, {batch, heads, tokens, dim}, strides, like.scalar_type());
}

}  // namespace tome::torch_layer
