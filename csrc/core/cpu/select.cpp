// Selection of tokens by score.

#include "tome_core/select.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "tuning.h"

namespace tome {
namespace {

// A score as a number that sorts like it: NaN lowest, both zeros alike.
uint64_t rank_of(double score) {
    if (score != score) return 0;
    uint64_t bits = 0;
    score += 0.0;  // -0 becomes 0
    std::memcpy(&bits, &score, sizeof(bits));
    constexpr uint64_t kSign = uint64_t{1} << 63;
    return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

struct Candidate {
    uint64_t rank;
    int32_t token;

    bool operator<(const Candidate& other) const {  // which comes first
        return rank != other.rank ? rank > other.rank : token < other.token;
    }
};

template <class T>
void select_image(const SelectParams& p, int64_t b, std::vector<Candidate>& candidates) {
    const T* scores = static_cast<const T*>(p.scores) + b * p.stride_batch;
    const int64_t kept = cut_keep(p.tokens, p.keep, p.num_prefix_tokens);
    const int64_t rows = select_rows(p.tokens, p.keep, p.num_prefix_tokens, p.fuse);
    const int64_t prefix = std::min(p.num_prefix_tokens, p.tokens);
    int32_t* assign = p.assign + b * p.tokens;
    int32_t* members = p.members + b * p.tokens;
    int32_t* offsets = p.offsets + b * (rows + 1);

    // Marks first: 0 for the tokens that stay, -1 for the others.
    std::fill(assign, assign + p.tokens, 0);
    if (kept < p.tokens) {
        candidates.clear();
        for (int64_t n = prefix; n < p.tokens; ++n) {
            candidates.push_back(
                {rank_of(static_cast<double>(scores[n])), static_cast<int32_t>(n)});
        }
        const auto cut = candidates.begin() + (kept - prefix);
        if (cut != candidates.begin()) std::nth_element(candidates.begin(), cut, candidates.end());
        for (auto other = cut; other != candidates.end(); ++other) assign[other->token] = -1;
    }
    const auto rest = static_cast<int32_t>(rows > kept ? kept : -1);
    int32_t row = 0;
    int64_t other = kept;
    for (int64_t n = 0; n < p.tokens; ++n) {
        if (assign[n] == 0) {
            members[row] = static_cast<int32_t>(n);
            assign[n] = row++;
        } else {
            members[other++] = static_cast<int32_t>(n);
            assign[n] = rest;
        }
    }
    for (int64_t m = 0; m <= kept; ++m) offsets[m] = static_cast<int32_t>(m);
    if (rows > kept) offsets[rows] = static_cast<int32_t>(p.tokens);
}

}  // namespace

void select(const SelectParams& p, const Threads& threads) {
    // An element is looked at some ten times.
    const int64_t grain = tuning::rows_per_task(p.tokens * 64);
    threads.parallel_for(p.batch, grain, [&](int64_t begin, int64_t end) {
        std::vector<Candidate> candidates;
        for (int64_t b = begin; b < end; ++b) {
            if (p.dtype == DType::kFloat64) {
                select_image<double>(p, b, candidates);
            } else {
                select_image<float>(p, b, candidates);
            }
        }
    });
}

}  // namespace tome
