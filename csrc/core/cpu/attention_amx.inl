// Attention of bfloat16 in matrix units: the steps of attention.inl, 32 queries at a time.
//
// Scores of 32 queries and a block of keys are one product of tiles. Their softmax, in float32,
// rounds the weights to bfloat16 into the place of their scores, where they are the left factor of
// the product with the values. A block's scores stay in L1, the packed keys and values of a head
// in L2.
#ifndef TOME_ATTENTION_AMX_INL
#define TOME_ATTENTION_AMX_INL

#include "amx.inl"
#include "attention_common.inl"

namespace tome::TOME_ISA_NAMESPACE {

constexpr int64_t kQueries = 2 * kUnitRows;

// Keys of a block: 256 scores of 32 queries are 32 KiB, two thirds of L1.
constexpr int64_t kMostBlockKeys = 256;

// Keys that are packed together; both they and their values take this much of L2.
constexpr int64_t kPackedBytes = 512 * 1024;

// As even as can be, and whole steps of the product with the values.
constexpr int64_t even_share(int64_t keys, int64_t most) {
    const int64_t parts = std::max<int64_t>(1, (keys + most - 1) / most);
    return std::max(kUnitDepth, round_up((keys + parts - 1) / parts, kUnitDepth));
}

// What 32 queries carry from block to block.
struct Carried {
    float* values;  // (32, padded dim)
    float* peak;    // (32)
    float* sum;     // (32)
};

// Of kRows rows: what a later block adds to is multiplied by `carry`; `shift` was subtracted from
// the logits.
template <int kRows>
struct RowScales {
    float carry[kRows], shift[kRows];
};

// The weights of kRows queries of a block, in the place of their scores; updates peak and sum.
//   scores (kRows, step)   products of queries and keys, float32; bfloat16 weights out, at the
//                          beginning of each row, zeros behind the last up to a whole step
//   bias (whole groups of `count`)
template <int kRows>
TOME_INLINE RowScales<kRows> softmax_rows(float* scores, int64_t step, int64_t count, float factor,
                                          const float* bias, bool first, float* peak, float* sum) {
    constexpr int kLanes = Vector<float>::kLanes;
    static_assert(kLanes == kUnitRows, "a vector is a row of a result");
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const VFloat factors = broadcast<VFloat>(factor);
    VFloat tops[kRows];
    for (int i = 0; i < kRows; ++i) tops[i] = broadcast<VFloat>(kNone);
    for (int64_t j = 0; j < count; j += kLanes) {
        const VFloat added = load(bias + j);
        for (int i = 0; i < kRows; ++i) {
            tops[i] = larger(load(scores + i * step + j) * factors + added, tops[i]);
        }
    }
    RowScales<kRows> scales;
    VFloat shifts[kRows], sums[kRows];
    for (int i = 0; i < kRows; ++i) {
        const float before = first ? kNone : peak[i];
        peak[i] = std::max(before, largest(tops[i]));
        scales.shift[i] = peak[i] == kNone ? 0.0f : peak[i];  // all hidden: exp2(-inf) is 0
        scales.carry[i] = first ? 0.0f : std::exp2(before - scales.shift[i]);
        shifts[i] = broadcast<VFloat>(scales.shift[i]);
        sums[i] = VFloat{};
    }
    // A row's weights lie over scores that have been read.
    const auto weights = [&](int i, int64_t j, VFloat added) TOME_INLINE_LAMBDA {
        const VFloat score = load(scores + i * step + j) * factors + added;
        const VFloat weight = exp2_of_nonpositive(score - shifts[i]);
        sums[i] += weight;
        return weight;
    };
    for (int64_t j = 0; j < count; j += 2 * kLanes) {
        const bool two = j + kLanes < count;
        const VFloat low = load(bias + j), high = two ? load(bias + j + kLanes) : VFloat{};
        for (int i = 0; i < kRows; ++i) {
            const VFloat even = weights(i, j, low);
            const VFloat odd = two ? weights(i, j + kLanes, high) : VFloat{};
            store_two(reinterpret_cast<BFloat*>(scores + i * step) + j, even, odd);
        }
    }
    for (int i = 0; i < kRows; ++i) {
        sum[i] = total(sums[i]) + (first ? 0.0f : scales.carry[i] * sum[i]);
    }
    return scales;
}

// A block of keys of one image and head.
struct UnitBlock {
    RightTiles keys;    // (groups of the block's keys, steps of channels)
    RightTiles values;  // (groups of channels, steps of the block's keys)
    const float* bias;  // (whole groups of keys)
    int64_t count;
    bool first, last;
};

// Rows [row, row + rows) of the queries against one block.
//   queries (2 groups, steps of channels), left tiles
//   scores  (32, scores_step)  working memory
inline void attend_block(const AttentionParams& p, int64_t image, int64_t head, int64_t row,
                         int64_t rows, const char* queries, const UnitBlock& block, float* scores,
                         int64_t scores_step, const Carried& carried) {
    const int64_t steps = unit_steps(p.dim), groups = unit_groups(rows);
    const int64_t padded_dim = round_up(p.dim, kUnitRows);
    multiply_groups({queries, kUnitRowBytes, steps * kUnitBytes, kUnitBytes}, groups, block.keys,
                    unit_groups(block.count), steps, false, scores, scores_step);
    constexpr int kTogether = 4;
    float shift[kQueries];
    for (int64_t i = 0; i < rows; i += kTogether) {
        with_rows<kTogether>(
            std::min<int64_t>(kTogether, rows - i), [&](auto count) TOME_INLINE_LAMBDA {
                const auto scales = softmax_rows<count()>(
                    scores + i * scores_step, scores_step, block.count, float(p.scale * kLog2E),
                    block.bias, block.first, carried.peak + i, carried.sum + i);
                for (int r = 0; r < count(); ++r) {
                    shift[i + r] = scales.shift[r];
                    if (block.first) continue;
                    float* values = carried.values + (i + r) * padded_dim;
                    const VFloat carry = broadcast<VFloat>(scales.carry[r]);
                    for (int64_t d = 0; d < padded_dim; d += kUnitRows) {
                        store(values + d, load(values + d) * carry);
                    }
                }
            });
    }
    const int64_t scores_bytes = scores_step * 4;
    multiply_groups({scores, scores_bytes, kUnitRows * scores_bytes, kUnitRowBytes}, groups,
                    block.values, unit_groups(p.dim), unit_steps(block.count), !block.first,
                    carried.values, padded_dim);
    if (!block.last) return;
    BFloat* out =
        static_cast<BFloat*>(p.out) + ((image * p.queries + row) * p.heads + head) * p.dim;
    float* lse = static_cast<float*>(p.lse) + (image * p.heads + head) * p.queries + row;
    for (int64_t i = 0; i < rows; ++i) {
        const float sum = carried.sum[i];
        const VFloat share = broadcast<VFloat>(sum == 0 ? 0.0f : 1.0f / sum);
        for (int64_t d = 0; d < padded_dim; d += kUnitRows) {
            store_channels(out + i * p.heads * p.dim, d, p.dim,
                           load(carried.values + i * padded_dim + d) * share);
        }
        lse[i] = sum == 0 ? 0.0f : (shift[i] + std::log2(sum)) * float(kLn2);
    }
}

void attention_parts(const AttentionParams& p, int64_t parts, int64_t begin, int64_t end) {
    const UseTiles tiles;
    const int64_t steps = unit_steps(p.dim), channel_groups = unit_groups(p.dim);
    const int64_t padded_dim = channel_groups * kUnitRows;
    const int64_t per_part = round_up((p.queries + parts - 1) / parts, kQueries);
    const int64_t key_bytes = std::max<int64_t>(1, 2 * (steps * kUnitDepth + padded_dim));
    const int64_t per_pack = even_share(p.keys, std::max(kMostBlockKeys, kPackedBytes / key_bytes));
    const int64_t per_block = even_share(std::min(p.keys, per_pack), kMostBlockKeys);
    // Rows that lie a power of two apart would share a few places of L1.
    const int64_t scores_step = per_block + kUnitRows;
    const bool one_pack = p.keys <= per_pack;
    const Scratch<char> keys(per_pack * steps * kUnitRowBytes),
        values(round_up(per_pack, per_block) * padded_dim * 2),
        queries(kQueries * steps * kUnitRowBytes);
    const Scratch<float> bias(round_up(p.keys, kUnitDepth)), scores(kQueries * scores_step);
    const int64_t carried = one_pack ? kQueries : per_part;
    const Scratch<float> sums(carried * padded_dim), peak(carried), sum(carried);

    int64_t packed = -1, biased = -1;  // which (image, head) and image the buffers hold
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image_head = item / parts, first_row = item % parts * per_part;
        const int64_t image = image_head / p.heads, head = image_head % p.heads;
        const int64_t end_row = std::min(p.queries, first_row + per_part);
        const auto tokens = [&](const void* x, const HeadStrides& s, int64_t token, int64_t count) {
            return UnitTokens{
                static_cast<const BFloat*>(x) + image * s.batch + head * s.head + token * s.token,
                s.token, count, p.dim};
        };
        if (biased != image) {
            fill_bias(p.size == nullptr ? nullptr : p.size + image * p.keys, p.keys,
                      round_up(p.keys, kUnitDepth), bias.get());
            biased = image;
        }
        // Once even where there are no keys, which writes the zeros.
        for (int64_t start = 0; start == 0 || start < p.keys; start += per_pack) {
            const int64_t count = std::min(per_pack, p.keys - start);
            const int64_t blocks = std::max<int64_t>(1, (count + per_block - 1) / per_block);
            const int64_t block_steps = per_block / kUnitDepth;
            if (!one_pack || packed != image_head) {
                UnitTokens k = tokens(p.k, p.k_strides, start, count);
                k.bias = bias.get() + start;
                pack_columns_right(k, unit_groups(count), keys.get());
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t at = b * per_block;
                    UnitTokens v =
                        tokens(p.v, p.v_strides, start + at, std::min(per_block, count - at));
                    v.bias = bias.get() + start + at;
                    pack_rows_right(v, block_steps, values.get() + at * padded_dim * 2);
                }
                packed = image_head;
            }
            for (int64_t row = first_row; row < end_row; row += kQueries) {
                const int64_t rows = std::min(kQueries, end_row - row);
                pack_left(tokens(p.q, p.q_strides, row, rows), unit_groups(rows), queries.get());
                const int64_t in_part = one_pack ? 0 : row - first_row;
                const Carried state{sums.get() + in_part * padded_dim, peak.get() + in_part,
                                    sum.get() + in_part};
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t at = b * per_block, here = std::min(per_block, count - at);
                    const UnitBlock block{{keys.get() + at * steps * kUnitRowBytes, steps},
                                          {values.get() + at * padded_dim * 2, block_steps},
                                          bias.get() + start + at,
                                          here,
                                          start == 0 && b == 0,
                                          start + at + here >= p.keys};
                    attend_block(p, image, head, row, rows, queries.get(), block, scores.get(),
                                 scores_step, state);
                }
            }
        }
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_AMX_INL
