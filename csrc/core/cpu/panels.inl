// What match and attention multiply with: a few rows at a time against panels of packed columns.
//
//                    panels, (depth, kPanel) each
//                 +--------+--------+--------+
//   rows          | panel  | panel  | panel  |       kTileRows rows of the left matrix pass over
//   +------+      |        |        |        |       all panels; the sums of one panel live in
//   | tile | x    |        |        |        |       registers.
//   +------+      +--------+--------+--------+
//   (kTileRows, depth)
//
// Every sum is one chain of multiply-adds over depth, whatever tile or panel it falls in.
#ifndef TOME_PANELS_INL
#define TOME_PANELS_INL

#include "simd.inl"

namespace tome::TOME_ISA_NAMESPACE {

constexpr int kTileRows = TOME_TILE_ROWS;
constexpr int kPanelVectors = 2;

template <class T>
constexpr int64_t kPanel = kPanelVectors * Vector<T>::kLanes;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// A vector's lanes made one by halves: lane i with lane i + half.
template <class V, class Join>
TOME_INLINE auto by_halves(V v, const Join& join) {
    constexpr int kLanes = sizeof(V) / sizeof(v[0]);
    decltype(v[0] + v[0]) lanes[kLanes];
    __builtin_memcpy(lanes, &v, sizeof(v));
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
    }
    return lanes[0];
}

#ifdef TOME_X86_VECTORS
// The same in registers.
template <class Join>
TOME_INLINE float by_halves(VFloat v, const Join& join) {
#if TOME_VECTOR_BYTES == 64
    const auto whole = bit_cast<__m512>(v);
    const __m256 half = join(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
    const auto half = bit_cast<__m256>(v);
#endif
    const __m128 four = join(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = join(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(join(two, _mm_movehdup_ps(two)));
}

template <class Join>
TOME_INLINE int32_t by_halves(VInt v, const Join& join) {
    typedef int32_t Eight __attribute__((vector_size(32)));
    typedef int32_t Four __attribute__((vector_size(16)));
#if TOME_VECTOR_BYTES == 64
    const auto whole = bit_cast<__m512i>(v);
    const auto eight = join(bit_cast<Eight>(_mm512_castsi512_si256(whole)),
                            bit_cast<Eight>(_mm512_extracti32x8_epi32(whole, 1)));
#else
    const auto eight = bit_cast<Eight>(v);
#endif
    const auto half = bit_cast<__m256i>(eight);
    const auto four = join(bit_cast<Four>(_mm256_castsi256_si128(half)),
                           bit_cast<Four>(_mm256_extracti128_si256(half, 1)));
    const auto two = join(four, bit_cast<Four>(_mm_shuffle_epi32(bit_cast<__m128i>(four), 0x4e)));
    return join(two, bit_cast<Four>(_mm_shuffle_epi32(bit_cast<__m128i>(two), 0xb1)))[0];
}
#endif

template <class V>
TOME_INLINE auto total(V v) {
    return by_halves(v, [](auto x, auto y) TOME_INLINE_LAMBDA { return x + y; });
}

// None of the lanes may be NaN.
template <class V>
TOME_INLINE auto largest(V v) {
    return by_halves(v, [](auto x, auto y) TOME_INLINE_LAMBDA { return x > y ? x : y; });
}

template <class V>
TOME_INLINE auto smallest(V v) {
    return by_halves(v, [](auto x, auto y) TOME_INLINE_LAMBDA { return x < y ? x : y; });
}

#if !defined(__clang__)
// A square of lanes x lanes values, in place: log2(lanes) rounds of interleaving vector i with
// vector i + lanes/2.
template <class T>
TOME_INLINE void transpose_square(typename Vector<T>::Type (&square)[Vector<T>::kLanes]) {
    using V = typename Vector<T>::Type;
    using Int = typename Vector<T>::Int;
    constexpr int kLanes = Vector<T>::kLanes;
    Int low{}, high{};
    for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = lane / 2 + lane % 2 * kLanes;
        high[lane] = low[lane] + kLanes / 2;
    }
    for (int round = 1; round < kLanes; round *= 2) {
        V next[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = __builtin_shuffle(square[i], square[i + kLanes / 2], low);
            next[2 * i + 1] = __builtin_shuffle(square[i], square[i + kLanes / 2], high);
        }
        for (int i = 0; i < kLanes; ++i) square[i] = next[i];
    }
}
#endif

// The sum of each of kLanes vectors, as one vector.
template <class T>
TOME_INLINE typename Vector<T>::Type totals(typename Vector<T>::Type (&rows)[Vector<T>::kLanes]) {
    typename Vector<T>::Type sum{};
#if !defined(__clang__)
    transpose_square<T>(rows);
    for (int i = 0; i < Vector<T>::kLanes; ++i) sum += rows[i];
#else
    for (int i = 0; i < Vector<T>::kLanes; ++i) sum[i] = total(rows[i]);
#endif
    return sum;
}

// rows (lanes, depth), row_step apart -> out (depth, kPanel): each row becomes a column.
template <class T>
void transpose_into_panel(const T* rows, int64_t row_step, int64_t depth, T* out) {
    constexpr int kLanes = Vector<T>::kLanes;
    int64_t d = 0;
#if !defined(__clang__)
    for (; d + kLanes <= depth; d += kLanes) {
        typename Vector<T>::Type square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(rows + i * row_step + d);
        transpose_square<T>(square);
        for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kPanel<T>, square[i]);
    }
#endif
    for (; d < depth; ++d) {
        for (int i = 0; i < kLanes; ++i) out[d * kPanel<T> + i] = rows[i * row_step + d];
    }
}

// --- packing ---

// What rows and panels hold, P, is the type of the sums, or packs several values of In that one
// instruction multiplies and adds up; bfloat_pairs.inl has such a type.
template <class In>
struct Packed {
    using Type = typename Accumulate<In>::Type;
};
template <class P>
constexpr int64_t kValuesIn = 1;

// How many P hold that many values along the depth of a product.
template <class P>
constexpr int64_t depth_of(int64_t values) {
    return (values + kValuesIn<P> - 1) / kValuesIn<P>;
}

// One (row, channels) vector at a time, the last one partial: dim need not be a multiple of lanes.
template <class T, class In>
TOME_INLINE typename Vector<T>::Type load_channels(const In* row, int64_t d, int64_t dim) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    return d + kLanes <= dim ? load(row + d) : load_part(row + d, std::max<int64_t>(0, dim - d));
}

