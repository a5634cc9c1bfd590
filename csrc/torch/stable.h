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

namespace tome::torch_layer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x itself if it is contiguous: torch::stable::contiguous asks the dispatcher either way.
inline Tensor as_contiguous(const Tensor& x) {
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// An uninitialised contiguous tensor on the device of `like`. Straight through the C interface:
// torch::stable::new_empty boxes its arguments for the dispatcher, which costs small operators
// more than the allocation itself.
inline Tensor empty_like_with(const Tensor& like, std::initializer_list<int64_t> sizes,
                              ScalarType dtype) {
    int64_t strides[4];
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
        strides[d] = step;
        step *= std::max<int64_t>(1, sizes.begin()[d]);
    }
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

}  // namespace tome::torch_layer
