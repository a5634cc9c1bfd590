// Attention with sizes, a block of keys at a time: no matrix of queries x keys is ever whole.
//
//                    keys of a block, packed       values of a block, packed
//                    (key panels, dim, kPanel)     (channel panels, keys, kPanel)
//                     +-----+-----+-----+           +-----+-----+
//   kTileRows    +--+ |     |     |     |  exp2     |     |     |      +---------+
//   queries      |  |x|     |     |     | ------>   |     |     |  ->  |   out   |
//                +--+ +-----+-----+-----+           |     |     |      +---------+
//                     = scores (kTileRows, keys) x  +-----+-----+
//
// Logits are in units of log2. Scale and bias log2(size) come behind the sum over channels, in one
// multiply-add: in front they would add a rounding to every term. A row's maximum, sum and weighted
// values are carried from block to block (online softmax; Milakov and Gimelshein, arXiv
// 1805.02867), where there is more than one.
#ifndef TOME_ATTENTION_INL
#define TOME_ATTENTION_INL

#include "attention_common.inl"

namespace tome::TOME_ISA_NAMESPACE {

// Keys or values (count, dim) as they are packed.
template <class In>
struct TokenRows {
    const In* data;
    int64_t step;
};

// Where keys are hidden, a copy in which their rows are zeros: their weights are 0, but 0 times a
// NaN or an infinity would be NaN in every output.
//   bias (count)       of these keys
//   copy (count, dim)  working memory
template <class In, class T>
TokenRows<In> without_hidden(TokenRows<In> rows, bool hides, const T* bias, int64_t count,
                             int64_t dim, In* copy) {
    if (!hides) return rows;
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(In));
    for (int64_t j = 0; j < count; ++j) {
        if (bias[j] == -std::numeric_limits<T>::infinity()) {
            clear_row(copy + j * dim, bytes);
        } else {
            copy_row(copy + j * dim, rows.data + j * rows.step, bytes);
        }
    }
    return {copy, dim};
}

// Keys [begin, begin + count) of one image and head. Depths are counted in P, which may hold
// several channels, or keys.
template <class P, class T>
struct KeyBlock {
    const P* columns;  // (key panels, dim, kPanel)
    const P* values;   // (channel panels, count, kPanel)
    const T* bias;     // (padded count)
    int64_t count;
    bool first, last;
};

// What the rows of a tile carry from block to block; not touched where there is only one.
template <class T>
struct RowState {
    T* values;  // (kTileRows, padded dim)
    T* peak;    // (kTileRows)
    T* sum;     // (kTileRows)
};

// The scores of the panel that begins with key j, or of its first kVectors vectors.
template <class P, class T, int kRows, int kVectors, class V>
TOME_INLINE void score_panel_of(const P* queries, int64_t depth, V factors,
                                const KeyBlock<P, T>& block, int64_t j, T* scores,
                                V (&peak)[kRows]) {
    constexpr int kLanes = Vector<T>::kLanes;
    const int64_t padded = round_up(block.count, kPanel<T>);
    V sum[kRows][kVectors];
    clear(sum);
    multiply_panel(queries, depth, 1, block.columns + j * depth, depth, sum);
    for (int v = 0; v < kVectors; ++v) {
        const V bias = load(block.bias + j + v * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const V score = sum[i][v] * factors + bias;
            store(scores + i * padded + j + v * kLanes, score);
            peak[i] = larger(score, peak[i]);
        }
    }
}

// scores (kRows, padded count) = factor * queries x columns + bias, up to the last vector with a
// key; each row's maximum in `top`.
template <class P, class T, int kRows>
TOME_INLINE void score_tile_of(const P* queries, int64_t depth, T factor,
                               const KeyBlock<P, T>& block, T* scores, T (&top)[kRows]) {
    using V = typename Vector<T>::Type;
    const V factors = broadcast<V>(factor);
    V peak[kRows];
    for (int i = 0; i < kRows; ++i) peak[i] = broadcast<V>(-std::numeric_limits<T>::infinity());
    int64_t j = 0;
    for (; j + Vector<T>::kLanes < block.count; j += kPanel<T>) {
        score_panel_of<P, T, kRows, kPanelVectors>(queries, depth, factors, block, j, scores, peak);
    }
    if (j < block.count) {
        score_panel_of<P, T, kRows, 1>(queries, depth, factors, block, j, scores, peak);
    }
    for (int i = 0; i < kRows; ++i) top[i] = largest(peak[i]);
}