template <class In, class V>
TOME_INLINE void store_channels(In* row, int64_t d, int64_t dim, V value) {
    constexpr int64_t kLanes = sizeof(V) / sizeof(value[0]);
    if (d + kLanes <= dim) {
        store(row + d, value);
    } else if (d < dim) {
        store_part(row + d, value, dim - d);
    }
}

// rows (count, dim), row_step apart -> out (count, dim) in the accumulate type.
template <class In, class T>
void widen_rows(const In* rows, int64_t row_step, int64_t count, int64_t dim, T* out) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < dim; d += Vector<T>::kLanes) {
            store_channels(out + i * dim, d, dim, load_channels<T>(rows + i * row_step, d, dim));
        }
    }
}

// rows (count, dim) -> out (row panels, depth, kPanel): transposed, zeros behind the last row.
//   spare (lanes, depth)
template <class In, class T>
void pack_columns(const In* rows, int64_t row_step, int64_t count, int64_t dim, T* spare, T* out) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const int64_t depth = depth_of<T>(dim);
    for (int64_t first = 0; first < round_up(count, kPanel<T>); first += kLanes) {
        T* to = out + first / kPanel<T> * kPanel<T> * depth + first % kPanel<T>;
        const int64_t here = std::min(kLanes, count - first);
        if (std::is_same_v<In, T> && here == kLanes) {
            transpose_into_panel(reinterpret_cast<const T*>(rows + first * row_step), row_step, dim,
                                 to);
            continue;
        }
        if (here > 0) widen_rows(rows + first * row_step, row_step, here, dim, spare);
        const int64_t rest = std::max<int64_t>(0, here) * depth;
        std::fill(spare + rest, spare + kLanes * depth, T{});
        transpose_into_panel(spare, depth, depth, to);
    }
}

// rows (count, dim) -> out (channel panels, count, kPanel): zeros behind the last channel.
template <class In, class T>
void pack_rows(const In* rows, int64_t row_step, int64_t count, int64_t dim, T* out) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < round_up(dim, kPanel<T>); d += kLanes) {
            T* to = out + (d / kPanel<T> * count + i) * kPanel<T> + d % kPanel<T>;
            store(to, load_channels<T>(rows + i * row_step, d, dim));
        }
    }
}

