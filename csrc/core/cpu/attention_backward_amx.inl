// The gradients of attention of bfloat16 in matrix units; the arithmetic is that of
// attention_backward.inl, in which P and dS are rounded to bfloat16 before they are multiplied.
//
// Scores lie transposed, a key to a row, so that both kinds of products read them as they are
// written:
//
//   S^T = K Q^T     dP^T = V dO^T         32 keys x 32 queries at a time
//   dV += P^T dO    dK  += dS^T Q         P^T and dS^T are left factors: rows of queries
//   dQ^T = K^T dS^T                       dS^T is the right factor: keys in pairs
#ifndef TOME_ATTENTION_BACKWARD_AMX_INL
#define TOME_ATTENTION_BACKWARD_AMX_INL

#include "attention_amx.inl"

namespace tome::TOME_ISA_NAMESPACE {

// More queries add to dK and dV less often, fewer keep P and dS in L2.
constexpr int64_t kBackwardQueries = 128;

// The working memory of one thread. "Left" and "right" are packed as factors of those names.
struct UnitBackwardWork {
    int64_t key_groups, key_steps, steps, channel_groups, padded_dim;
    Scratch<float> bias;         // (whole steps of keys)
    Scratch<char> k_left;        // (key groups, steps of channels)
    Scratch<char> v_left;        // (key groups, steps of channels)
    Scratch<char> k_channels;    // (channel groups, steps of keys), left tiles
    Scratch<char> q_columns;     // (query groups, steps of channels), right tiles
    Scratch<char> grad_columns;  // (query groups, steps of channels), right tiles
    Scratch<char> q_rows;        // (channel groups, steps of queries), right tiles
    Scratch<char> grad_rows;     // (channel groups, steps of queries), right tiles
    Scratch<BFloat> weight;      // P^T (keys, kBackwardQueries)
    Scratch<BFloat> grad_score;  // dS^T (keys, kBackwardQueries)
    Scratch<char> grad_pairs;    // dS^T (query groups, steps of keys), right tiles
    Scratch<float> sum_k;        // (keys, padded dim)
    Scratch<float> sum_v;        // (keys, padded dim)
    Scratch<float> lse;          // (kBackwardQueries), in units of log2
    Scratch<float> delta;        // (kBackwardQueries)

