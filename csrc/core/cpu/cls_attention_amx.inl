// The attention of one query token of bfloat16 in matrix units: keys, as they lie in memory, are
// left tiles, and the query is one column of right tiles. The products of the other columns are
// with zeros: reading the keys takes as long.
#ifndef TOME_CLS_ATTENTION_AMX_INL
#define TOME_CLS_ATTENTION_AMX_INL

#include "amx.inl"
#include "attention_common.inl"

namespace tome::TOME_ISA_NAMESPACE {

// weights (keys): the softmax row of one image and head; zeros where all keys are hidden.
void cls_attention_head(const ClsAttentionParams& p, int64_t image, int64_t head, float* weights) {
    constexpr int64_t kKeys = 2 * kUnitRows;
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const UseTiles tiles;
    const int64_t steps = unit_steps(p.dim), padded = round_up(p.keys, kKeys);
    const Scratch<char> query(steps * kUnitBytes), spare(2 * steps * kUnitBytes);
    const Scratch<float> logits(padded);
    const UnitTokens q{
        static_cast<const BFloat*>(p.q) + image * p.q_stride_batch + head * p.q_stride_head, 0, 1,
        p.dim};
    clear_row(query.get(), steps * kUnitBytes);
    for (int64_t s = 0; s < steps; ++s) {
        const UnitRow pairs = q.channels(0, s * kUnitDepth);
        for (int i = 0; i < kUnitRows; ++i) {
            const float pair = pairs[i];
            std::memcpy(query.get() + s * kUnitBytes + i * kUnitRowBytes, &pair, sizeof(pair));
        }
    }
    fill_bias(p.size == nullptr ? nullptr : p.size + image * p.keys, p.keys, padded, logits.get());
    const VFloat factor = broadcast<VFloat>(float(p.scale * kLog2E));
    VFloat peaks = broadcast<VFloat>(kNone);
    for (int64_t j = 0; j < p.keys; j += kKeys) {
        const UnitTokens k{static_cast<const BFloat*>(p.k) + image * p.k_strides.batch +
                               head * p.k_strides.head + j * p.k_strides.token,
                           p.k_strides.token, p.keys - j, p.dim};
        LeftTiles left{k.data, k.step * 2, kUnitRows * k.step * 2, kUnitRowBytes};
        if (k.count < kKeys || p.dim % kUnitDepth != 0) {
            pack_left(k, 2, spare.get());
            left = {spare.get(), kUnitRowBytes, steps * kUnitBytes, kUnitBytes};
        }
        alignas(64) float products[kKeys * kUnitRows];
        multiply_tiles<2, 1>(left, {query.get(), steps}, steps, false, products, kUnitRows);
        for (int64_t half = 0; half < kKeys; half += kUnitRows) {
            VFloat product;
            for (int i = 0; i < kUnitRows; ++i) product[i] = products[(half + i) * kUnitRows];
            const VFloat bias = load(logits.get() + j + half);
            // A hidden key's is its bias, -inf, whatever it holds.
            const VFloat logit = select<VFloat>(bit_cast<VUint>(bias > broadcast<VFloat>(kNone)),
                                                product * factor + bias, bias);
            store(logits.get() + j + half, logit);
            peaks = larger(logit, peaks);
        }
    }
    softmax_row(logits.get(), p.keys, largest(peaks), weights);
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_CLS_ATTENTION_AMX_INL
