// What attention in vectors and attention in matrix units share.
#ifndef TOME_ATTENTION_COMMON_INL
#define TOME_ATTENTION_COMMON_INL

#include "panels.inl"

namespace tome::TOME_ISA_NAMESPACE {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// bias (padded keys) of one image: log2 of the sizes, -inf behind the last key. Returns whether a
// size is 0, which hides its key.
template <class T>
bool fill_bias(const float* size, int64_t keys, int64_t padded, T* bias) {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    bool hides = false;
    for (int64_t j = 0; j < keys; ++j) {
        bias[j] = size == nullptr ? T(0) : std::log2(T(size[j]));
        hides |= bias[j] == kHidden;
    }
    std::fill(bias + keys, bias + padded, kHidden);
    return hides;
}

// weights (keys) = the softmax of `logits` in units of log2, whose largest is `peak`; zeros where
// all keys are hidden.
//   logits (whole vectors)  -inf behind the last key; overwritten
template <class T>
TOME_INLINE void softmax_row(T* logits, int64_t keys, T peak, T* weights) {
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const V shift = broadcast<V>(peak == -std::numeric_limits<T>::infinity() ? T(0) : peak);
    V sums{};
    for (int64_t j = 0; j < keys; j += kLanes) {
        const V weight = exp2_of_nonpositive(load(logits + j) - shift);
        store(logits + j, weight);
        sums += weight;
    }
    const T sum = total(sums);
    const V share = broadcast<V>(sum == 0 ? T(0) : T(1) / sum);
    for (int64_t j = 0; j < keys; j += kLanes) {
        store_channels(weights, j, keys, load(logits + j) * share);
    }
}

// Rows of sums (keys, padded dim), times `by`, to out.
template <class In, class T>
void write_sums(const T* sums, int64_t keys, int64_t padded_dim, int64_t dim, T by, In* out,
                int64_t out_step) {
    using V = typename Vector<T>::Type;
    for (int64_t j = 0; j < keys; ++j) {
        for (int64_t d = 0; d < dim; d += Vector<T>::kLanes) {
            store_channels(out + j * out_step, d, dim,
                           load(sums + j * padded_dim + d) * broadcast<V>(by));
        }
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_COMMON_INL
