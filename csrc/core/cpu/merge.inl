// Merging rows: sums in float32 (float64 for float64), members in their order.
#ifndef TOME_MERGE_INL
#define TOME_MERGE_INL

#include "simd.inl"

namespace tome::TOME_ISA_NAMESPACE {

// Vectors of a row that are summed side by side: enough to hide the latency of the loads, few
// enough to stay in registers.
constexpr int kUnroll = 4;

// Members of a row that are summed in one chain. A longer row is a sum of such sums: in one chain
// of float32, 2^24 equal members are as far as a sum ever gets.
constexpr int64_t kChain = 4096;

// torch.amax's rule: NaN wins, whichever side it is on.
template <class V>
TOME_INLINE V maximum(V a, V b) {
    return select<V>((a > b) | (a != a), a, b);
}

// Calls add(into, m) for members 1 to count - 1, where member 0 is in `sums` already, so that they
// end up there.
//   kLong   a sum of chains; else in one
template <bool kLong, class V, int kCount, class Add>
TOME_INLINE void add_members(int64_t count, V (&sums)[kCount], const Add& add) {
    const int64_t end = kLong ? kChain : count;
    for (int64_t m = 1; m < end; ++m) add(sums, m);
    for (int64_t begin = end; kLong && begin < count; begin += kChain) {
        V chain[kCount] = {};
        const int64_t next = std::min(count, begin + kChain);
        for (int64_t m = begin; m < next; ++m) add(chain, m);
        for (int u = 0; u < kCount; ++u) sums[u] += chain[u];
    }
}

// out[0, channels) = sum over members of weight[m] * x[m], over `divisor`; or their maximum.
//   members (count)          tokens
//   weight  (tokens) float   nullptr: every weight is 1
//   kLong                    of more than kChain members
template <class In, bool kMaximum, bool kLong>
void reduce_row_of(const In* x, int64_t stride_token, int64_t channels, const int32_t* members,
                   int64_t count, const float* weight, typename Accumulate<In>::Type divisor,
                   In* out) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;

    const auto combine = [&](V sum, V value, int64_t m) TOME_INLINE_LAMBDA {
        if (kMaximum) return maximum(value, sum);
        return sum + value * broadcast<V>(weight == nullptr ? T(1) : T(weight[members[m]]));
    };
    const auto first = [&](V value) TOME_INLINE_LAMBDA {
        return kMaximum ? value
                        : value * broadcast<V>(weight == nullptr ? T(1) : T(weight[members[0]]));
    };
    // The half types round far coarser than a product with the reciprocal does.
    constexpr bool kReciprocal = sizeof(In) == 2;
    const V by = broadcast<V>(kReciprocal ? 1 / divisor : divisor);
    const bool divide = !kMaximum && divisor != 1;
    const auto scale = [&](V sum) TOME_INLINE_LAMBDA {
        if (!divide) return sum;
        return kReciprocal ? sum * by : sum / by;
    };

    int64_t c = 0;
    for (; c + kUnroll * kLanes <= channels; c += kUnroll * kLanes) {
        V sum[kUnroll];
        const In* row = x + members[0] * stride_token + c;
        for (int u = 0; u < kUnroll; ++u) sum[u] = first(load(row + u * kLanes));
        add_members<kLong>(count, sum, [&](auto& into, int64_t m) TOME_INLINE_LAMBDA {
            row = x + members[m] * stride_token + c;
            for (int u = 0; u < kUnroll; ++u) into[u] = combine(into[u], load(row + u * kLanes), m);
        });
        for (int u = 0; u < kUnroll; ++u) store(out + c + u * kLanes, scale(sum[u]));
    }
    for (; c < channels; c += kLanes) {
        const int64_t part = channels - c < kLanes ? channels - c : kLanes;
        V sum[1] = {first(load_part(x + members[0] * stride_token + c, part))};
        add_members<kLong>(count, sum, [&](auto& into, int64_t m) TOME_INLINE_LAMBDA {
            into[0] = combine(into[0], load_part(x + members[m] * stride_token + c, part), m);
        });
        store_part(out + c, scale(sum[0]), part);
    }
}

template <class In, bool kMaximum>
void reduce_row(const In* x, int64_t stride_token, int64_t channels, const int32_t* members,
                int64_t count, const float* weight, typename Accumulate<In>::Type divisor,
                In* out) {
    const auto reduce = !kMaximum && count > kChain ? reduce_row_of<In, kMaximum, !kMaximum>
                                                    : reduce_row_of<In, kMaximum, false>;
    reduce(x, stride_token, channels, members, count, weight, divisor, out);
}

