// plan_cuda: one block per image. See plan.cuh.

#include "launch.h"
#include "plan.cuh"
#include "tome_core/cuda.h"

namespace tome {
namespace {

using namespace tome::device;

// Shared memory: scratch (kWarp + 1), then, for up to kPlanSharedRows rows, the cursors.
__global__ void __launch_bounds__(tiles::kPlanThreads)
    plan_kernel(const __grid_constant__ PlanParams p) {
    int* scratch = reinterpret_cast<int*>(dynamic_shared());
    for (int64_t b = blockIdx.x; b < p.batch; b += tiles::kMaxImages) {
        int32_t* offsets = p.offsets + b * (p.rows + 1);
        int32_t* cursor = p.rows <= tiles::kPlanSharedRows ? scratch + kWarp + 1 : offsets + 1;
        plan_image(p.assign + b * p.tokens, p.tokens, p.rows, p.members + b * p.tokens, offsets,
                   cursor, scratch);
        __syncthreads();  // the next image's cursors take the place of these
    }
}

}  // namespace

cudaError_t plan_cuda(const PlanParams& params, cudaStream_t stream) {
    const int64_t cursors = params.rows <= tiles::kPlanSharedRows ? params.rows : 0;
    const auto shared = static_cast<size_t>(kWarp + 1 + cursors) * sizeof(int);
    // As many as the kernel's step, or one for each image if they are fewer.
    const int64_t blocks = params.batch < tiles::kMaxImages ? params.batch : tiles::kMaxImages;
    return launch(plan_kernel, dim3(static_cast<unsigned>(blocks)), dim3(tiles::kPlanThreads),
                  shared, stream, params);
}

}  // namespace tome
