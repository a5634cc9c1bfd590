// match_cuda: chooses a kernel and its tiles, and divides the workspace.
//
//   keys -> scores, maxima (match_tile.cu or match_plain.cu) -> ranks, plan (match_finish.cuh)
//
// all in one launch; where several blocks work on an image, behind a clear of the workspace.
//
// Each block lets the next kernel, mostly merge, begin right away. That happens when the last block
// of match has a place, so merge takes none from it; merge's blocks then wait without computing.
#include <limits>

#include "launch.h"
#include "match_kernels.h"
#include "tome_core/cuda.h"

namespace tome {
namespace {

using match_cuda_detail::MatchArgs;
using match_cuda_detail::Packed;

// Nothing to merge: every token is its own row. A thread owns a token of (batch, tokens).
__global__ void __launch_bounds__(match_tiles::kThreads)
    identity_plan_kernel(const __grid_constant__ MatchParams p) {
    const int64_t threads = int64_t{gridDim.x} * blockDim.x;
    const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const int64_t count = p.batch * (p.tokens + 1);
    for (int64_t i = first; i < count; i += threads) {
        const int64_t image = i / (p.tokens + 1);
        const auto n = static_cast<int32_t>(i % (p.tokens + 1));
        p.offsets[i] = n;
        if (n == p.tokens) continue;
        p.assign[image * p.tokens + n] = n;
        p.members[image * p.tokens + n] = n;
    }
}

cudaError_t identity_plan(const MatchParams& p, cudaStream_t stream) {
    const int64_t blocks = match_tiles::ceil_div(p.batch * (p.tokens + 1), match_tiles::kThreads);
    const auto grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
    return device::launch(identity_plan_kernel, dim3(grid), dim3(match_tiles::kThreads), 0, stream,
                          p);
}

}  // namespace

size_t match_cuda_workspace_bytes(const MatchParams& p) {
    if (cut_r(p.tokens, p.r, p.num_prefix_tokens) == 0) return 0;
    const Sets sets = split_sets(p.tokens, p.num_prefix_tokens);
    return static_cast<size_t>(
        match_tiles::workspace(p.batch, sets.num_a, p.dtype == DType::kFloat64).total);
}

cudaError_t match_cuda(const MatchParams& p, void* workspace, cudaStream_t stream) {
    if (p.batch == 0) return cudaSuccess;
    MatchArgs m{};
    m.p = p;
    m.r = cut_r(p.tokens, p.r, p.num_prefix_tokens);
    if (m.r == 0) return identity_plan(p, stream);
    m.sets = split_sets(p.tokens, p.num_prefix_tokens);
    device::Chip chip;
    cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    const match_tiles::Device device{chip.multiprocessors, chip.shared_per_block};
    const bool is_double = p.dtype == DType::kFloat64;
    m.tiles = match_tiles::choose(p.batch, m.sets.num_a, m.sets.num_b, p.dim, is_double, device);
    m.layout = match_tiles::layout(p.dim, m.tiles.rows_a, m.tiles.rows_b);
    m.blocks_per_image = static_cast<int>(m.tiles.blocks_per_image());
    m.tiles_b = static_cast<int>(match_tiles::ceil_div(m.sets.num_b, m.tiles.rows_b));
    m.records = static_cast<int>(match_tiles::ceil_div(p.dim, 16) * 4);
    m.stride = static_cast<int>(match_tiles::row_records(p.dim));
    const match_tiles::Workspace parts = match_tiles::workspace(p.batch, m.sets.num_a, is_double);
    auto* bytes = static_cast<unsigned char*>(workspace);
    m.best = reinterpret_cast<Packed*>(bytes);
    m.tickets = reinterpret_cast<uint32_t*>(bytes + parts.tickets);
    m.columns = is_double ? reinterpret_cast<int32_t*>(bytes + parts.columns) : nullptr;
    const int64_t blocks = p.batch * m.tiles.blocks_per_image();
    if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    if (m.tiles.blocks_per_image() > 1) {
        error = cudaMemsetAsync(workspace, 0, static_cast<size_t>(parts.columns), stream);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    return m.tiles.use_tensor_cores ? match_cuda_detail::launch_match_tile(m, grid, stream)
                                    : match_cuda_detail::launch_match_plain(m, grid, stream);
}

}  // namespace tome
