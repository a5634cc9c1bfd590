// The kernels that match.cu chooses from; each writes the whole plan in one launch.
#pragma once

#include <cuda_runtime.h>

#include "match_args.h"

namespace tome::match_cuda_detail {

// float32, float16 and bfloat16, with dim up to what shared memory holds.
cudaError_t launch_match_tile(const MatchArgs& m, dim3 grid, cudaStream_t stream);

// Any dtype, any dim, without tensor cores.
cudaError_t launch_match_plain(const MatchArgs& m, dim3 grid, cudaStream_t stream);

}  // namespace tome::match_cuda_detail
