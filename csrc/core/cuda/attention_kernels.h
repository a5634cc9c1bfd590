// The kernels that attention.cu chooses from, and their arguments.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "tome_core/attention.h"

namespace tome::attention_cuda_detail {

struct AttentionArgs {
    AttentionParams p;
    float scale_log2;      // scale * log2(e): logits are in units of log2 throughout
    unsigned query_tiles;  // blocks per head
    bool vector_q, vector_k, vector_v, vector_out;  // attention_tiles::vectors_fit
};

// float32, without tensor cores; dim up to kMaxCudaHeadDim.
cudaError_t launch_attention_plain(const AttentionArgs& m, cudaStream_t stream);

// float16 and bfloat16 on Hopper's warpgroups. Takes what hopper_takes says it does.
bool has_hopper_kernels(const device::Chip& chip);
bool hopper_takes(const AttentionArgs& m, const device::Chip& chip);
cudaError_t launch_attention_hopper(const AttentionArgs& m, const device::Chip& chip,
                                    cudaStream_t stream);

}  // namespace tome::attention_cuda_detail
