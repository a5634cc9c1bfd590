// The first of match's two kernels: rows of all images, staged once, for match_tile.cu to score.
#include "launch.h"
#include "match_kernels.h"
#include "match_rows.cuh"

namespace tome::match_cuda_detail {
namespace {

using match_tiles::kRowStep;
using match_tiles::kShortDim;
using match_tiles::kStageThreads;

// A block stages one group of 16 rows of one image.
//
//   image 0: groups of A | groups of B   image 1: ...
//
// It also clears what blocks of the second kernel meet in.
template <class In, bool kVector, bool kShort, bool kListed>
__global__ void __launch_bounds__(kStageThreads, 5)
    match_stage_kernel(const __grid_constant__ MatchArgs m) {
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned groups = static_cast<unsigned>(m.groups_a + m.groups_b);
    const int64_t image = blockIdx.x / groups;
    const int group = static_cast<int>(blockIdx.x % groups);
    const int quarter = thread / device::kWarp;
    const auto* metric = static_cast<const In*>(m.p.metric) + image * m.p.stride_batch;
    Record* out = m.rows + int64_t{blockIdx.x} * m.steps * (4 * kRowStep);
    if (group < m.groups_a) {
        const int64_t row = int64_t{group} * kRowStep;
        if (m.blocks_per_image > 1) {
            if (group == 0 && thread == 0) m.tickets[image] = 0;
            if (thread < kRowStep && row + thread < m.sets.num_a) {
                m.best[image * m.sets.num_a + row + thread] = 0;
            }
        }
        stage_rows<In, kVector, kShort, true>(m, metric, RowsOf<kListed>(m, image, true, row),
                                              m.sets.num_a - row, quarter, out);
    } else {
        const int64_t row = int64_t{group - m.groups_a} * kRowStep;
        stage_rows<In, kVector, kShort, false>(m, metric, RowsOf<kListed>(m, image, false, row),
                                               m.sets.num_b - row, quarter, out);
    }
}

template <class In, bool kListed>
auto kernel_for(const MatchArgs& m) {
    const bool is_short = m.p.dim <= kShortDim;
    return vectors_serve<In>(m.p) ? is_short ? match_stage_kernel<In, true, true, kListed>
                                             : match_stage_kernel<In, true, false, kListed>
           : is_short ? match_stage_kernel<In, false, true, kListed>
                                  : match_stage_kernel<In, false, false, kListed>;
}

template <class In>
cudaError_t launch_of(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    const auto kernel = m.listed() ? kernel_for<In, true>(m) : kernel_for<In, false>(m);
    return device::launch_overlapping(kernel, grid, dim3(kStageThreads), 0, stream, m);
}

}  // namespace

cudaError_t launch_match_stage(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    switch (m.p.dtype) {
        case DType::kFloat32:
            return launch_of<float>(m, grid, stream);
        case DType::kFloat16:
            return launch_of<Half>(m, grid, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(m, grid, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome::match_cuda_detail
