// Entry points of merge, merge_add_norm, merge_backward and unmerge: copy and check the plan, split
// the rows over threads.

#include "tome_core/merge.h"

#include "kernels.h"
#include "plan.h"
#include "tuning.h"

namespace tome {

Status merge(const MergeParams& given, const Threads& threads) {
    MergeParams p = given;
    const OwnPlan plan(p);
    if (!plan.status()) return plan.status();
    const Kernels& kernels = active_kernels();
    const int64_t grain = tuning::rows_per_task(p.channels * element_size(p.dtype));
    threads.parallel_for(p.batch * p.rows, grain,
                         [&](int64_t begin, int64_t end) { kernels.merge_rows(p, begin, end); });
    return {};
}

Status merge_add_norm(const MergeAddNormParams& given, const Threads& threads) {
    MergeAddNormParams p = given;
    const OwnPlan plan(p);
    if (!plan.status()) return plan.status();
    const Kernels& kernels = active_kernels();
    // Two rows are read and two written: twice the bytes of a merge.
    const int64_t grain = tuning::rows_per_task(2 * p.channels * element_size(p.dtype));
    threads.parallel_for(p.batch * p.rows, grain, [&](int64_t begin, int64_t end) {
        kernels.merge_add_norm_rows(p, begin, end);
    });
    return {};
}

Status merge_backward(const MergeBackwardParams& given, const Threads& threads) {
    MergeBackwardParams p = given;
    const OwnPlan plan(p);
    if (!plan.status()) return plan.status();
    const Kernels& kernels = active_kernels();
    const int64_t row_bytes = p.channels * element_size(p.dtype);
    threads.parallel_for(
        p.batch * p.rows, tuning::rows_per_task(row_bytes),
        [&](int64_t begin, int64_t end) { kernels.merge_backward_rows(p, begin, end); });
    for (int64_t b = 0; b < p.batch; ++b) {  // dropped tokens, at the end of members
        for (int64_t n = p.offsets[b * (p.rows + 1) + p.rows]; n < p.tokens; ++n) {
            const int64_t token = b * p.tokens + p.members[b * p.tokens + n];
            clear_row(static_cast<char*>(p.out) + token * row_bytes, row_bytes);
        }
    }
    return {};
}

Status unmerge(const UnmergeParams& p, const Threads& threads) {
    const OwnIndices assign(p.assign, p.batch * p.tokens);
    const Status status = check_assign(assign.get(), p.batch, p.tokens, p.rows);
    if (!status) return status;
    const int64_t element = element_size(p.dtype);
    const int64_t row_bytes = p.channels * element;
    const auto* x = static_cast<const char*>(p.x);
    auto* out = static_cast<char*>(p.out);
    threads.parallel_for(
        p.batch * p.tokens, tuning::rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
            for (int64_t flat = begin; flat < end; ++flat) {
                const int64_t row = assign[flat];
                const int64_t b = flat / p.tokens;
                char* to = out + flat * row_bytes;
                if (row < 0) {
                    clear_row(to, row_bytes);
                } else {
                    copy_row(to, x + (b * p.stride_batch + row * p.stride_row) * element,
                             row_bytes);
                }
            }
        });
    return {};
}

}  // namespace tome
