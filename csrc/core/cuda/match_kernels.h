// The kernels that match.cu chooses from.
#pragma once

#include <cuda_runtime.h>

#include "match_args.h"

namespace tome::match_cuda_detail {

// Form::kSingle: one head of float32, float16 or bfloat16, any dim.
cudaError_t launch_match_single(const MatchArgs& m, dim3 grid, cudaStream_t stream);

// Form::kDirect: float32, float16 and bfloat16, with dim up to what shared memory holds.
cudaError_t launch_match_direct(const MatchArgs& m, dim3 grid, cudaStream_t stream);

// Form::kStaged: the same. The first kernel stages
// rows, a block per group of 16; the second, launched right behind it, scores them.
cudaError_t launch_match_stage(const MatchArgs& m, dim3 grid, cudaStream_t stream);
cudaError_t launch_match_score(const MatchArgs& m, dim3 grid, cudaStream_t stream);

// Form::kPlain: any dtype, any dim, without tensor cores.
cudaError_t launch_match_plain(const MatchArgs& m, dim3 grid, cudaStream_t stream);

}  // namespace tome::match_cuda_detail
