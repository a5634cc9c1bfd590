// Entry point of match: nearest neighbours by the kernels, then the top r and the plan.

#include "tome_core/match.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "kernels.h"
#include "plan.h"
#include "scratch.h"
#include "tuning.h"

namespace tome {
namespace {

template <class T>
struct Candidate {
    T similarity;
    int32_t index;  // within set A

    // Most similar first; among equals the lower index.
    bool operator<(const Candidate& other) const {
        if (similarity != other.similarity) return similarity > other.similarity;
        return index < other.index;
    }
};

// Output rows: prefix | A tokens that stay | B tokens.
template <class T>
void write_assign(const TokenSet& a, const TokenSet& b, int64_t prefix, int64_t r,
                  const int32_t* nearest, const T* similarity, Candidate<T>* candidates,
                  int32_t* assign) {
    for (int64_t i = 0; i < a.count; ++i) {
        candidates[i] = {similarity[i], static_cast<int32_t>(i)};
    }
    if (r > 0) std::nth_element(candidates, candidates + (r - 1), candidates + a.count);

    for (int64_t n = 0; n < prefix; ++n) assign[n] = static_cast<int32_t>(n);
    for (int64_t i = 0; i < a.count; ++i) assign[a[i]] = 0;
    constexpr int32_t kMerged = -1;
    for (int64_t i = 0; i < r; ++i) assign[a[candidates[i].index]] = kMerged;
    const auto first_b_row = static_cast<int32_t>(prefix + a.count - r);
    auto row = static_cast<int32_t>(prefix);
    for (int64_t i = 0; i < a.count; ++i) {
        int32_t& entry = assign[a[i]];
        entry = entry == kMerged ? first_b_row + nearest[i] : row++;
    }
    for (int64_t j = 0; j < b.count; ++j) assign[b[j]] = first_b_row + static_cast<int32_t>(j);
}

// Similarities become negative costs, where pairs rank by them. Those for which nothing may be
// chosen, of similarity -inf, stay last.
template <class T>
void rank_by_cost(const MatchParams& p, const TokenSet& a, const TokenSet& b, int64_t image,
                  const int32_t* nearest, T* similarity) {
    const auto of = [&](const float* table, int64_t token) {
        return table == nullptr ? 1.0f : table[image * p.tokens + token];
    };
    for (int64_t i = 0; i < a.count; ++i) {
        if (similarity[i] < T(-2)) continue;
        similarity[i] = -merge_cost(similarity[i], of(p.size, a[i]), of(p.size, b[nearest[i]]),
                                    of(p.importance, a[i]));
    }
}

// How many pairs the threshold lets merge.
template <class T>
int64_t count_near(const MatchParams& p, const T* rank, int64_t count) {
    const T least = rank_at_threshold<T>(p);
    return std::count_if(rank, rank + count, [&](T x) {
        return x >= least && x > -std::numeric_limits<T>::infinity();
    });
}

// Merges r tokens of set a, or as many more as the threshold says, into their nearest of set b; or
// without a look at either r into the first. assign must be -1 for tokens in neither.
template <class T>
void match_sets(const MatchParams& p, const TokenSet& a, const TokenSet& b, bool looks,
                int64_t image, int64_t r, const Threads& threads, int32_t* assign) {
    const Scratch<int32_t> nearest(a.count);
    const Scratch<T> similarity(a.count);
    const Scratch<Candidate<T>> candidates(a.count);
    if (looks && a.count > 0 && (r > 0 || has_threshold(p))) {
        active_kernels().nearest(p, a, b, image, threads, nearest.get(), similarity.get());
        if (ranks_by_cost(p)) {
            rank_by_cost(p, a, b, image, nearest.get(), similarity.get());
        }
        if (has_threshold(p)) {
            const int64_t most = most_r(a.count, b.count, p.targets != nullptr);
            r = std::max(r, std::min(most, count_near(p, similarity.get(), a.count)));
        }
    } else {
        std::fill_n(nearest.get(), a.count, 0);
        std::fill_n(similarity.get(), a.count, T(0));
    }
    write_assign<T>(a, b, p.num_prefix_tokens, r, nearest.get(), similarity.get(), candidates.get(),
                    assign);
}

// What is visible of a set, listed in `tokens`.
TokenSet visible_of(const TokenSet& set, const float* weight, int32_t* tokens) {
    int64_t count = 0;
    for (int64_t i = 0; i < set.count; ++i) {
        tokens[count] = static_cast<int32_t>(set[i]);
        count += weight[set[i]] != 0 ? 1 : 0;
    }
    return {0, count, tokens};
}

// The same for all images.
struct Matching {
    TokenSet a, b;
    int64_t r;  // cut
};

template <class T>
void match_image(const MatchParams& p, const Matching& m, int64_t image, const Threads& threads) {
    int32_t* assign = p.assign + image * p.tokens;
    const int64_t rows = p.tokens - m.r;
    if (!may_merge(p)) {
        for (int64_t n = 0; n < p.tokens; ++n) assign[n] = static_cast<int32_t>(n);
    } else if (p.weight == nullptr) {
        match_sets<T>(p, m.a, m.b, true, image, m.r, threads, assign);
    } else {
        const float* weight = p.weight + image * p.tokens;
        const Scratch<int32_t> tokens(p.tokens);
        const TokenSet a = visible_of(m.a, weight, tokens.get());
        TokenSet b = visible_of(m.b, weight, tokens.get() + m.a.count);
        const int64_t hidden = m.a.count + m.b.count - a.count - b.count;
        const int64_t r = visible_r(m.r, a.count, b.count, hidden, p.targets != nullptr);
        const bool looks = b.count > 0;
        if (!looks && r > 0) b = {0, 1, m.b.list};
        std::fill(assign, assign + p.tokens, -1);
        match_sets<T>(p, a, b, looks, image, r, threads, assign);
    }
    plan_image(assign, p.tokens, rows, p.members + image * p.tokens,
               p.offsets + image * (rows + 1));
}

// Kernels ask for what they read of the next image: not where another thread will read it.
MatchParams as_if_last(MatchParams p, int64_t image) {
    p.batch = image + 1;
    return p;
}

template <class T>
void match_batch(const MatchParams& p, const Matching& m, const Threads& threads) {
    if (tuning::split_image(p.batch, threads.count, m.a.count * m.b.count * p.dim)) {
        for (int64_t image = 0; image < p.batch; ++image) {
            match_image<T>(as_if_last(p, image), m, image, threads);
        }
        return;
    }
    const int64_t image_bytes = p.tokens * p.heads * p.dim * element_size(p.dtype);
    threads.parallel_for(p.batch, tuning::rows_per_task(image_bytes),
                         [&](int64_t begin, int64_t end) {
                             const MatchParams mine = as_if_last(p, end - 1);
                             for (int64_t image = begin; image < end; ++image) {
                                 match_image<T>(mine, m, image, Threads::serial());
                             }
                         });
}

Status check_targets(const MatchParams& p) {
    int64_t least = p.num_prefix_tokens;
    for (int64_t j = 0; j < p.num_targets; ++j) {
        if (p.targets[j] < least || p.targets[j] >= p.tokens) {
            return {Status::kTargetsNotOrdered, 0, j, p.targets[j]};
        }
        least = int64_t{p.targets[j]} + 1;
    }
    return {};
}

}  // namespace

Status match(const MatchParams& given, const Threads& threads) {
    MatchParams p = given;
    const OwnIndices targets(given.targets, given.targets == nullptr ? 0 : given.num_targets);
    if (given.targets != nullptr) p.targets = targets.get();
    const Sets sets = split_sets(p.tokens, p.num_prefix_tokens);
    Matching m{{sets.first_a, sets.num_a}, {sets.first_b, sets.num_b}, cut_r(p)};
    const Scratch<int32_t> sources(p.targets == nullptr ? 0 : p.tokens);
    if (p.targets != nullptr) {
        const Status status = check_targets(p);
        if (!status) return status;
        int64_t count = 0, next = 0;
        for (int64_t n = p.num_prefix_tokens; n < p.tokens; ++n) {
            if (next < p.num_targets && p.targets[next] == n) {
                ++next;
            } else {
                sources[count++] = static_cast<int32_t>(n);
            }
        }
        m.a = {0, count, sources.get()};
        m.b = {0, p.num_targets, p.targets};
    }
    if (p.dtype == DType::kFloat64) {
        match_batch<double>(p, m, threads);
    } else {
        match_batch<float>(p, m, threads);
    }
    return {};
}

}  // namespace tome
