// A residual sum, its merge and the norm of that, a row at a time: what the later steps of a row
// read again is still in the core's own cache, so that memory is read once and written once.
#ifndef TOME_MERGE_ADD_NORM_INL
#define TOME_MERGE_ADD_NORM_INL

#include "merge.inl"
#include "panels.inl"

namespace tome::TOME_ISA_NAMESPACE {

// The tokens that make one row.
template <class In>
struct AddedTokens {
    using T = typename Accumulate<In>::Type;

    const In *x, *branch;  // of one image
    int64_t x_stride, branch_stride;
    const T* scale;          // (channels)
    const int32_t* members;  // (count)
    int64_t count;           // at least 1
    const float* weight;     // (tokens), or nullptr for ones
    T divisor;               // of their weighted sum
};

// `part` is kLanes, known when compiled, but in the last vector of a row.
template <class In>
TOME_INLINE auto load_up_to(const In* p, int64_t part) {
    return part == Vector<typename Accumulate<In>::Type>::kLanes ? load(p) : load_part(p, part);
}

template <class In, class V>
TOME_INLINE void store_up_to(In* p, V v, int64_t part) {
    if (part == sizeof(V) / sizeof(v[0])) {
        store(p, v);
    } else {
        store_part(p, v, part);
    }
}

// Runs body(c, part, n) over all channels: n = kUnroll vectors at a time, then one by one.
template <class T, class Body>
TOME_INLINE void over_channels(int64_t channels, const Body& body) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    constexpr std::integral_constant<int, 1> kOne;
    int64_t c = 0;
    for (; c + kUnroll * kLanes <= channels; c += kUnroll * kLanes) {
        body(c, kLanes, std::integral_constant<int, kUnroll>());
    }
    for (; c + kLanes <= channels; c += kLanes) body(c, kLanes, kOne);
    if (c < channels) body(c, channels - c, kOne);
}

template <class V>
TOME_INLINE auto total_of(const V (&sums)[kUnroll]) {
    static_assert(kUnroll == 4, "the sums are added in pairs");
    return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class In>
TOME_INLINE auto weight_of(const AddedTokens<In>& of, int64_t m) {
    using T = typename Accumulate<In>::Type;
    return of.weight == nullptr ? T(1) : T(of.weight[of.members[m]]);
}

// sum = the weighted sum of x + scale * branch, in channels [c, c + part) of each vector.
//   kSingle   there is one token, of weight 1
//   kLong     there are more than kChain
template <bool kSingle, bool kLong, class In, class V, int kCount>
TOME_INLINE void add_tokens(const AddedTokens<In>& of, int64_t c, int64_t part, V (&sum)[kCount]) {
    constexpr int64_t kLanes = sizeof(V) / sizeof(sum[0][0]);
    V scale[kCount];
    for (int u = 0; u < kCount; ++u) scale[u] = load_up_to(of.scale + c + u * kLanes, part);
    const auto added = [&](int64_t m, int u) TOME_INLINE_LAMBDA {
        const In* x = of.x + of.members[m] * of.x_stride;
        const In* branch = of.branch + of.members[m] * of.branch_stride;
        return load_up_to(x + c + u * kLanes, part) +
               scale[u] * load_up_to(branch + c + u * kLanes, part);
    };
    for (int u = 0; u < kCount; ++u) sum[u] = added(0, u);
    if (kSingle) return;
    for (int u = 0; u < kCount; ++u) sum[u] *= broadcast<V>(weight_of(of, 0));
    add_members<kLong>(of.count, sum, [&](auto& into, int64_t m) TOME_INLINE_LAMBDA {
        for (int u = 0; u < kCount; ++u) into[u] += added(m, u) * broadcast<V>(weight_of(of, m));
    });
}

// The sum of squares of that sum.
template <bool kSingle, bool kLong, class In>
TOME_INLINE auto squares_of(const AddedTokens<In>& of, int64_t channels) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    V totals[kUnroll] = {};
    over_channels<T>(channels, [&](int64_t c, int64_t part, auto n) TOME_INLINE_LAMBDA {
        V sum[n];
        add_tokens<kSingle, kLong>(of, c, part, sum);
        for (int u = 0; u < n; ++u) totals[u] += sum[u] * sum[u];
    });
    return total_of(totals);
}

// By what the mean of several tokens is multiplied to be as long as they are on average; 1 where
// that isn't finite, as of tokens that cancel out.
template <class In, bool kLong>
typename Accumulate<In>::Type stretch_of(const AddedTokens<In>& of, int64_t channels) {
    using T = typename Accumulate<In>::Type;
    double lengths = 0;
    for (int64_t m = 0; m < of.count; ++m) {
        AddedTokens<In> one = of;
        one.members += m;
        lengths += double(weight_of(of, m)) * std::sqrt(squares_of<true, false>(one, channels));
    }
    const T stretch = T(lengths) / std::sqrt(squares_of<false, kLong>(of, channels));
    return std::isfinite(stretch) ? stretch : T(1);
}