// kLanes values from value j of a row on, as the left factor of a product.
template <class T, class V>
TOME_INLINE void store_packed(T* row, int64_t j, V values) {
    store(row + j, values);
}

// --- multiplying ---

// What a sum is with the products of two vectors of P.
template <class P>
struct MultiplyAdd {
    using V = typename Vector<P>::Type;
    static TOME_INLINE V of(V sum, V a, V b) { return sum + a * b; }
};

// As `= {}`, but in registers: GCC clears an array of this size in memory, by a string instruction.
template <int kRows, int kVectors, class V>
TOME_INLINE void clear(V (&sum)[kRows][kVectors]) {
    for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] = V{};
    }
}

// sum (kRows, kVectors) += rows x panel.
//   rows   element (i, d) at i * row_step + d * step
//   panel  (depth, kPanel)
template <class P, int kRows, int kVectors, class V>
TOME_INLINE void multiply_panel(const P* rows, int64_t row_step, int64_t step, const P* panel,
                                int64_t depth, V (&sum)[kRows][kVectors]) {
    using Factor = typename Vector<P>::Type;
    for (int64_t d = 0; d < depth; ++d) {
        Factor b[kVectors];
        for (int v = 0; v < kVectors; ++v)
            b[v] = load(panel + d * kPanel<P> + v * Vector<P>::kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Factor value = broadcast_of(rows[i * row_step + d * step]);
            for (int v = 0; v < kVectors; ++v) {
                sum[i][v] = MultiplyAdd<P>::of(sum[i][v], value, b[v]);
            }
        }
    }
}

// Calls body with `rows` as a constant: a short last tile runs the code for exactly that many rows,
// and costs what it holds.
template <int kRows, class Body>
TOME_INLINE void with_rows(int64_t rows, const Body& body) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return with_rows<kRows - 1>(rows, body);
    }
    body(std::integral_constant<int, kRows>{});
}

// --- exponentials ---

// 2^x of x <= 0 to within two units in the last place, NaN for NaN; what is below 2^-125 may be 0.
TOME_INLINE VFloat exp2_of_nonpositive(VFloat x) {
#if defined(TOME_X86_VECTORS) && TOME_VECTOR_BYTES == 64
    // x is its floor and a rest of 0 to 1; vscalef multiplies by 2 to the floor, and knows -inf.
    const auto rest =
        bit_cast<VFloat>(_mm512_reduce_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
    // As below: 1.9e-9 before rounding.
    VFloat y = rest * 2.1702255e-4f + 1.2439688e-3f;
    y = y * rest + 9.678841e-3f;
    y = y * rest + 5.5483341e-2f;
    y = y * rest + 2.4022983e-1f;
    y = y * rest + 6.93147e-1f;
    y = y * rest + 1.0f;
    return bit_cast<VFloat>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(x)));
#else
    // Adding 1.5 * 2^23 rounds to a whole number, which lies in the low bits of the sum.
    const VFloat shifted = x + 12582912.0f;
    const VFloat f = x - (shifted - 12582912.0f);  // -0.5 to 0.5
    // The polynomial of least relative error there, 1.9e-9 before rounding (Lawson's iteration).
    VFloat y = f * 1.5345812e-4f + 1.3399931e-3f;
    y = y * f + 9.618489e-3f;
    y = y * f + 5.5503286e-2f;
    y = y * f + 2.4022646e-1f;
    y = y * f + 6.931472e-1f;
    y = y * f + 1.0f;
    const VFloat scaled = bit_cast<VFloat>(bit_cast<VUint>(y) + (bit_cast<VUint>(shifted) << 23));
    const VUint tiny = bit_cast<VUint>(x < -125.0f);
    const VFloat flushed = bit_cast<VFloat>(bit_cast<VUint>(scaled) & ~tiny);
    return select<VFloat>(bit_cast<VUint>(x == x), flushed, x);
#endif
}

// For gradient checks, not for speed.
TOME_INLINE VDouble exp2_of_nonpositive(VDouble x) {
    for (int lane = 0; lane < Vector<double>::kLanes; ++lane) x[lane] = std::exp2(x[lane]);
    return x;
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_PANELS_INL
