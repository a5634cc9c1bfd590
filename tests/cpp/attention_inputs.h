// Inputs of attention for the tests of every device: strided tensors among NaN, and sizes.
#pragma once

#include <vector>

#include "helpers.h"
#include "tome_core/attention.h"

namespace tome_test {

struct AttentionShape {
    int64_t batch, heads, queries, keys, dim;
};

inline void PrintTo(const AttentionShape& s, std::ostream* out) {
    *out << "B" << s.batch << " H" << s.heads << " M" << s.queries << " N" << s.keys << " D"
         << s.dim;
}

// How a (batch, heads, tokens, dim) tensor lies in memory.
enum class Layout {
    kHeads,    // contiguous
    kTokens,   // (batch, tokens, heads, dim), transposed
    kPacked,   // one of three in (batch, tokens, 3, heads, dim)
    kShifted,  // contiguous, from the second element of its memory on
    kOdd,      // the same, but rows dim + 3 apart
};

inline const std::vector<Layout> kLayouts = {Layout::kHeads, Layout::kTokens, Layout::kPacked,
                                             Layout::kShifted, Layout::kOdd};

// Random values with NaN all around, which shows if a neighbour is read.
struct StridedTensor {
    Array memory;
    int64_t offset;
    tome::HeadStrides strides;

    const void* data() const { return memory.at(offset); }
    int64_t index(int64_t b, int64_t h, int64_t n, int64_t d) const {
        return offset + b * strides.batch + h * strides.head + n * strides.token + d;
    }
};

inline StridedTensor random_tensor(DType dtype, const AttentionShape& s, int64_t tokens,
                                   Layout layout, unsigned seed) {
    const int64_t row = layout == Layout::kOdd ? s.dim + 3 : s.dim;
    const int64_t between = layout == Layout::kPacked ? 3 * s.heads : s.heads;
    StridedTensor t{Array(dtype, s.batch * tokens * between * row + 1), 0, {}};
    if (layout == Layout::kTokens || layout == Layout::kPacked) {
        t.strides = {tokens * between * row, row, between * row};
    } else {
        t.strides = {s.heads * tokens * row, tokens * row, row};
    }
    if (layout == Layout::kPacked) t.offset = s.heads * row;
    if (layout == Layout::kShifted || layout == Layout::kOdd) t.offset = 1;
    for (int64_t i = 0; i < t.memory.count(); ++i) t.memory.set(i, kNaN);
    const Array values = random_array(dtype, s.batch * s.heads * tokens * s.dim, seed);
    int64_t i = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t n = 0; n < tokens; ++n) {
                for (int64_t d = 0; d < s.dim; ++d) t.memory.set(t.index(b, h, n, d), values[i++]);
            }
        }
    }
    return t;
}

enum class Sizes { kNone, kOnes, kSome, kWithZeros, kHuge, kImageHidden, kZeros };

inline const std::vector<Sizes> kSizes = {Sizes::kNone,      Sizes::kOnes, Sizes::kSome,
                                          Sizes::kWithZeros, Sizes::kHuge, Sizes::kImageHidden,
                                          Sizes::kZeros};

// (batch, keys), empty for kNone. kImageHidden hides all keys of the first image.
inline std::vector<float> random_sizes(const AttentionShape& s, Sizes kind, unsigned seed) {
    std::mt19937 engine(seed);
    std::uniform_int_distribution<int> size(1, 8), zero(0, 3);
    std::vector<float> out;
    for (int64_t i = 0; kind != Sizes::kNone && i < s.batch * s.keys; ++i) {
        const auto drawn = static_cast<float>(size(engine));
        const bool hidden = kind == Sizes::kZeros || (kind == Sizes::kImageHidden && i < s.keys) ||
                            (kind == Sizes::kWithZeros && zero(engine) == 0);
        out.push_back(hidden                 ? 0.0f
                      : kind == Sizes::kOnes ? 1.0f
                      : kind == Sizes::kHuge ? drawn * 1e6f
                                             : drawn);
    }
    return out;
}

// Fills the keys and values of size 0 with NaN and infinities, as padding that was never written
// may hold.
template <class Case>
void spoil_hidden(Case& x) {
    const double values[] = {kNaN, kInf, -kInf};
    const AttentionShape& s = x.shape;
    for (int64_t i = 0; i < s.batch * s.keys; ++i) {
        if (x.size[size_t(i)] != 0) continue;
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t b = i / s.keys, n = i % s.keys;
            for (int64_t d = 0; d < s.dim; ++d) {
                x.k.memory.set(x.k.index(b, h, n, d), values[(n + h) % 3]);
                x.v.memory.set(x.v.index(b, h, n, d), values[(n + h + 1) % 3]);
            }
        }
    }
}

// Sizes by image, in turn: one key in three hidden and, where there are more than 160, the first
// 130; all hidden; the last key only.
inline std::vector<float> sizes_to_spoil(const AttentionShape& s) {
    std::vector<float> out;
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t n = 0; n < s.keys; ++n) {
            const bool of_first = n % 3 == 1 || (s.keys > 160 && n < 130);
            const bool hidden = b % 3 == 0 ? of_first : b % 3 == 1 || n == s.keys - 1;
            out.push_back(hidden ? 0.0f : 1.0f + float(n % 4));
        }
    }
    return out;
}

// The params of a test's case, which has a dtype, a shape, q, k, v, sizes (empty: none) and a
// scale.
template <class Case>
tome::AttentionInputs inputs_of(const Case& x) {
    const AttentionShape& s = x.shape;
    return {x.q.data(),
            x.k.data(),
            x.v.data(),
            x.dtype,
            s.batch,
            s.heads,
            s.queries,
            s.keys,
            s.dim,
            x.q.strides,
            x.k.strides,
            x.v.strides,
            x.size.empty() ? nullptr : x.size.data(),
            x.scale};
}

}  // namespace tome_test
