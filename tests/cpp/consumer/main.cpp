// Merges four tokens, two alike, with an installed tome_core.
#include <cstdio>
#include <vector>

#include "tome_core/thread_pool.h"
#include "tome_core/tome_core.h"

int main() {
    const std::vector<float> x = {1, 0, 1, 0, 0, 1, -1, 0};  // (tokens 4, channels 2)
    std::vector<int32_t> assign(4), members(4), offsets(4);
    tome::ThreadPool pool(2);

    tome::MatchParams match{};
    match.metric = x.data();
    match.dtype = tome::DType::kFloat32;
    match.batch = match.heads = 1;
    match.tokens = 4;
    match.dim = match.stride_token = 2;
    match.r = 1;
    match.assign = assign.data();
    match.members = members.data();
    match.offsets = offsets.data();
    tome::match(match, pool.threads());

    std::vector<float> out(3 * 2), size(3);
    tome::MergeParams merge{};
    merge.x = x.data();
    merge.dtype = tome::DType::kFloat32;
    merge.batch = 1;
    merge.tokens = 4;
    merge.rows = 3;
    merge.channels = merge.stride_token = 2;
    merge.members = members.data();
    merge.offsets = offsets.data();
    merge.reduce = tome::Reduce::kMean;
    merge.out = out.data();
    merge.out_size = size.data();
    const bool ok = static_cast<bool>(tome::merge(merge, pool.threads()));

    std::printf("%s: token 0 joined row %d, of size %g\n", tome::isa_name(tome::active_isa()),
                assign[0], static_cast<double>(size[1]));
    return ok && assign[0] == 1 && size[1] == 2.0f ? 0 : 1;
}
