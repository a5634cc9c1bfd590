// Entry point of match: nearest neighbours by the kernels, then the top r and the plan.

#include "tome_core/match.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "kernels.h"
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

// Merges r tokens of set a into their nearest of set b; assign must be -1 for tokens in neither.
template <class T>
void match_sets(const MatchParams& p, const TokenSet& a, const TokenSet& b, int64_t image,
                int64_t r, const Threads& threads, int32_t* assign) {
    const Scratch<int32_t> nearest(a.count);
    const Scratch<T> similarity(a.count);
    const Scratch<Candidate<T>> candidates(a.count);
    if (r > 0) active_kernels().nearest(p, a, b, image, threads, nearest.get(), similarity.get());
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

template <class T>
void match_image(const MatchParams& p, int64_t image, int64_t r, const Threads& threads) {
    int32_t* assign = p.assign + image * p.tokens;
    const int64_t rows = p.tokens - r;
    const Sets sets = split_sets(p.tokens, p.num_prefix_tokens);
    const TokenSet a{sets.first_a, sets.num_a}, b{sets.first_b, sets.num_b};
    if (r == 0) {
        for (int64_t n = 0; n < p.tokens; ++n) assign[n] = static_cast<int32_t>(n);
    } else if (p.weight == nullptr) {
        match_sets<T>(p, a, b, image, r, threads, assign);
    } else {
        const float* weight = p.weight + image * p.tokens;
        const Scratch<int32_t> tokens(p.tokens);
        const TokenSet visible_a = visible_of(a, weight, tokens.get());
        const TokenSet visible_b = visible_of(b, weight, tokens.get() + sets.num_a);
        std::fill(assign, assign + p.tokens, -1);
        match_sets<T>(p, visible_a, visible_b, image,
                      visible_r(r, visible_a.count, visible_b.count), threads, assign);
    }
    plan_image(assign, p.tokens, rows, p.members + image * p.tokens,
               p.offsets + image * (rows + 1));
}

template <class T>
void match_batch(const MatchParams& p, int64_t r, const Threads& threads) {
    const Sets sets = split_sets(p.tokens, p.num_prefix_tokens);
    if (tuning::split_image(p.batch, threads.count, sets.num_a * sets.num_b * p.dim)) {
        for (int64_t image = 0; image < p.batch; ++image) match_image<T>(p, image, r, threads);
        return;
    }
    const int64_t image_bytes = p.tokens * p.heads * p.dim * element_size(p.dtype);
    threads.parallel_for(p.batch, tuning::rows_per_task(image_bytes),
                         [&](int64_t begin, int64_t end) {
                             for (int64_t image = begin; image < end; ++image) {
                                 match_image<T>(p, image, r, Threads::serial());
                             }
                         });
}

}  // namespace

void match(const MatchParams& p, const Threads& threads) {
    const int64_t r = cut_r(p.tokens, p.r, p.num_prefix_tokens);
    if (p.dtype == DType::kFloat64) {
        match_batch<double>(p, r, threads);
    } else {
        match_batch<float>(p, r, threads);
    }
}

}  // namespace tome