// out = stretch * the weighted mean of x + scale * branch. Returns the sum of what was stored.
//   kSingle, kLong   as above; a single token has divisor and stretch 1
template <class In, bool kSingle, bool kLong>
typename Accumulate<In>::Type merge_sums(const AddedTokens<In>& of, int64_t channels,
                                         typename Accumulate<In>::Type stretch, In* out) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const V divisor = broadcast<V>(of.divisor), factor = broadcast<V>(stretch);
    V totals[kUnroll] = {};
    over_channels<T>(channels, [&](int64_t c, int64_t part, auto n) TOME_INLINE_LAMBDA {
        V sum[n];
        add_tokens<kSingle, kLong>(of, c, part, sum);
        for (int u = 0; u < n && !kSingle; ++u) sum[u] = sum[u] / divisor * factor;
        for (int u = 0; u < n; ++u) {
            In* to = out + c + u * kLanes;
            store_up_to(to, sum[u], part);
            totals[u] += load_up_to(to, part);
        }
    });
    return total_of(totals);
}

// The variance of a row around its mean.
template <class In>
typename Accumulate<In>::Type variance_of(const In* row, int64_t channels,
                                          typename Accumulate<In>::Type mean) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const V center = broadcast<V>(mean);
    V totals[kUnroll] = {};
    over_channels<T>(channels, [&](int64_t c, int64_t part, auto n) TOME_INLINE_LAMBDA {
        for (int u = 0; u < n; ++u) {
            V apart = load_up_to(row + c + u * kLanes, part) - center;
            if (part < kLanes) {  // lanes past the end of the row are not 0 any more
                apart = select<V>(lane_numbers<V>() < broadcast<V>(T(part)), apart, V{});
            }
            totals[u] += apart * apart;
        }
    });
    return total_of(totals) / T(channels);
}

template <class In>
void merge_add_norm_rows_of(const MergeAddNormParams& p, int64_t begin, int64_t end) {
    using T = typename Accumulate<In>::Type;
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const Scratch<T> scale(p.channels), weight(p.channels), bias(p.channels);
    const auto widen_or_fill = [&](const void* from, T missing, T* to) {
        if (from == nullptr) {
            std::fill_n(to, p.channels, missing);
        } else {
            widen_rows(static_cast<const In*>(from), 0, 1, p.channels, to);
        }
    };
    widen_or_fill(p.scale, 1, scale.get());
    widen_or_fill(p.weight, 1, weight.get());
    widen_or_fill(p.bias, 0, bias.get());
    for (int64_t flat = begin; flat < end; ++flat) {
        const int64_t b = flat / p.rows;
        const int32_t* offsets = p.offsets + b * (p.rows + 1) + flat % p.rows;
        const float* size = p.size == nullptr ? nullptr : p.size + b * p.tokens;
        AddedTokens<In> of{static_cast<const In*>(p.x) + b * p.x_stride_batch,
                           static_cast<const In*>(p.branch) + b * p.branch_stride_batch,
                           p.x_stride_token,
                           p.branch_stride_token,
                           scale.get(),
                           p.members + b * p.tokens + offsets[0],
                           offsets[1] - offsets[0],
                           size,
                           T(1)};
        In* out = static_cast<In*>(p.out) + flat * p.channels;
        of.divisor = total_size<T>(size, of.members, of.count);
        p.out_size[flat] = static_cast<float>(of.divisor);
        if (of.divisor == 0) {  // as in merge: padding stays finite
            of.weight = nullptr;
            of.divisor = T(of.count);
        }
        T sum = 0, stretch = 1;
        if (of.count == 0) {
            clear_row(out, p.channels * static_cast<int64_t>(sizeof(In)));
        } else if (of.count == 1) {
            sum = merge_sums<In, true, false>(of, p.channels, stretch, out);
        } else if (of.count <= kChain) {
            if (p.keep_norms) stretch = stretch_of<In, false>(of, p.channels);
            sum = merge_sums<In, false, false>(of, p.channels, stretch, out);
        } else {
            if (p.keep_norms) stretch = stretch_of<In, true>(of, p.channels);
            sum = merge_sums<In, false, true>(of, p.channels, stretch, out);
        }

        const T mean = sum / T(p.channels);
        const T spread = std::sqrt(variance_of(out, p.channels, mean) + T(p.eps));
        const V center = broadcast<V>(mean), inverse = broadcast<V>(1 / spread);
        In* normed = static_cast<In*>(p.normed) + flat * p.channels;
        over_channels<T>(p.channels, [&](int64_t c, int64_t part, auto n) TOME_INLINE_LAMBDA {
            for (int u = 0; u < n; ++u) {
                const int64_t at = c + u * kLanes;
                const V unit = (load_up_to(out + at, part) - center) * inverse;
                store_up_to(
                    normed + at,
                    unit * load_up_to(weight.get() + at, part) + load_up_to(bias.get() + at, part),
                    part);
            }
        });
    }
}

void merge_add_norm_rows(const MergeAddNormParams& params, int64_t begin, int64_t end) {
    switch (params.dtype) {
        case DType::kFloat32:
            return merge_add_norm_rows_of<float>(params, begin, end);
        case DType::kFloat16:
            return merge_add_norm_rows_of<Half>(params, begin, end);
        case DType::kBFloat16:
            return merge_add_norm_rows_of<BFloat>(params, begin, end);
        case DType::kFloat64:
            return merge_add_norm_rows_of<double>(params, begin, end);
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_MERGE_ADD_NORM_INL