// kRows queries against one block.
//   queries (kRows, dim)
//   scores  (kRows, padded count)  working memory
//   weights (kRows, padded count)  working memory, may be scores
//   row                            number of the first query
template <class In, class P, class T, int kRows>
void attend_tile(const AttentionParams& p, int64_t image, int64_t head, int64_t row,
                 const KeyBlock<P, T>& block, const P* queries, T* scores, P* weights,
                 const RowState<T>& state) {
    using V = typename Vector<T>::Type;
    constexpr int kLanes = Vector<T>::kLanes;
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const int64_t padded = round_up(block.count, kPanel<T>);
    const int64_t padded_dim = round_up(p.dim, kPanel<T>);
    const int64_t weights_step = depth_of<P>(padded), depth = depth_of<P>(block.count);
    T top[kRows];
    score_tile_of(queries, depth_of<P>(p.dim), T(p.scale * kLog2E), block, scores, top);

    T scale[kRows];  // of what earlier blocks left; at last, of the result
    T carry[kRows];
    for (int i = 0; i < kRows; ++i) {
        const T before = block.first ? kNone : state.peak[i];
        const T peak = std::max(before, top[i]);
        const T shift = peak == kNone ? T(0) : peak;  // all hidden so far: exp2(-inf) is 0
        const V shifts = broadcast<V>(shift);
        V sums{};
        for (int64_t j = 0; j < block.count; j += kLanes) {
            const V weight = exp2_of_nonpositive(load(scores + i * padded + j) - shifts);
            store_packed(weights + i * weights_step, j, weight);
            sums += weight;
        }
        carry[i] = block.first ? T(0) : std::exp2(before - shift);
        const T sum = total(sums) + (block.first ? T(0) : carry[i] * state.sum[i]);
        if (!block.last) {
            state.peak[i] = peak;
            state.sum[i] = sum;
        }
        scale[i] = sum == 0 ? T(0) : T(1) / sum;
        if (block.last) {
            T* lse = static_cast<T*>(p.lse) + (image * p.heads + head) * p.queries;
            lse[row + i] = sum == 0 ? T(0) : (shift + std::log2(sum)) * T(kLn2);
        }
    }

    In* out = static_cast<In*>(p.out) + ((image * p.queries + row) * p.heads + head) * p.dim;
    for (int64_t d = 0; d < padded_dim; d += kPanel<T>) {
        V sum[kRows][kPanelVectors];
        clear(sum);
        T* carried = state.values + d;
        if (!block.first) {
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kPanelVectors; ++v) {
                    sum[i][v] =
                        load(carried + i * padded_dim + v * kLanes) * broadcast<V>(carry[i]);
                }
            }
        }
        multiply_panel(weights, weights_step, 1, block.values + d * depth, depth, sum);
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
                if (block.last) {
                    store_channels(out + i * p.heads * p.dim, d + v * kLanes, p.dim,
                                   sum[i][v] * broadcast<V>(scale[i]));
                } else {
                    store(carried + i * padded_dim + v * kLanes, sum[i][v]);
                }
            }
        }
    }
}

// Asks for rows (count, dim), step apart, before they are read. Rows of a packed qkv lie pages
// apart, where the hardware does not look by itself.
template <class In>
TOME_INLINE void ask_for_rows(const In* rows, int64_t step, int64_t count, int64_t dim) {
    constexpr int64_t kLine = 64 / sizeof(In);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(rows + i * step + d, 0, 2);
    }
}