    UnitBackwardWork(int64_t keys, int64_t dim)
        : key_groups(2 * unit_steps(keys)),
          key_steps(unit_steps(keys)),
          steps(unit_steps(dim)),
          channel_groups(unit_groups(dim)),
          padded_dim(channel_groups * kUnitRows),
          bias(key_steps * kUnitDepth),
          k_left(key_groups * steps * kUnitBytes),
          v_left(key_groups * steps * kUnitBytes),
          k_channels(channel_groups * key_steps * kUnitBytes),
          q_columns(kBackwardQueries * steps * kUnitRowBytes),
          grad_columns(kBackwardQueries * steps * kUnitRowBytes),
          q_rows(kBackwardQueries * padded_dim * 2),
          grad_rows(kBackwardQueries * padded_dim * 2),
          weight(key_steps * kUnitDepth * kBackwardQueries),
          grad_score(key_steps * kUnitDepth * kBackwardQueries),
          grad_pairs(key_steps * kUnitDepth * kBackwardQueries * 2),
          sum_k(key_steps * kUnitDepth * padded_dim),
          sum_v(key_steps * kUnitDepth * padded_dim),
          lse(kBackwardQueries),
          delta(kBackwardQueries) {}
};

// P^T and dS^T of 32 keys and 16 queries, from their scores and the gradients of their weights.
//   scores, grads (32, kQueries)  S^T and dP^T
//   key                           the first
//   query                         the first, of the block
TOME_INLINE void weigh_keys(const UnitBackwardWork& work, const float* scores, const float* grads,
                            int64_t key, int64_t query, float factor) {
    const VFloat factors = broadcast<VFloat>(factor);
    const VFloat lse = load(work.lse.get() + query), delta = load(work.delta.get() + query);
    // Behind the last query all is 0, where keys and values are infinite, too.
    const VUint real =
        bit_cast<VUint>(lse < broadcast<VFloat>(std::numeric_limits<float>::infinity()));
    const auto of_real = [&](VFloat x) TOME_INLINE_LAMBDA {
        return bit_cast<VFloat>(bit_cast<VUint>(x) & real);
    };
    char* pairs = work.grad_pairs.get() +
                  (query / kUnitRows * work.key_steps + key / kUnitDepth) * kUnitBytes;
    const int64_t at = key * kBackwardQueries + query;
    for (int64_t j = 0; j < kUnitDepth; j += 2, pairs += kUnitRowBytes) {
        VNarrow rounded[2];
        for (int i = 0; i < 2; ++i) {
            const VFloat score = load(scores + (j + i) * kQueries);
            const VFloat bias = broadcast<VFloat>(work.bias[key + j + i]);
            const VFloat weight = of_real(exp2_of_nonpositive((score * factors + bias) - lse));
            store(work.weight.get() + at + (j + i) * kBackwardQueries, weight);
            const VFloat grad = of_real(load(grads + (j + i) * kQueries) - delta);
            rounded[i] = round_to_bfloat(weight * grad);
            __builtin_memcpy(work.grad_score.get() + at + (j + i) * kBackwardQueries, &rounded[i],
                             sizeof(rounded[i]));
        }
        store_row(pairs, in_pairs(rounded[0], rounded[1]));
    }
}

// dQ of the block's queries: (K^T dS^T)^T.
inline void write_query_gradients(const UnitBackwardWork& work, int64_t count, int64_t dim,
                                  float scale, BFloat* out, int64_t out_step) {
    alignas(64) float sums[2 * kUnitRows * kQueries];  // (channels, queries)
    const int64_t step_bytes = kUnitBytes, group_bytes = work.key_steps * kUnitBytes;
    const VFloat by = broadcast<VFloat>(scale);
    for (int64_t query = 0; query < count; query += kQueries) {
        const RightTiles pairs{work.grad_pairs.get() + query / kUnitRows * group_bytes,
                               work.key_steps};
        for (int64_t group = 0; group < work.channel_groups; group += 2) {
            const int64_t groups = std::min<int64_t>(2, work.channel_groups - group);
            multiply_groups({work.k_channels.get() + group * group_bytes, kUnitRowBytes,
                             group_bytes, step_bytes},
                            groups, pairs, 2, work.key_steps, false, sums, kQueries);
            for (int64_t g = 0; g < groups; ++g) {
                for (int64_t first = 0; first < kQueries; first += kUnitRows) {
                    UnitRow square[kUnitRows];
                    for (int i = 0; i < kUnitRows; ++i) {
                        square[i] = load(sums + (g * kUnitRows + i) * kQueries + first);
                    }
                    transpose_unit(square);
                    for (int i = 0; i < kUnitRows && query + first + i < count; ++i) {
                        store_channels(out + (query + first + i) * out_step,
                                       (group + g) * kUnitRows, dim, square[i] * by);
                    }
                }
            }
        }
    }
}

// sums (keys, padded dim), += scores^T (keys, queries) x rows if `add`.
inline void add_key_gradients(const UnitBackwardWork& work, const BFloat* scores, const char* rows,
                              int64_t query_steps, bool add, float* sums) {
    constexpr int64_t kRowBytes = kBackwardQueries * 2;
    for (int64_t group = 0; group < work.key_groups; group += 2) {
        const int64_t key = group * kUnitRows;
        multiply_groups(
            {scores + key * kBackwardQueries, kRowBytes, kUnitRows * kRowBytes, kUnitRowBytes}, 2,
            {rows, unit_steps(kBackwardQueries)}, work.channel_groups, query_steps, add,
            sums + key * work.padded_dim, work.padded_dim);
    }
}

inline void attention_backward_head(const AttentionBackwardParams& p, int64_t image, int64_t head,
                                    const UnitBackwardWork& work) {
    const int64_t keys = p.keys, dim = p.dim, out_step = p.heads * dim;
    const auto tokens = [&](const void* x, const HeadStrides& s, int64_t token, int64_t count) {
        return UnitTokens{
            static_cast<const BFloat*>(x) + image * s.batch + head * s.head + token * s.token,
            s.token, count, dim};
    };
    const auto out_at = [&](void* x, int64_t count, int64_t token) {
        return static_cast<BFloat*>(x) + ((image * count + token) * p.heads + head) * dim;
    };
    const float* lse = static_cast<const float*>(p.lse) + (image * p.heads + head) * p.queries;

    UnitTokens k = tokens(p.k, p.k_strides, 0, keys), v = tokens(p.v, p.v_strides, 0, keys);
    k.bias = v.bias = work.bias.get();
    pack_left(k, work.key_groups, work.k_left.get());
    pack_left(v, work.key_groups, work.v_left.get());
    // Pairs of keys, transposed, are 32 keys of a channel in order.
    pack_rows_right(k, work.key_steps, work.k_channels.get());
    for (int64_t tile = 0; tile < work.channel_groups * work.key_steps; ++tile) {
        char* at = work.k_channels.get() + tile * kUnitBytes;
        UnitRow square[kUnitRows];
        for (int i = 0; i < kUnitRows; ++i) {
            square[i] = load_raw<UnitRow>(at + i * kUnitRowBytes);
        }
        transpose_unit(square);
        for (int i = 0; i < kUnitRows; ++i) store_row(at + i * kUnitRowBytes, square[i]);
    }

    const int64_t key_bytes = work.steps * kUnitBytes;  // of a group
    for (int64_t first = 0; first < p.queries; first += kBackwardQueries) {
        const int64_t count = std::min(kBackwardQueries, p.queries - first);
        const int64_t query_steps = unit_steps(count), query_groups = 2 * query_steps;
        const UnitTokens q = tokens(p.q, p.q_strides, first, count);
        const UnitTokens grad = tokens(p.grad, p.grad_strides, first, count);
        pack_columns_right(q, query_groups, work.q_columns.get());
        pack_columns_right(grad, query_groups, work.grad_columns.get());
        pack_rows_right(q, unit_steps(kBackwardQueries), work.q_rows.get());
        pack_rows_right(grad, unit_steps(kBackwardQueries), work.grad_rows.get());
        const BFloat* out = static_cast<const BFloat*>(p.out) +
                            ((image * p.queries + first) * p.heads + head) * dim;
        for (int64_t i = 0; i < query_steps * kUnitDepth; ++i) {
            // Behind the last query weights are exp2(-inf), 0.
            work.lse[i] =
                i < count ? lse[first + i] * float(kLog2E) : std::numeric_limits<float>::infinity();
            VFloat sum{};
            for (int64_t d = 0; d < dim && i < count; d += kUnitRows) {
                sum += load_channels<float>(grad.data + i * grad.step, d, dim) *
                       load_channels<float>(out + i * out_step, d, dim);
            }
            work.delta[i] = total(sum);
        }
        for (int64_t group = 0; group < work.key_groups; group += 2) {
            const LeftTiles k_tiles{work.k_left.get() + group * key_bytes, kUnitRowBytes, key_bytes,
                                    kUnitBytes};
            const LeftTiles v_tiles{work.v_left.get() + group * key_bytes, kUnitRowBytes, key_bytes,
                                    kUnitBytes};
            for (int64_t query = 0; query < count; query += kQueries) {
                alignas(64) float scores[kUnitDepth * kQueries], grads[kUnitDepth * kQueries];
                const int64_t at = query / kUnitRows * key_bytes;
                multiply_tiles<2, 2>(k_tiles, {work.q_columns.get() + at, work.steps}, work.steps,
                                     false, scores, kQueries);
                multiply_tiles<2, 2>(v_tiles, {work.grad_columns.get() + at, work.steps},
                                     work.steps, false, grads, kQueries);
                for (int64_t half = 0; half < kQueries; half += kUnitRows) {
                    weigh_keys(work, scores + half, grads + half, group * kUnitRows, query + half,
                               float(p.scale * kLog2E));
                }
            }
        }
        write_query_gradients(work, count, dim, float(p.scale), out_at(p.grad_q, p.queries, first),
                              out_step);
        add_key_gradients(work, work.grad_score.get(), work.q_rows.get(), query_steps, first > 0,
                          work.sum_k.get());
        add_key_gradients(work, work.weight.get(), work.grad_rows.get(), query_steps, first > 0,
                          work.sum_v.get());
    }
    if (p.queries == 0) {
        std::fill_n(work.sum_k.get(), keys * work.padded_dim, 0.0f);
        std::fill_n(work.sum_v.get(), keys * work.padded_dim, 0.0f);
    }
    write_sums(work.sum_k.get(), keys, work.padded_dim, dim, float(p.scale),
               out_at(p.grad_k, keys, 0), out_step);
    write_sums(work.sum_v.get(), keys, work.padded_dim, dim, 1.0f, out_at(p.grad_v, keys, 0),
               out_step);
}

void attention_backward_heads(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
    const UseTiles tiles;
    const UnitBackwardWork work(p.keys, p.dim);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / p.heads;
        if (item == begin || item % p.heads == 0) {
            fill_bias(p.size == nullptr ? nullptr : p.size + image * p.keys, p.keys,
                      work.key_steps * kUnitDepth, work.bias.get());
        }
        attention_backward_head(p, image, item % p.heads, work);
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_BACKWARD_AMX_INL
