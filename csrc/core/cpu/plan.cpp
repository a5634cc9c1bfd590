// The merge plan: checks, and the counting sort that groups tokens by output row.

#include "plan.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "tuning.h"

namespace tome {
namespace {

Status first_out_of_range(const int32_t* values, int64_t count, int32_t low, int64_t high,
                          Status::Code code, int64_t batch) {
    // Unsigned distance from `low` covers both ends in one comparison, and vectorises.
    const auto span = static_cast<uint32_t>(high - low);
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) {
        bad |= static_cast<uint32_t>(values[i]) - static_cast<uint32_t>(low) >= span;
    }
    for (int64_t i = 0; bad && i < count; ++i) {
        if (values[i] < low || values[i] >= high) return {code, batch, i, values[i]};
    }
    return {};
}

}  // namespace

Status check_assign(const int32_t* assign, int64_t batch, int64_t tokens, int64_t rows) {
    for (int64_t b = 0; b < batch; ++b) {
        const Status status =
            first_out_of_range(assign + b * tokens, tokens, -1, rows, Status::kAssignOutOfRange, b);
        if (!status) return status;
    }
    return {};
}

Status check_plan(const int32_t* members, const int32_t* offsets, int64_t batch, int64_t tokens,
                  int64_t rows) {
    std::vector<uint8_t> seen(static_cast<size_t>(tokens));
    for (int64_t b = 0; b < batch; ++b) {
        const int32_t* member = members + b * tokens;
        const int32_t* offset = offsets + b * (rows + 1);
        const Status status =
            first_out_of_range(member, tokens, 0, tokens, Status::kMemberOutOfRange, b);
        if (!status) return status;
        int32_t before = 0;
        for (int64_t m = 0; m <= rows; ++m) {
            if (offset[m] < before || offset[m] > tokens || (m == 0 && offset[m] != 0)) {
                return {Status::kOffsetsNotOrdered, b, m, offset[m]};
            }
            before = offset[m];
        }
        std::fill(seen.begin(), seen.end(), uint8_t{0});
        for (int64_t n = 0; n < tokens; ++n) {
            uint8_t& mark = seen[static_cast<size_t>(member[n])];
            if (mark != 0) return {Status::kMemberRepeated, b, n, member[n]};
            mark = 1;
        }
    }
    return {};
}

void plan_image(const int32_t* assign, int64_t tokens, int64_t rows, int32_t* members,
                int32_t* offsets) {
    // offsets[m + 1] counts row m, then holds its begin while it fills, and ends as its end.
    std::fill(offsets, offsets + rows + 1, 0);
    for (int64_t n = 0; n < tokens; ++n) {
        if (assign[n] >= 0) ++offsets[assign[n] + 1];
    }
    int32_t begin = 0;
    for (int64_t m = 1; m <= rows; ++m) {
        const int32_t count = offsets[m];
        offsets[m] = begin;
        begin += count;
    }
    int32_t dropped = begin;
    for (int64_t n = 0; n < tokens; ++n) {
        const int32_t row = assign[n];
        members[row >= 0 ? offsets[row + 1]++ : dropped++] = static_cast<int32_t>(n);
    }
}

Status plan(const PlanParams& p, const Threads& threads) {
    const OwnIndices assign(p.assign, p.batch * p.tokens);
    const Status status = check_assign(assign.get(), p.batch, p.tokens, p.rows);
    if (!status) return status;
    const int64_t grain = tuning::rows_per_task((p.tokens * 2 + p.rows) * 4);
    threads.parallel_for(p.batch, grain, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            plan_image(assign.get() + b * p.tokens, p.tokens, p.rows, p.members + b * p.tokens,
                       p.offsets + b * (p.rows + 1));
        }
    });
    return {};
}

}  // namespace tome