template <class In>
void attention_parts_of(const AttentionParams& p, int64_t parts, int64_t begin, int64_t end) {
    using T = typename Accumulate<In>::Type;
    using P = typename Packed<In>::Type;
    const int64_t per_block =
        tuning::keys_per_block(p.keys, p.dim, sizeof(P) / kValuesIn<P>, kPanel<T>);
    const int64_t per_part = round_up((p.queries + parts - 1) / parts, kTileRows);
    const int64_t padded_dim = round_up(p.dim, kPanel<T>), depth = depth_of<P>(p.dim);
    const int64_t padded_keys = round_up(p.keys, kPanel<T>);
    const bool one_block = p.keys <= per_block;
    const int64_t block_keys = one_block ? padded_keys : per_block;
    constexpr bool kInPlace = std::is_same_v<P, T>;  // weights take the place of their scores
    const Scratch<P> columns(block_keys * depth), values(depth_of<P>(block_keys) * padded_dim),
        queries(kTileRows * depth), spare(Vector<P>::kLanes * depth),
        apart(kInPlace ? 0 : kTileRows * depth_of<P>(block_keys));
    const Scratch<T> bias(padded_keys), scores(kTileRows * block_keys);
    const int64_t carried = one_block ? 0 : per_part;
    const Scratch<T> state_values(carried * padded_dim), state_peak(carried), state_sum(carried);
    P* weights = apart.get();
    if constexpr (kInPlace) weights = scores.get();

    // Keys or values of a block, where some are hidden.
    const Scratch<In> shown(p.size == nullptr ? 0 : block_keys * p.dim);

    int64_t packed = -1, biased = -1;  // which (image, head) and image the buffers hold
    bool hides = false;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image_head = item / parts, first_row = item % parts * per_part;
        const int64_t image = image_head / p.heads, head = image_head % p.heads;
        const int64_t end_row = std::min(p.queries, first_row + per_part);
        const auto at = [&](const void* x, const HeadStrides& s, int64_t token) {
            return static_cast<const In*>(x) + image * s.batch + head * s.head + token * s.token;
        };
        if (biased != image) {
            const float* size = p.size == nullptr ? nullptr : p.size + image * p.keys;
            hides = fill_bias(size, p.keys, padded_keys, bias.get());
            biased = image;
        }
        // One block even where there are no keys, which writes the zeros.
        for (int64_t key = 0; key == 0 || key < p.keys; key += per_block) {
            const int64_t count = std::min(per_block, p.keys - key);
            if (!one_block || packed != image_head) {
                const auto shown_rows = [&](const void* x, const HeadStrides& s) {
                    return without_hidden<In>({at(x, s, key), s.token}, hides, bias.get() + key,
                                              count, p.dim, shown.get());
                };
                const TokenRows<In> k = shown_rows(p.k, p.k_strides);
                pack_columns(k.data, k.step, count, p.dim, spare.get(), columns.get());
                const TokenRows<In> v = shown_rows(p.v, p.v_strides);
                pack_rows(v.data, v.step, count, p.dim, values.get());
                packed = image_head;
            }
            const KeyBlock<P, T> block{columns.get(), values.get(), bias.get() + key,
                                       count,         key == 0,     key + count >= p.keys};
            for (int64_t row = first_row; row < end_row; row += kTileRows) {
                const int64_t rows = std::min<int64_t>(kTileRows, end_row - row);
                const int64_t next = row + kTileRows;
                if (next < end_row) {
                    ask_for_rows(at(p.q, p.q_strides, next), p.q_strides.token,
                                 std::min<int64_t>(kTileRows, end_row - next), p.dim);
                }
                if (one_block && item + 1 < end && (item + 1) / parts != image_head) {
                    // An even share of the next head's keys and values.
                    const int64_t head_after = (image_head + 1) % p.heads;
                    const int64_t image_after = (image_head + 1) / p.heads;
                    const int64_t all = end_row - first_row;
                    const int64_t from = p.keys * (row - first_row) / all;
                    const int64_t to = p.keys * (row + rows - first_row) / all;
                    const auto ask = [&](const void* x, const HeadStrides& s) TOME_INLINE_LAMBDA {
                        ask_for_rows(static_cast<const In*>(x) + image_after * s.batch +
                                         head_after * s.head + from * s.token,
                                     s.token, to - from, p.dim);
                    };
                    ask(p.k, p.k_strides);
                    ask(p.v, p.v_strides);
                }
                widen_rows(at(p.q, p.q_strides, row), p.q_strides.token, rows, p.dim,
                           queries.get());
                const int64_t in_part = one_block ? 0 : row - first_row;
                const RowState<T> state{state_values.get() + in_part * padded_dim,
                                        state_peak.get() + in_part, state_sum.get() + in_part};
                with_rows<kTileRows>(rows, [&](auto count) TOME_INLINE_LAMBDA {
                    attend_tile<In, P, T, count()>(p, image, head, row, block, queries.get(),
                                                   scores.get(), weights, state);
                });
            }
        }
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_INL
