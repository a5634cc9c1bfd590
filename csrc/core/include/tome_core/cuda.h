// The kernels on CUDA: the same params structs as on the CPU, with device pointers.
//
// Each function starts its work on `stream` of the current device and returns at once: it neither
// synchronises nor allocates, so it may be captured into a graph. What a plan holds is not checked,
// which would need the host to wait: an index outside the tensors is skipped, never followed.
// Returned is the first error of a launch, cudaSuccess if there was none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "tome_core/attention.h"
#include "tome_core/match.h"
#include "tome_core/merge.h"
#include "tome_core/select.h"

namespace tome {

// Targets of match that are out of range or order are not followed out of the tokens either; which
// plan they give is not said.

// Device memory that match_cuda needs besides its outputs; 0 if none. Its content doesn't matter.
size_t match_cuda_workspace_bytes(const MatchParams& params);

// `workspace`: match_cuda_workspace_bytes(params) bytes, aligned to 256.
cudaError_t match_cuda(const MatchParams& params, void* workspace, cudaStream_t stream);

// Entries of `assign` outside [0, rows) count as dropped tokens.
cudaError_t plan_cuda(const PlanParams& params, cudaStream_t stream);

cudaError_t select_cuda(const SelectParams& params, cudaStream_t stream);

// Rows are sums in one chain, of float32 unless dtype is float64: such sums stop counting at 2^24
// members, where those of the CPU go on.
cudaError_t merge_cuda(const MergeParams& params, cudaStream_t stream);
cudaError_t merge_add_norm_cuda(const MergeAddNormParams& params, cudaStream_t stream);
cudaError_t merge_backward_cuda(const MergeBackwardParams& params, cudaStream_t stream);
cudaError_t unmerge_cuda(const UnmergeParams& params, cudaStream_t stream);

// The attention kernels take float32, float16 and bfloat16, and heads of at most this many
// channels.
constexpr int64_t kMaxCudaHeadDim = 128;

cudaError_t attention_cuda(const AttentionParams& params, cudaStream_t stream);

// Which kernels this build has of attention for the current device: "hopper", those of compute
// capability 9.0 alone, for 16-bit heads of 64 channels whose addresses fit; or "mma", for all.
const char* attention_cuda_form();

// Device memory that attention_backward_cuda needs besides its outputs, O(batch * heads * queries).
size_t attention_backward_cuda_workspace_bytes(const AttentionBackwardParams& params);

// `workspace`: that many bytes, aligned to 256. Deterministic: no sums in an order left to chance.
cudaError_t attention_backward_cuda(const AttentionBackwardParams& params, void* workspace,
                                    cudaStream_t stream);

// Device memory that cls_attention_cuda needs besides its output, O(batch * heads * keys).
size_t cls_attention_cuda_workspace_bytes(const ClsAttentionParams& params);

// `workspace`: that many bytes, aligned to 256.
cudaError_t cls_attention_cuda(const ClsAttentionParams& params, void* workspace,
                               cudaStream_t stream);

}  // namespace tome
