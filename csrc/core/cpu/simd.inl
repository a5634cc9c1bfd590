// Vectors of TOME_VECTOR_BYTES, on the compiler's vector extensions: one source for every
// instruction set. A translation unit holds one set (see kernels.h).
#ifndef TOME_SIMD_INL
#define TOME_SIMD_INL

#define TOME_INLINE inline __attribute__((always_inline))
// A lambda is a function of its own: without this it may be compiled apart from its caller.
#define TOME_INLINE_LAMBDA __attribute__((always_inline))

namespace tome::TOME_ISA_NAMESPACE {

// Storage types of the half formats. Arithmetic is in float32.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <class T>
struct Vector;

template <>
struct Vector<float> {
    typedef float Type __attribute__((vector_size(TOME_VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(TOME_VECTOR_BYTES)));
    typedef uint32_t Uint __attribute__((vector_size(TOME_VECTOR_BYTES)));
    typedef uint16_t Narrow __attribute__((vector_size(TOME_VECTOR_BYTES / 2)));
    static constexpr int kLanes = TOME_VECTOR_BYTES / 4;
};

template <>
struct Vector<double> {
    typedef double Type __attribute__((vector_size(TOME_VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(TOME_VECTOR_BYTES)));
    static constexpr int kLanes = TOME_VECTOR_BYTES / 8;
};

using VFloat = Vector<float>::Type;
using VDouble = Vector<double>::Type;
using VInt = Vector<float>::Int;
using VUint = Vector<float>::Uint;
using VNarrow = Vector<float>::Narrow;

// The type sums of `In` are taken in.
template <class In>
struct Accumulate {
    using Type = float;
};
template <>
struct Accumulate<double> {
    using Type = double;
};

template <class To, class From>
TOME_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V, class P>
TOME_INLINE V load_raw(const P* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

// --- loads: kLanes values widened to the accumulate type ---

TOME_INLINE VFloat load(const float* p) { return load_raw<VFloat>(p); }
TOME_INLINE VDouble load(const double* p) { return load_raw<VDouble>(p); }

// Between 16-bit and 32-bit lanes. The compilers' own conversion takes twice the instructions with
// AVX2: it goes through two half vectors.
TOME_INLINE VUint widen(VNarrow v) {
#if defined(TOME_X86_VECTORS) && TOME_VECTOR_BYTES == 32
    return bit_cast<VUint>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
    return __builtin_convertvector(v, VUint);
#endif
}

TOME_INLINE VNarrow narrow(VUint v) {
#if defined(TOME_X86_VECTORS) && TOME_VECTOR_BYTES == 32
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
    return bit_cast<VNarrow>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    return __builtin_convertvector(v, VNarrow);
#endif
}

TOME_INLINE VFloat load(const BFloat* p) {
    return bit_cast<VFloat>(widen(load_raw<VNarrow>(p)) << 16);
}

TOME_INLINE VFloat load(const Half* p) {
#ifdef TOME_X86_VECTORS
#if TOME_VECTOR_BYTES == 64
    return bit_cast<VFloat>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#else
    return bit_cast<VFloat>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#endif
#else
    const VUint bits = widen(load_raw<VNarrow>(p));
    const VUint magnitude = (bits & 0x7fffu) << 13;
    // Shifted into place the exponent is 112 short; the product also normalises subnormals.
    const VFloat scaled = bit_cast<VFloat>(magnitude) * 0x1p112f;
    const VUint finite = bit_cast<VUint>(scaled);
    const VUint infinite = magnitude | 0x7f800000u;
    const VUint is_finite = bit_cast<VUint>(magnitude < (0x7c00u << 13));
    return bit_cast<VFloat>((finite & is_finite) | (infinite & ~is_finite) |
                            ((bits & 0x8000u) << 16));
#endif
}

// --- stores: rounded to the nearest, ties to even ---

TOME_INLINE void store(float* p, VFloat v) { __builtin_memcpy(p, &v, sizeof(v)); }
TOME_INLINE void store(double* p, VDouble v) { __builtin_memcpy(p, &v, sizeof(v)); }

TOME_INLINE VNarrow round_to_bfloat(VFloat v) {
#if defined(TOME_X86_BF16)
    // Subnormal values become 0.
    return bit_cast<VNarrow>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
    const VUint bits = bit_cast<VUint>(v);
    const VUint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VUint is_number = bit_cast<VUint>(v == v);
    return narrow((rounded & is_number) | (0x7fc0u & ~is_number));
#endif
}

TOME_INLINE void store(BFloat* p, VFloat v) {
    const VNarrow out = round_to_bfloat(v);
    __builtin_memcpy(p, &out, sizeof(out));
}

TOME_INLINE void store(Half* p, VFloat v) {
#ifdef TOME_X86_VECTORS
#if TOME_VECTOR_BYTES == 64
    const __m256i out = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
#else
    const __m128i out = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
#endif
    __builtin_memcpy(p, &out, sizeof(out));
#else
    const VUint bits = bit_cast<VUint>(v);
    const VUint sign = bits & 0x80000000u;
    const VUint magnitude = bits ^ sign;
    // Normal halves: rebias the exponent and round on the 13 bits that go.
    const VUint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 leaves the half's value, rounded, in the low bits.
    const VUint subnormal = bit_cast<VUint>(bit_cast<VFloat>(magnitude) + 0.5f) - (126u << 23);
    const VUint special = 0x7c00u + (bit_cast<VUint>(magnitude > 0x7f800000u) & 0x200u);
    const VUint is_subnormal = bit_cast<VUint>(magnitude < (113u << 23));
    const VUint is_special = bit_cast<VUint>(magnitude >= (143u << 23));
    const VUint finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    const VUint result = (special & is_special) | (finite & ~is_special) | (sign >> 16);
    const VNarrow out = narrow(result);
    __builtin_memcpy(p, &out, sizeof(out));
#endif
}

// --- the last, partial vector of a row ---

// The first `count` (0 to kLanes) values, and zeros behind them.
template <class In>
TOME_INLINE auto load_part(const In* p, int64_t count) {
    In lanes[TOME_VECTOR_BYTES / sizeof(typename Accumulate<In>::Type)] = {};
    std::memcpy(static_cast<void*>(lanes), p, static_cast<size_t>(count) * sizeof(In));
    return load(lanes);
}

template <class In, class V>
TOME_INLINE void store_part(In* p, V v, int64_t count) {
    In lanes[TOME_VECTOR_BYTES / sizeof(typename Accumulate<In>::Type)];
    store(lanes, v);
    std::memcpy(static_cast<void*>(p), lanes, static_cast<size_t>(count) * sizeof(In));
}

#if defined(TOME_X86_VECTORS) && TOME_VECTOR_BYTES == 64
// The same without a way through memory.
TOME_INLINE __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << static_cast<unsigned>(count)) - 1);
}

TOME_INLINE VFloat load_part(const float* p, int64_t count) {
    return bit_cast<VFloat>(_mm512_maskz_loadu_ps(first_lanes(count), p));
}
TOME_INLINE VFloat load_part(const BFloat* p, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
    return bit_cast<VFloat>(widen(bit_cast<VNarrow>(bits)) << 16);
}
TOME_INLINE VFloat load_part(const Half* p, int64_t count) {
    return bit_cast<VFloat>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p)));
}

