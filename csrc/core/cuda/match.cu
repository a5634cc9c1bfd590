// match_cuda: chooses kernels and their tiles, and divides the workspace.
//
//   direct   keys -> staged rows -> scores, maxima -> ranks, plan    match_tile.cu, one kernel
//   staged   keys -> staged rows                                     match_stage.cu, and then
//                                -> scores, maxima -> ranks, plan    match_tile.cu, overlapping it
//   single   keys ->                scores, maxima -> ranks, plan    match_single.cu, one kernel
//   plain    keys ->                scores, maxima -> ranks, plan    match_plain.cu, one kernel
//
// One kernel whose blocks meet is behind a clear of the workspace; of two, the first clears.
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

namespace {

Sets sets_of(const MatchParams& p) {
    if (p.targets == nullptr) return split_sets(p.tokens, p.num_prefix_tokens);
    return {0, 0, p.tokens - p.num_prefix_tokens - p.num_targets, p.num_targets};
}

cudaError_t choose_tiles(const MatchParams& p, const Sets& sets, match_tiles::Tiles& out) {
    device::Chip chip;
    const cudaError_t error = device::current_chip(chip);
    if (error != cudaSuccess) return error;
    const match_tiles::Device device{chip.multiprocessors, chip.shared_per_block};
    const int64_t element_bytes = p.dtype == DType::kFloat64   ? 8
                                  : p.dtype == DType::kFloat32 ? 4
                                                               : 2;
    out = match_tiles::choose(p.batch, p.heads, sets.num_a, sets.num_b, p.dim, element_bytes,
                              device, match_cuda_detail::needs_listed_rows(p));
    return cudaSuccess;
}

match_tiles::Workspace workspace_of(const MatchParams& p, const Sets& sets,
                                    match_tiles::Form form) {
    return match_tiles::workspace(form, p.batch, sets.num_a, sets.num_b, p.dim,
                                  p.dtype == DType::kFloat64);
}

}  // namespace

size_t match_cuda_workspace_bytes(const MatchParams& p) {
    if (!may_merge(p)) return 0;
    const Sets sets = sets_of(p);
    match_tiles::Tiles tiles{};
    // The form that needs most, should there be no device: then match_cuda says so.
    if (choose_tiles(p, sets, tiles) != cudaSuccess) tiles.form = match_tiles::Form::kStaged;
    return static_cast<size_t>(workspace_of(p, sets, tiles.form).total);
}

cudaError_t match_cuda(const MatchParams& p, void* workspace, cudaStream_t stream) {
    using match_tiles::Form;
    if (p.batch == 0) return cudaSuccess;
    MatchArgs m{};
    m.p = p;
    m.r = cut_r(p);
    if (!may_merge(p)) return identity_plan(p, stream);
    m.sets = sets_of(p);
    cudaError_t error = choose_tiles(p, m.sets, m.tiles);
    if (error != cudaSuccess) return error;
    m.layout = match_tiles::layout(p.dim, m.tiles.rows_a, m.tiles.rows_b, m.tiles.buffers);
    m.blocks_per_image = static_cast<int>(m.tiles.blocks_per_image());
    m.tiles_b = static_cast<int>(match_tiles::ceil_div(m.sets.num_b, m.tiles.rows_b));
    m.steps = static_cast<int>(match_tiles::steps_of(p.dim));
    const bool stages = m.tiles.form == Form::kDirect || m.tiles.form == Form::kStaged;
    m.unit = stages ? match_cuda_detail::kUnit : 1.0f;
    m.groups_a = static_cast<int>(match_tiles::groups_of(m.sets.num_a));
    m.groups_b = static_cast<int>(match_tiles::groups_of(m.sets.num_b));
    const match_tiles::Workspace parts = workspace_of(p, m.sets, m.tiles.form);
    auto* bytes = static_cast<unsigned char*>(workspace);
    m.rows = reinterpret_cast<uint4*>(bytes);
    m.best = reinterpret_cast<Packed*>(bytes + parts.best);
    m.tickets = reinterpret_cast<uint32_t*>(bytes + parts.tickets);
    m.columns =
        p.dtype == DType::kFloat64 ? reinterpret_cast<int32_t*>(bytes + parts.columns) : nullptr;
    const int64_t blocks = p.batch * m.tiles.blocks_per_image();
    const int64_t groups = p.batch * (int64_t{m.groups_a} + m.groups_b);
    if (blocks > std::numeric_limits<int32_t>::max() ||
        groups > std::numeric_limits<int32_t>::max()) {
        return cudaErrorInvalidConfiguration;
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    if (m.tiles.form == Form::kStaged) {
        error =
            match_cuda_detail::launch_match_stage(m, dim3(static_cast<unsigned>(groups)), stream);
        if (error != cudaSuccess) return error;
        return match_cuda_detail::launch_match_score(m, grid, stream);
    }
    if (m.tiles.blocks_per_image() > 1) {
        error = cudaMemsetAsync(bytes + parts.best, 0,
                                static_cast<size_t>(parts.columns - parts.best), stream);
        if (error != cudaSuccess) return error;
    }
    switch (m.tiles.form) {
        case Form::kSingle:
            return match_cuda_detail::launch_match_single(m, grid, stream);
        case Form::kDirect:
            return match_cuda_detail::launch_match_direct(m, grid, stream);
        default:
            return match_cuda_detail::launch_match_plain(m, grid, stream);
    }
}

}  // namespace tome
