// The attention of one query token, a head at a time: each key is read once.
#ifndef TOME_CLS_ATTENTION_INL
#define TOME_CLS_ATTENTION_INL

#include "attention_common.inl"

namespace tome::TOME_ISA_NAMESPACE {

// weights (keys): the softmax row of one image and head; zeros where all keys are hidden.
template <class In>
void cls_attention_head_of(const ClsAttentionParams& p, int64_t image, int64_t head,
                           typename Accumulate<In>::Type* weights) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    using M = typename Vector<T>::Int;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const In* k = static_cast<const In*>(p.k) + image * p.k_strides.batch + head * p.k_strides.head;
    const Scratch<T> query(p.dim), logits(round_up(p.keys, kLanes));
    widen_rows(static_cast<const In*>(p.q) + image * p.q_stride_batch + head * p.q_stride_head, 0,
               1, p.dim, query.get());
    fill_bias(p.size == nullptr ? nullptr : p.size + image * p.keys, p.keys,
              round_up(p.keys, kLanes), logits.get());
    const V factor = broadcast<V>(T(p.scale * kLog2E));
    T peak = kNone;
    for (int64_t j = 0; j < p.keys; j += kLanes) {
        V sums[kLanes] = {};
        const int64_t here = std::min(kLanes, p.keys - j);
        for (int64_t d = 0; d < p.dim; d += kLanes) {
            const V q = load_channels<T>(query.get(), d, p.dim);
            for (int64_t i = 0; i < here; ++i) {
                sums[i] += q * load_channels<T>(k + (j + i) * p.k_strides.token, d, p.dim);
            }
        }
        const V bias = load(logits.get() + j);
        // A hidden key's is its bias, -inf, whatever it holds.
        const V logit = select<V>(static_cast<M>(bias > broadcast<V>(kNone)),
                                  totals<T>(sums) * factor + bias, bias);
        store(logits.get() + j, logit);
        for (int64_t i = 0; i < here; ++i) peak = std::max(peak, logits[j + i]);
    }
    softmax_row(logits.get(), p.keys, peak, weights);
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_CLS_ATTENTION_INL