TOME_INLINE void store_part(float* p, VFloat v, int64_t count) {
    _mm512_mask_storeu_ps(p, first_lanes(count), bit_cast<__m512>(v));
}
TOME_INLINE void store_part(BFloat* p, VFloat v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), bit_cast<__m256i>(round_to_bfloat(v)));
}
TOME_INLINE void store_part(Half* p, VFloat v, int64_t count) {
    const __m256i out = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(p, first_lanes(count), out);
}
#endif

template <class V>
TOME_INLINE V broadcast(decltype(V{}[0] + V{}[0]) value) {
    return value - V{};  // x - 0 is x for every x, -0 included
}

TOME_INLINE VFloat broadcast_of(float value) { return broadcast<VFloat>(value); }
TOME_INLINE VDouble broadcast_of(double value) { return broadcast<VDouble>(value); }

// 0, 1, 2, ... : a constant by the time it runs.
template <class V>
TOME_INLINE V lane_numbers() {
    V v{};
    for (size_t lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) v[lane] = lane;
    return v;
}

template <class V, class M>
TOME_INLINE V select(M mask, V yes, V no) {
    return bit_cast<V>((bit_cast<M>(yes) & mask) | (bit_cast<M>(no) & ~mask));
}

// The larger of each lane's two; `other` where x is not a number.
TOME_INLINE VFloat larger(VFloat x, VFloat other) {
#if defined(TOME_X86_VECTORS) && TOME_VECTOR_BYTES == 64
    return bit_cast<VFloat>(_mm512_max_ps(bit_cast<__m512>(x), bit_cast<__m512>(other)));
#elif defined(TOME_X86_VECTORS)
    return bit_cast<VFloat>(_mm256_max_ps(bit_cast<__m256>(x), bit_cast<__m256>(other)));
#else
    return select<VFloat>(bit_cast<VUint>(x > other), x, other);
#endif
}
TOME_INLINE VDouble larger(VDouble x, VDouble other) {
    return select<VDouble>(bit_cast<Vector<double>::Int>(x > other), x, other);
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_SIMD_INL
