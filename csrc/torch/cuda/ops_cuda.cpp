// The operators on CUDA: check, allocate, start tome_core's kernels on the current stream. Nothing
// here waits for the device, copies to it or reads what a plan holds, so all of it may be captured
// into a graph.
//
// A GPU that cannot run the kernels is served by the plain operators of the Python package instead,
// each GPU for itself. It is only known once CUDA is in use, which is too late for a choice of what
// to register, and loading the package must not start CUDA: processes may fork after it.

#define USE_CUDA  // for the stream's declaration in torch's C interface

#include "tome_core/cuda.h"

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "../calls.h"
#include "../checks.h"
#include "../stable.h"
#include "obstacle.h"

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
        cudaError_t why = cudaSuccess;
        runs_kernels_ = !find_obstacle(x.get_device_index(), why);
    }

    cudaStream_t stream() const { return stream_; }
    bool runs_kernels() const { return runs_kernels_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
    bool runs_kernels_ = true;
};

// The operator of this name in plain PyTorch. Of its errors torch keeps the text from 2.13 on;
// before, it prints them.
template <size_t kOutputs, class... Args>
std::array<Tensor, kOutputs> plain(const char* name, const Args&... args) {
    static_assert(kOutputs <= sizeof...(args));
    std::array<StableIValue, sizeof...(args)> stack{torch::stable::detail::from(args)...};
    const std::string full_name = std::string("tome::_plain_") + name;
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(full_name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
    std::array<Tensor, kOutputs> outputs;
    for (size_t i = 0; i < kOutputs; ++i) {
        outputs[i] = torch::stable::detail::to<Tensor>(stack[i]);
    }
    return outputs;
}

template <class... Args>
std::tuple<Tensor, Tensor> plain_2(const char* name, const Args&... args) {
    auto [a, b] = plain<2>(name, args...);
    return {a, b};
}

template <class... Args>
std::tuple<Tensor, Tensor, Tensor> plain_3(const char* name, const Args&... args) {
    auto [a, b, c] = plain<3>(name, args...);
    return {a, b, c};
}

void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op,
                    ": the CUDA launch failed: ", cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor, Tensor> match(Tensor metric, int64_t r, int64_t num_prefix_tokens) {
    const OnDevice on(metric);
    const MatchCall call(metric, r, num_prefix_tokens);
    if (!on.runs_kernels()) return plain_3("match", metric, r, num_prefix_tokens);
    // Torch's allocator hands it out again only to work behind this on the same stream.
    const auto bytes = static_cast<int64_t>(match_cuda_workspace_bytes(call.params));
    const Tensor workspace = empty_like_with(call.metric, {bytes}, ScalarType::Byte);
    check_launch(match_cuda(call.params, workspace.mutable_data_ptr(), on.stream()), "match");
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> select(Tensor scores, int64_t keep, int64_t num_prefix_tokens,
                                          bool fuse) {
    const OnDevice on(scores);
    const SelectCall call(scores, keep, num_prefix_tokens, fuse);
    if (!on.runs_kernels()) return plain_3("select", scores, keep, num_prefix_tokens, fuse);
    check_launch(select_cuda(call.params, on.stream()), "select");
    return call.outputs();
}

std::tuple<Tensor, Tensor> plan(Tensor assign, int64_t num_rows) {
    const OnDevice on(assign);
    const PlanCall call(assign, num_rows);
    if (!on.runs_kernels()) return plain_2("plan", assign, num_rows);
    check_launch(plan_cuda(call.params, on.stream()), "plan");
    return call.outputs();
}

std::tuple<Tensor, Tensor> merge(Tensor x, std::optional<Tensor> size, Tensor members,
                                 Tensor offsets, std::string reduce) {
    const OnDevice on(x);
    const MergeCall call(x, size, members, offsets, reduce);
    if (!on.runs_kernels()) return plain_2("merge", x, size, members, offsets, reduce);
    check_launch(merge_cuda(call.params, on.stream()), "merge");
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> merge_add_norm(Tensor x, Tensor branch,
                                                  std::optional<Tensor> size, Tensor members,
                                                  Tensor offsets, std::optional<Tensor> scale,
                                                  std::optional<Tensor> weight,
                                                  std::optional<Tensor> bias, double eps) {
    const OnDevice on(x);
    const MergeAddNormCall call(x, branch, size, members, offsets, scale, weight, bias, eps);
    if (!on.runs_kernels()) {
        return plain_3("merge_add_norm", x, branch, size, members, offsets, scale, weight, bias,
                       eps);
    }
    check_launch(merge_add_norm_cuda(call.params, on.stream()), "merge_add_norm");
    return call.outputs();
}

Tensor merge_backward(Tensor grad, std::optional<Tensor> size, Tensor members, Tensor offsets,
                      std::string reduce) {
    const OnDevice on(grad);
    const MergeBackwardCall call(grad, size, members, offsets, reduce);
    if (!on.runs_kernels()) {
        return plain<1>("merge_backward", grad, size, members, offsets, reduce)[0];
    }
    check_launch(merge_backward_cuda(call.params, on.stream()), "merge_backward");
    return call.out;
}

Tensor unmerge(Tensor x, Tensor assign) {
    const OnDevice on(x);
    const UnmergeCall call(x, assign);
    if (!on.runs_kernels()) return plain<1>("unmerge", x, assign)[0];
    check_launch(unmerge_cuda(call.params, on.stream()), "unmerge");
    return call.out;
}

// What the CPU takes and these kernels do not.
void check_cuda_heads(DType dtype, const Tensor& q) {
    STD_TORCH_CHECK(dtype != DType::kFloat64,
                    "q: expected float32, float16 or bfloat16 on CUDA, got ", describe(q));
    STD_TORCH_CHECK(q.size(3) <= kMaxCudaHeadDim, "q: expected at most ", kMaxCudaHeadDim,
                    " channels per head on CUDA, got ", describe(q));
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> size,
                                             std::optional<double> scale) {
    const OnDevice on(q);
    const AttentionCall call(q, k, v, size, scale);
    if (!on.runs_kernels()) return plain_2("attention_forward", q, k, v, size, scale);
    check_cuda_heads(call.params.dtype, q);
    check_launch(attention_cuda(call.params, on.stream()), "attention_forward");
    return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      std::optional<Tensor> size, Tensor out,
                                                      Tensor lse, std::optional<double> scale) {
    const OnDevice on(q);
    const AttentionBackwardCall call(grad, q, k, v, size, out, lse, scale);
    if (!on.runs_kernels()) {
        return plain_3("attention_backward", grad, q, k, v, size, out, lse, scale);
    }
    check_cuda_heads(call.params.dtype, q);
    const auto bytes = static_cast<int64_t>(attention_backward_cuda_workspace_bytes(call.params));
    const Tensor workspace = empty_like_with(q, {bytes}, ScalarType::Byte);
    check_launch(attention_backward_cuda(call.params, workspace.mutable_data_ptr(), on.stream()),
                 "attention_backward");
    return call.outputs();
}

Tensor cls_attention(Tensor q, Tensor k, std::optional<Tensor> size, std::optional<double> scale) {
    const OnDevice on(q);
    const ClsAttentionCall call(q, k, size, scale);
    if (!on.runs_kernels()) return plain<1>("cls_attention", q, k, size, scale)[0];
    STD_TORCH_CHECK(call.params.dtype != DType::kFloat64,
                    "q: expected float32, float16 or bfloat16 on CUDA, got ", describe(q));
    check_launch(cls_attention_cuda(call.params, on.stream()), "cls_attention");
    return call.out;
}

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CUDA, m) {
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
