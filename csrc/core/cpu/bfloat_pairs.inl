// Products of bfloat16 as AVX512-BF16 takes them: two neighbours along the depth of a product lie
// in one 32-bit lane, and one instruction multiplies both with those of the other factor and adds
// the products, which are exact, to a float32 sum: twice the work of a multiply-add.
//
//   queries  q0 q1 | q2 q3 | ...      keys, as columns    k0 k1 of key 0 | k0 k1 of key 1 | ...
//   weights  of keys 0 1 | 2 3 | ...  values, as rows     channel 0 of keys 0 1 | channel 1 | ...
//
// Subnormal values count as 0 there.
#ifndef TOME_BFLOAT_PAIRS_INL
#define TOME_BFLOAT_PAIRS_INL

#include "panels.inl"

namespace tome::TOME_ISA_NAMESPACE {

static_assert(TOME_VECTOR_BYTES == 64, "AVX512-BF16 is used with its widest vectors");

struct BFloatPair {
    uint32_t bits;  // the first value in the low half, as in memory
};

template <>
struct Vector<BFloatPair> {
    using Type = VUint;
    using Int = Vector<float>::Int;
    static constexpr int kLanes = Vector<float>::kLanes;
};

template <>
struct Packed<BFloat> {
    using Type = BFloatPair;
};
template <>
constexpr int64_t kValuesIn<BFloatPair> = 2;

TOME_INLINE VUint load(const BFloatPair* p) { return load_raw<VUint>(p); }
TOME_INLINE void store(BFloatPair* p, VUint v) { __builtin_memcpy(p, &v, sizeof(v)); }
TOME_INLINE VUint broadcast_of(BFloatPair pair) { return broadcast<VUint>(pair.bits); }

template <>
struct MultiplyAdd<BFloatPair> {
    static TOME_INLINE VFloat of(VFloat sum, VUint a, VUint b) {
        return bit_cast<VFloat>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
    }
};

// kLanes values, rounded to the nearest, from value j of a row of pairs on.
TOME_INLINE void store_packed(BFloatPair* row, int64_t j, VFloat values) {
    store(reinterpret_cast<BFloat*>(row) + j, values);
}

// As that of panels.inl, with pairs along the channels and a 0 behind an odd last one.
inline void widen_rows(const BFloat* rows, int64_t row_step, int64_t count, int64_t dim,
                       BFloatPair* out) {
    const int64_t pairs = depth_of<BFloatPair>(dim);
    for (int64_t i = 0; i < count; ++i, out += pairs) {
        if (dim % 2 != 0) out[pairs - 1].bits = 0;
        copy_row(out, rows + i * row_step, dim * static_cast<int64_t>(sizeof(BFloat)));
    }
}

// As that of panels.inl, with pairs along the rows.
inline void pack_rows(const BFloat* rows, int64_t row_step, int64_t count, int64_t dim,
                      BFloatPair* out) {
    constexpr int64_t kLanes = Vector<BFloatPair>::kLanes;
    constexpr int64_t kColumns = kPanel<BFloatPair>;
    const int64_t pairs = depth_of<BFloatPair>(count);
    // The bits of float32 are those of bfloat16 in the upper half.
    const auto upper = [&](const BFloat* row, int64_t d) TOME_INLINE_LAMBDA {
        return bit_cast<VUint>(load_channels<float>(row, d, dim));
    };
    for (int64_t i = 0; i < pairs; ++i) {
        const BFloat* row = rows + 2 * i * row_step;
        for (int64_t d = 0; d < round_up(dim, kColumns); d += kLanes) {
            VUint both = upper(row, d) >> 16;
            if (2 * i + 1 < count) both |= upper(row + row_step, d);
            store(out + (d / kColumns * pairs + i) * kColumns + d % kColumns, both);
        }
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_BFLOAT_PAIRS_INL