// In double: float32 stops counting at 2^24.
template <class T>
T total_size(const float* size, const int32_t* members, int64_t count) {
    if (size == nullptr) return T(count);
    double total = 0;
    for (int64_t m = 0; m < count; ++m) total += double{size[members[m]]};
    return T(total);
}

template <class In>
void merge_rows_of(const MergeParams& p, int64_t begin, int64_t end) {
    using T = typename Accumulate<In>::Type;
    const int64_t row_bytes = p.channels * static_cast<int64_t>(sizeof(In));
    for (int64_t flat = begin; flat < end; ++flat) {
        const int64_t b = flat / p.rows;
        const int64_t row = flat % p.rows;
        const In* x = static_cast<const In*>(p.x) + b * p.stride_batch;
        const int32_t* offsets = p.offsets + b * (p.rows + 1) + row;
        const int32_t* members = p.members + b * p.tokens + offsets[0];
        const float* size = p.size == nullptr ? nullptr : p.size + b * p.tokens;
        const int64_t count = offsets[1] - offsets[0];
        In* out = static_cast<In*>(p.out) + flat * p.channels;

        const T total = total_size<T>(size, members, count);
        p.out_size[flat] = static_cast<float>(total);

        const bool scaled = p.reduce == Reduce::kSum && total != T(count);
        if (count == 0) {
            clear_row(out, row_bytes);
        } else if (count == 1 && !scaled) {
            copy_row(out, x + members[0] * p.stride_token, row_bytes);
        } else if (p.reduce == Reduce::kAmax) {
            reduce_row<In, true>(x, p.stride_token, p.channels, members, count, nullptr, T(1), out);
        } else if (p.reduce == Reduce::kSum) {
            reduce_row<In, false>(x, p.stride_token, p.channels, members, count, size, T(1), out);
        } else if (total == 0) {  // padding: nothing says how to weigh it, but it stays finite
            reduce_row<In, false>(x, p.stride_token, p.channels, members, count, nullptr, T(count),
                                  out);
        } else {
            reduce_row<In, false>(x, p.stride_token, p.channels, members, count, size, total, out);
        }
    }
}

// out[member] = grad[row] * weight, for every member of the rows [begin, end).
template <class In>
void merge_backward_rows_of(const MergeBackwardParams& p, int64_t begin, int64_t end) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    for (int64_t flat = begin; flat < end; ++flat) {
        const int64_t b = flat / p.rows;
        const int64_t row = flat % p.rows;
        const int32_t* offsets = p.offsets + b * (p.rows + 1) + row;
        const int32_t* members = p.members + b * p.tokens + offsets[0];
        const float* size = p.size == nullptr ? nullptr : p.size + b * p.tokens;
        const int64_t count = offsets[1] - offsets[0];
        const In* grad = static_cast<const In*>(p.grad) + b * p.stride_batch + row * p.stride_row;

        const T total = total_size<T>(size, members, count);
        for (int64_t m = 0; m < count; ++m) {
            In* out = static_cast<In*>(p.out) + (b * p.tokens + members[m]) * p.channels;
            T weight = size == nullptr ? T(1) : T(size[members[m]]);
            if (p.reduce == Reduce::kMean) {
                weight = count == 1 ? T(1) : total == 0 ? T(1) / T(count) : weight / total;
            }
            if (weight == 1) {
                copy_row(out, grad, p.channels * static_cast<int64_t>(sizeof(In)));
                continue;
            }
            const V by = broadcast<V>(weight);
            int64_t c = 0;
            for (; c + kLanes <= p.channels; c += kLanes) store(out + c, load(grad + c) * by);
            if (c < p.channels) {
                const int64_t part = p.channels - c;
                store_part(out + c, load_part(grad + c, part) * by, part);
            }
        }
    }
}

void merge_rows(const MergeParams& params, int64_t begin, int64_t end) {
    switch (params.dtype) {
        case DType::kFloat32:
            return merge_rows_of<float>(params, begin, end);
        case DType::kFloat16:
            return merge_rows_of<Half>(params, begin, end);
        case DType::kBFloat16:
            return merge_rows_of<BFloat>(params, begin, end);
        case DType::kFloat64:
            return merge_rows_of<double>(params, begin, end);
    }
}

void merge_backward_rows(const MergeBackwardParams& params, int64_t begin, int64_t end) {
    switch (params.dtype) {
        case DType::kFloat32:
            return merge_backward_rows_of<float>(params, begin, end);
        case DType::kFloat16:
            return merge_backward_rows_of<Half>(params, begin, end);
        case DType::kBFloat16:
            return merge_backward_rows_of<BFloat>(params, begin, end);
        case DType::kFloat64:
            return merge_backward_rows_of<double>(params, begin, end);
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_MERGE_INL
