// The gradients of attention, a block of queries at a time, from what the forward pass left.
//
// With P = softmax(S), S = scale * q k^T + log(size):
//
//   dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * out))      dQ = scale * dS K
//                                                                           dK = scale * dS^T Q
//
// P and dS of a block of queries are kept (kQueryBlock, keys): as rows they give dQ, as columns
// their part of dK and dV, which is added to what earlier blocks gave. (Dao, arXiv 2307.08691.)
#ifndef TOME_ATTENTION_BACKWARD_INL
#define TOME_ATTENTION_BACKWARD_INL

#include "attention.inl"

namespace tome::TOME_ISA_NAMESPACE {

// A multiple of every kTileRows. More rows add to dK and dV less often, fewer keep P and dS in L2.
constexpr int64_t kQueryBlock = 48;

// The working memory of one thread.
template <class T>
struct BackwardWork {
    int64_t padded_keys, padded_dim;
    Scratch<T> bias;        // (padded keys)
    Scratch<T> k_columns;   // (key panels, dim, kPanel)
    Scratch<T> v_columns;   // (key panels, dim, kPanel)
    Scratch<T> k_rows;      // (channel panels, keys, kPanel)
    Scratch<T> sum_k;       // (keys, padded dim)
    Scratch<T> sum_v;       // (keys, padded dim)
    Scratch<T> q;           // (kQueryBlock, dim)
    Scratch<T> grad;        // (kQueryBlock, dim)
    Scratch<T> q_rows;      // (channel panels, rows of the block, kPanel)
    Scratch<T> grad_rows;   // (channel panels, rows of the block, kPanel)
    Scratch<T> weight;      // (kQueryBlock, padded keys): P
    Scratch<T> grad_score;  // (kQueryBlock, padded keys): dS
    Scratch<T> delta;       // (kQueryBlock)
    Scratch<T> spare;       // (lanes, dim)

    BackwardWork(int64_t keys, int64_t dim)
        : padded_keys(round_up(keys, kPanel<T>)),
          padded_dim(round_up(dim, kPanel<T>)),
          bias(padded_keys),
          k_columns(padded_keys * dim),
          v_columns(padded_keys * dim),
          k_rows(keys * padded_dim),
          sum_k(keys * padded_dim),
          sum_v(keys * padded_dim),
          q(kQueryBlock * dim),
          grad(kQueryBlock * dim),
          q_rows(kQueryBlock * padded_dim),
          grad_rows(kQueryBlock * padded_dim),
          weight(kQueryBlock * padded_keys),
          grad_score(kQueryBlock * padded_keys),
          delta(kQueryBlock),
          spare(Vector<T>::kLanes * dim) {}
};

// P and dS of kRows queries, rows [row, row + kRows) of the block.
//   factor       of q k^T: scale * log2(e)
//   lse (kRows)  of these rows
template <class T, int kRows>
void score_gradients(const BackwardWork<T>& work, int64_t dim, int64_t row, T factor,
                     const T* lse) {
    using V = typename Vector<T>::Type;
    constexpr int kLanes = Vector<T>::kLanes;
    V row_lse[kRows], delta[kRows];
    for (int i = 0; i < kRows; ++i) {
        row_lse[i] = broadcast<V>(lse[i]);
        delta[i] = broadcast<V>(work.delta[row + i]);
    }
    const V log2e = broadcast<V>(T(kLog2E)), factors = broadcast<V>(factor);
    for (int64_t j = 0; j < work.padded_keys; j += kPanel<T>) {
        V score[kRows][kPanelVectors];
        clear(score);
        multiply_panel(work.q.get() + row * dim, dim, 1, work.k_columns.get() + j * dim, dim,
                       score);
        for (int v = 0; v < kPanelVectors; ++v) {
            const V bias = load(work.bias.get() + j + v * kLanes);
            for (int i = 0; i < kRows; ++i) {
                // Two multiply-adds, where there are such, so that no product is rounded.
                const V exponent = (score[i][v] * factors + bias) - row_lse[i] * log2e;
                store(work.weight.get() + (row + i) * work.padded_keys + j + v * kLanes,
                      exp2_of_nonpositive(exponent));
            }
        }
        V grad[kRows][kPanelVectors];
        clear(grad);
        multiply_panel(work.grad.get() + row * dim, dim, 1, work.v_columns.get() + j * dim, dim,
                       grad);
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
                const int64_t at = (row + i) * work.padded_keys + j + v * kLanes;
                store(work.grad_score.get() + at,
                      load(work.weight.get() + at) * (grad[i][v] - delta[i]));
            }
        }
    }
}

// dQ of kRows queries: dS x K.
template <class In, class T, int kRows>
void query_gradients(const BackwardWork<T>& work, int64_t keys, int64_t dim, int64_t row, T scale,
                     In* out, int64_t out_step) {
    using V = typename Vector<T>::Type;
    for (int64_t d = 0; d < work.padded_dim; d += kPanel<T>) {
        V sum[kRows][kPanelVectors];
        clear(sum);
        multiply_panel(work.grad_score.get() + row * work.padded_keys, work.padded_keys, 1,
                       work.k_rows.get() + d * keys, keys, sum);
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
                store_channels(out + i * out_step, d + v * Vector<T>::kLanes, dim,
                               sum[i][v] * broadcast<V>(scale));
            }
        }
    }
}

