// The operators on CUDA: check, allocate, start tome_core's kernels on the current stream. Nothing
// here waits for the device, copies to it or reads what a plan holds, so all of it may be captured
// into a graph.

#define USE_CUDA  // for the stream's declaration in torch's C interface

#include "tome_core/cuda.h"

#include <optional>
#include <string>
#include <tuple>

#include "../calls.h"
#include "../stable.h"

namespace tome::torch_layer {
namespace {

// The device of a tensor made current, and torch's current stream of it.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
        void* stream = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    cudaStream_t stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op,
                    ": the CUDA launch failed: ", cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor, Tensor> match(Tensor metric, int64_t r, int64_t num_prefix_tokens) {
    const OnDevice on(metric);
    const MatchCall call(metric, r, num_prefix_tokens);
    // Torch's allocator hands it out again only to work behind this on the same stream.
    const auto bytes = static_cast<int64_t>(match_cuda_workspace_bytes(call.params));
    const Tensor workspace = empty_like_with(call.metric, {bytes}, ScalarType::Byte);
    check_launch(match_cuda(call.params, workspace.mutable_data_ptr(), on.stream()), "match");
    return call.outputs();
}

std::tuple<Tensor, Tensor> plan(Tensor assign, int64_t num_rows) {
    const OnDevice on(assign);
    const PlanCall call(assign, num_rows);
    check_launch(plan_cuda(call.params, on.stream()), "plan");
    return call.outputs();
}

std::tuple<Tensor, Tensor> merge(Tensor x, std::optional<Tensor> size, Tensor members,
                                 Tensor offsets, std::string reduce) {
    const OnDevice on(x);
    const MergeCall call(x, size, members, offsets, reduce);
    check_launch(merge_cuda(call.params, on.stream()), "merge");
    return call.outputs();
}

Tensor merge_backward(Tensor grad, std::optional<Tensor> size, Tensor members, Tensor offsets,
                      std::string reduce) {
    const OnDevice on(grad);
    const MergeBackwardCall call(grad, size, members, offsets, reduce);
    check_launch(merge_backward_cuda(call.params, on.stream()), "merge_backward");
    return call.out;
}

Tensor unmerge(Tensor x, Tensor assign) {
    const OnDevice on(x);
    const UnmergeCall call(x, assign);
    check_launch(unmerge_cuda(call.params, on.stream()), "unmerge");
    return call.out;
}

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CUDA, m) {
    m.impl("match", TORCH_BOX(&tome::torch_layer::match));
    m.impl("plan", TORCH_BOX(&tome::torch_layer::plan));
    m.impl("merge", TORCH_BOX(&tome::torch_layer::merge));
    m.impl("merge_backward", TORCH_BOX(&tome::torch_layer::merge_backward));
    m.impl("unmerge", TORCH_BOX(&tome::torch_layer::unmerge));
}
