// Plans and sizes, and the operators that make a plan of something else than keys: select and plan.
#pragma once

#include "tome_core/cuda.h"
#include "trial.h"

namespace gpu_check {

struct Plan {
    int64_t batch, tokens, rows;
    Ints assign, members, offsets;
};

inline Plan plan_of(Ints assign, int64_t batch, int64_t tokens, int64_t rows) {
    Plan p{batch,
           tokens,
           rows,
           std::move(assign),
           Ints(size_t(batch * tokens)),
           Ints(size_t(batch * (rows + 1)))};
    if (!tome::plan({p.assign.data(), batch, tokens, rows, p.members.data(), p.offsets.data()},
                    threads())) {
        p.rows = -1;  // refused
    }
    return p;
}

// Some rows stay empty, and one token in eight is dropped.
inline Plan random_plan(const Case& c, Random& random) {
    Ints assign;
    const int64_t rows = c.tokens - c.r;
    for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
        const bool drop = random.below(8) == 0;
        assign.push_back(drop ? -1 : static_cast<int32_t>(random.below(rows)));
    }
    return plan_of(assign, c.batch, c.tokens, rows);
}

inline Floats random_sizes(const Case& c, Random& random) {
    Floats out;
    for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t n = 0; n < c.tokens; ++n) {
            const auto size = static_cast<float>(1 + random.below(5));
            const bool hidden = random.below(4) == 0 || (c.batch > 1 && b == 1);
            out.push_back(c.sizes == Sizes::kZeros && hidden ? 0.0f : size);
        }
    }
    if (c.sizes == Sizes::kNone) out.clear();
    return out;
}

inline void set_up_select(const Case& c, Trial& t, Random& random) {
    const DType dtype = c.dtype == DType::kFloat64 ? c.dtype : DType::kFloat32;
    auto scores = std::make_shared<Array>(dtype, c.batch * c.tokens);
    for (int64_t i = 0; i < scores->count(); ++i) {
        // With `fuse` few different scores, so that there are ties, and a NaN.
        scores->set(i, c.fuse ? double(random.below(7)) - 3.0 : random.normal());
        if (c.fuse && i % 97 == 5) scores->set(i, std::nan(""));
    }
    const int64_t keep = c.tokens - c.prefix - c.r;
    const int64_t rows = tome::select_rows(c.tokens, keep, c.prefix, c.fuse);
    tome::SelectParams p{};
    p.scores = t.put(*scores), p.dtype = dtype, p.batch = c.batch, p.tokens = c.tokens;
    p.stride_batch = c.tokens, p.keep = keep, p.num_prefix_tokens = c.prefix, p.fuse = c.fuse;
    p.assign = t.out_ints("assign", c.batch * c.tokens);
    p.members = t.out_ints("members", c.batch * c.tokens);
    p.offsets = t.out_ints("offsets", c.batch * (rows + 1));
    t.run = [p] { return tome::select_cuda(p, nullptr); };
    t.judge = [&c, &t, p, rows, scores](Verdict& v) {
        Ints assign(size_t(c.batch * c.tokens)), members = assign,
                                                 offsets(size_t(c.batch * (rows + 1)));
        tome::SelectParams cpu = p;
        cpu.scores = scores->data(), cpu.assign = assign.data();
        cpu.members = members.data(), cpu.offsets = offsets.data();
        tome::select(cpu, threads());
        compare_ints(v, t["assign"], assign);
        compare_ints(v, t["members"], members);
        compare_ints(v, t["offsets"], offsets);
    };
}

inline void set_up_plan(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    const tome::PlanParams p{t.put(plan->assign),
                             c.batch,
                             c.tokens,
                             plan->rows,
                             t.out_ints("members", c.batch * c.tokens),
                             t.out_ints("offsets", c.batch * (plan->rows + 1))};
    t.run = [p] { return tome::plan_cuda(p, nullptr); };
    t.judge = [&t, plan](Verdict& v) {
        compare_ints(v, t["members"], plan->members);
        compare_ints(v, t["offsets"], plan->offsets);
    };
}

}  // namespace gpu_check