// sums (kRows keys, padded dim) += the block's columns of scores^T x rows.
//   scores (rows, padded keys)  from the first of these keys on
//   rows   (channel panels, count, kPanel)
template <class T, int kRows>
void add_key_gradients(const BackwardWork<T>& work, const T* scores, const T* rows, int64_t count,
                       T* sums) {
    using V = typename Vector<T>::Type;
    constexpr int kLanes = Vector<T>::kLanes;
    for (int64_t d = 0; d < work.padded_dim; d += kPanel<T>) {
        V sum[kRows][kPanelVectors];
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
                sum[i][v] = load(sums + i * work.padded_dim + d + v * kLanes);
            }
        }
        multiply_panel(scores, 1, work.padded_keys, rows + d * count, count, sum);
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
                store(sums + i * work.padded_dim + d + v * kLanes, sum[i][v]);
            }
        }
    }
}

//   hides              whether a key of this image is hidden
//   shown (keys, dim)  working memory, if so
template <class In>
void attention_backward_head(const AttentionBackwardParams& p, int64_t image, int64_t head,
                             bool hides, In* shown,
                             const BackwardWork<typename Accumulate<In>::Type>& work) {
    using T = typename Accumulate<In>::Type;
    const int64_t keys = p.keys, dim = p.dim;
    const auto at = [&](const void* x, const HeadStrides& s, int64_t token) {
        return static_cast<const In*>(x) + image * s.batch + head * s.head + token * s.token;
    };
    const auto out_at = [&](void* x, int64_t tokens, int64_t token) {
        return static_cast<In*>(x) + ((image * tokens + token) * p.heads + head) * dim;
    };
    const int64_t out_step = p.heads * dim;
    const T* lse = static_cast<const T*>(p.lse) + (image * p.heads + head) * p.queries;

    const auto shown_rows = [&](const void* x, const HeadStrides& s) {
        return without_hidden<In>({at(x, s, 0), s.token}, hides, work.bias.get(), keys, dim, shown);
    };
    const TokenRows<In> k = shown_rows(p.k, p.k_strides);
    pack_columns(k.data, k.step, keys, dim, work.spare.get(), work.k_columns.get());
    pack_rows(k.data, k.step, keys, dim, work.k_rows.get());
    const TokenRows<In> v = shown_rows(p.v, p.v_strides);
    pack_columns(v.data, v.step, keys, dim, work.spare.get(), work.v_columns.get());
    std::fill_n(work.sum_k.get(), keys * work.padded_dim, T(0));
    std::fill_n(work.sum_v.get(), keys * work.padded_dim, T(0));

    for (int64_t first = 0; first < p.queries; first += kQueryBlock) {
        const int64_t count = std::min(kQueryBlock, p.queries - first);
        const In* q = at(p.q, p.q_strides, first);
        const In* grad = at(p.grad, p.grad_strides, first);
        const In* out =
            static_cast<const In*>(p.out) + ((image * p.queries + first) * p.heads + head) * dim;
        widen_rows(q, p.q_strides.token, count, dim, work.q.get());
        widen_rows(grad, p.grad_strides.token, count, dim, work.grad.get());
        pack_rows(q, p.q_strides.token, count, dim, work.q_rows.get());
        pack_rows(grad, p.grad_strides.token, count, dim, work.grad_rows.get());
        for (int64_t i = 0; i < count; ++i) {
            typename Vector<T>::Type sum{};
            for (int64_t d = 0; d < dim; d += Vector<T>::kLanes) {
                sum += load_channels<T>(work.grad.get() + i * dim, d, dim) *
                       load_channels<T>(out + i * out_step, d, dim);
            }
            work.delta[i] = total(sum);
        }
        for (int64_t i = 0; i < count; i += kTileRows) {
            with_rows<kTileRows>(
                std::min<int64_t>(kTileRows, count - i), [&](auto rows) TOME_INLINE_LAMBDA {
                    score_gradients<T, rows()>(work, dim, i, T(p.scale * kLog2E), lse + first + i);
                    query_gradients<In, T, rows()>(work, keys, dim, i, T(p.scale),
                                                   out_at(p.grad_q, p.queries, first + i),
                                                   out_step);
                });
        }
        for (int64_t j = 0; j < keys; j += kTileRows) {
            with_rows<kTileRows>(
                std::min<int64_t>(kTileRows, keys - j), [&](auto rows) TOME_INLINE_LAMBDA {
                    add_key_gradients<T, rows()>(work, work.grad_score.get() + j, work.q_rows.get(),
                                                 count, work.sum_k.get() + j * work.padded_dim);
                    add_key_gradients<T, rows()>(work, work.weight.get() + j, work.grad_rows.get(),
                                                 count, work.sum_v.get() + j * work.padded_dim);
                });
        }
    }
    write_sums(work.sum_k.get(), keys, work.padded_dim, dim, T(p.scale), out_at(p.grad_k, keys, 0),
               out_step);
    write_sums(work.sum_v.get(), keys, work.padded_dim, dim, T(1), out_at(p.grad_v, keys, 0),
               out_step);
}

template <class In>
void attention_backward_heads_of(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
    using T = typename Accumulate<In>::Type;
    const BackwardWork<T> work(p.keys, p.dim);
    const Scratch<In> shown(p.size == nullptr ? 0 : p.keys * p.dim);
    bool hides = false;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / p.heads;
        if (item == begin || item % p.heads == 0) {
            hides = fill_bias(p.size == nullptr ? nullptr : p.size + image * p.keys, p.keys,
                              work.padded_keys, work.bias.get());
        }
        attention_backward_head<In>(p, image, item % p.heads, hides, shown.get(), work);
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_BACKWARD_INL
