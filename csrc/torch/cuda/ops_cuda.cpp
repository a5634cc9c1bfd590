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
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

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
template <class Outputs, class... Args>
Outputs plain(const char* name, const Args&... args) {
    std::array<StableIValue, sizeof...(args)> stack{torch::stable::detail::from(args)...};
    const std::string full_name = std::string("tome::_plain_") + name;
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(full_name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
    if constexpr (std::is_same_v<Outputs, Tensor>) {
        return torch::stable::detail::to<Tensor>(stack[0]);
    } else {
        return [&]<size_t... i>(std::index_sequence<i...>) {
            static_assert(sizeof...(i) <= sizeof...(args));
            return Outputs{torch::stable::detail::to<Tensor>(stack[i])...};
        }(std::make_index_sequence<std::tuple_size_v<Outputs>>{});
    }
}

// What the CPU takes and these kernels do not.
void check_cuda_dtype(DType dtype, const Tensor& q) {
    TOME_EXPECT(dtype != DType::kFloat64, "q: expected float32, float16 or bfloat16 on CUDA, got ",
                describe(q));
}
void check_cuda_heads(DType dtype, const Tensor& q) {
    check_cuda_dtype(dtype, q);
    TOME_EXPECT(q.size(3) <= kMaxCudaHeadDim, "q: expected at most ", kMaxCudaHeadDim,
                " channels per head on CUDA, got ", describe(q));
}

// A float32 sum of ones ends at 2^24, and how many members a row has only the device knows.
template <class P>
void check_cuda_tokens(const P& params) {
    constexpr int64_t kMost = int64_t{1} << 24;
    TOME_EXPECT(params.dtype == DType::kFloat64 || params.tokens <= kMost,
                "x: expected at most 2^24 = ", kMost,
                " tokens per image on CUDA, past which float32 sums stop counting, got ",
                params.tokens, " (float64 takes more)");
}

// Torch's allocator hands it out again only to work behind this on the same stream.
Tensor workspace(const Tensor& like, size_t bytes) {
    return empty_like_with(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

cudaError_t start(const MatchCall& call, cudaStream_t stream) {
    const Tensor space = workspace(call.metric, match_cuda_workspace_bytes(call.params));
    return match_cuda(call.params, space.mutable_data_ptr(), stream);
}
cudaError_t start(const SelectCall& call, cudaStream_t s) { return select_cuda(call.params, s); }
cudaError_t start(const PlanCall& call, cudaStream_t s) { return plan_cuda(call.params, s); }
cudaError_t start(const MergeCall& call, cudaStream_t s) {
    check_cuda_tokens(call.params);
    return merge_cuda(call.params, s);
}
cudaError_t start(const MergeAddNormCall& call, cudaStream_t s) {
    check_cuda_tokens(call.params);
    return merge_add_norm_cuda(call.params, s);
}
cudaError_t start(const MergeBackwardCall& call, cudaStream_t s) {
    check_cuda_tokens(call.params);
    return merge_backward_cuda(call.params, s);
}
cudaError_t start(const UnmergeCall& call, cudaStream_t s) { return unmerge_cuda(call.params, s); }
cudaError_t start(const AttentionCall& call, cudaStream_t stream) {
    check_cuda_heads(call.params.dtype, call.tensors.q);
    return attention_cuda(call.params, stream);
}
cudaError_t start(const AttentionBackwardCall& call, cudaStream_t stream) {
    check_cuda_heads(call.params.dtype, call.tensors.q);
    const Tensor space =
        workspace(call.tensors.q, attention_backward_cuda_workspace_bytes(call.params));
    return attention_backward_cuda(call.params, space.mutable_data_ptr(), stream);
}
cudaError_t start(const ClsAttentionCall& call, cudaStream_t stream) {
    check_cuda_dtype(call.params.dtype, call.q);
    const Tensor space = workspace(call.q, cls_attention_cuda_workspace_bytes(call.params));
    return cls_attention_cuda(call.params, space.mutable_data_ptr(), stream);
}

struct Cuda {
    template <class Call, class... Rest>
    static auto run(const Call& call, const Tensor& first, const Rest&... rest) {
        const OnDevice on(first);
        using Outputs = decltype(call.outputs());
        if (!on.runs_kernels()) return plain<Outputs>(Call::kName, first, rest...);
        const cudaError_t error = start(call, on.stream());
        STD_TORCH_CHECK(error == cudaSuccess, Call::kName,
                        ": the CUDA launch failed: ", cudaGetErrorString(error));
        return call.outputs();
    }
};

}  // namespace
}  // namespace tome::torch_layer

STABLE_TORCH_LIBRARY_IMPL(tome, CUDA, m) {
    using namespace tome::torch_layer;
    register_calls<Cuda>(m, AllCalls{});
}
