// A selection by its definition, and inputs of every kind for the tests of every device.
#pragma once

#include "helpers.h"
#include "tome_core/select.h"

namespace tome_test {

struct SelectShape {
    int64_t batch, tokens, keep, prefix;
};

inline void PrintTo(const SelectShape& s, std::ostream* out) {
    *out << "B" << s.batch << " N" << s.tokens << " keep " << s.keep << " prefix " << s.prefix;
}

// Around the number of a block's threads; nothing to drop, nothing to keep; nothing at all.
inline const std::vector<SelectShape> kSelectShapes = {
    {1, 1, 0, 0},      {1, 1, 1, 0},     {2, 9, 4, 1},     {3, 197, 137, 1}, {2, 197, 0, 5},
    {2, 197, 196, 1},  {1, 197, 500, 1}, {2, 256, 100, 0}, {1, 257, 1, 0},   {5, 70, 66, 3},
    {1, 1300, 700, 2}, {2, 3, 2, 5},     {0, 5, 3, 0},     {2, 0, 3, 1},
};

enum class Scores { kDistinct, kTied, kSpecial };

inline double random_score(Scores kind, std::mt19937& engine) {
    constexpr double kSpecials[] = {kNaN, -kNaN, -kInf, kInf, 0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42};
    switch (kind) {
        case Scores::kTied:
            return static_cast<double>(engine() % 3) * 0.25;
        case Scores::kSpecial:
            return kSpecials[engine() % std::size(kSpecials)];
        case Scores::kDistinct:
            break;
    }
    return std::normal_distribution<double>()(engine);
}

// Scores (batch, tokens) between elements that would win if they were looked at.
struct ScoreRows {
    Array memory;
    int64_t stride;

    ScoreRows(DType dtype, const SelectShape& s, Scores kind, int64_t pad, unsigned seed)
        : memory(dtype, s.batch * (s.tokens + pad)), stride(s.tokens + pad) {
        std::mt19937 engine(seed);
        for (int64_t i = 0; i < memory.count(); ++i) {
            const int64_t n = i % stride;
            const bool counts = n >= s.prefix && n < s.tokens;
            memory.set(i, counts ? random_score(kind, engine) : kInf);
        }
    }
};

// Whether token i goes before token j.
inline bool ranks_before(const Array& scores, int64_t row, int64_t i, int64_t j) {
    const double a = scores[row + i], b = scores[row + j];
    if (std::isnan(a) != std::isnan(b)) return std::isnan(b);
    return a > b || ((a == b || std::isnan(a)) && i < j);
}

inline Plan select_oracle(const ScoreRows& scores, const SelectShape& s, bool fuse) {
    const int64_t prefix = std::min(s.prefix, s.tokens);
    const int64_t keep = std::min(s.keep, s.tokens - prefix);
    const bool fuses = fuse && prefix + keep < s.tokens;
    std::vector<int32_t> assign;
    for (int64_t b = 0; b < s.batch; ++b) {
        int32_t row = 0;
        for (int64_t n = 0; n < s.tokens; ++n) {
            int64_t rank = 0;
            for (int64_t other = prefix; other < s.tokens; ++other) {
                rank += ranks_before(scores.memory, b * scores.stride, other, n);
            }
            const bool stays = n < prefix || rank < keep;
            assign.push_back(stays ? row++ : fuses ? static_cast<int32_t>(prefix + keep) : -1);
        }
    }
    return plan_of(assign, s.batch, s.tokens, prefix + keep + fuses);
}

// What `run(params)` selects, which fills a plan of the right size.
template <class Run>
Plan run_select(const ScoreRows& scores, const SelectShape& s, bool fuse, const Run& run) {
    constexpr int32_t kPoison = 0x5a5a5a5a;
    const int64_t rows = tome::select_rows(s.tokens, s.keep, s.prefix, fuse);
    const std::vector<int32_t> per_token(static_cast<size_t>(s.batch * s.tokens), kPoison);
    Plan got{s.batch,   s.tokens,  rows,
             per_token, per_token, std::vector<int32_t>(size_t(s.batch * (rows + 1)), kPoison)};
    run(tome::SelectParams{scores.memory.data(), scores.memory.dtype(), s.batch, s.tokens,
                           scores.stride, s.keep, s.prefix, fuse, got.assign.data(),
                           got.members.data(), got.offsets.data()});
    return got;
}

// Every kind of scores of one shape: `body(scores, fuse)`.
template <class Body>
void for_each_selection(const SelectShape& shape, const Body& body) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
        for (Scores kind : {Scores::kDistinct, Scores::kTied, Scores::kSpecial}) {
            for (int64_t pad : {0, 3}) {
                const ScoreRows scores(dtype, shape, kind, pad, unsigned(shape.tokens + pad));
                for (bool fuse : {false, true}) body(scores, fuse);
            }
        }
    }
}

}  // namespace tome_test
