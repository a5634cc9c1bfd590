// Arrays on the host: any dtype, random values, and tensors that lie somewhere in memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tome_core/tome_core.h"

namespace gpu_check {

using tome::DType;

inline double decode_half(uint16_t bits) {
    const double sign = bits >> 15 ? -1.0 : 1.0;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(fraction + 1024, exponent - 25);
}

// To nearest, ties to even. No finite input here is too large for float16.
inline uint16_t encode_half(double value) {
    if (std::isnan(value)) return 0x7e00;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) return static_cast<uint16_t>(sign | 0x7c00);
    const double size = std::fabs(value);
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    const int bits = (exponent + 14) * 1024 + units;
    return static_cast<uint16_t>(sign | std::min(bits, 0x7c00));
}

inline uint16_t encode_bfloat(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double load(DType dtype, const void* data, int64_t i) {
    switch (dtype) {
        case DType::kFloat32:
            return static_cast<const float*>(data)[i];
        case DType::kFloat16:
            return decode_half(static_cast<const uint16_t*>(data)[i]);
        case DType::kBFloat16:
            return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(data)[i]} << 16);
        case DType::kFloat64:
            break;
    }
    return static_cast<const double*>(data)[i];
}

class Array {
  public:
    Array(DType dtype, int64_t count)
        : dtype_(dtype),
          count_(count),
          bytes_(static_cast<size_t>(std::max<int64_t>(count, 1) * tome::element_size(dtype))) {}

    DType dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    size_t bytes() const { return bytes_.size(); }
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    void* at(int64_t i) { return bytes_.data() + i * tome::element_size(dtype_); }
    double operator[](int64_t i) const { return load(dtype_, data(), i); }

    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::kFloat32:
                reinterpret_cast<float*>(bytes_.data())[i] = static_cast<float>(value);
                return;
            case DType::kFloat16:
                reinterpret_cast<uint16_t*>(bytes_.data())[i] = encode_half(value);
                return;
            case DType::kBFloat16:
                reinterpret_cast<uint16_t*>(bytes_.data())[i] =
                    encode_bfloat(static_cast<float>(value));
                return;
            case DType::kFloat64:
                reinterpret_cast<double*>(bytes_.data())[i] = value;
                return;
        }
    }

    // The same values in the dtype that references are computed in.
    Array exact() const {
        const bool wide = dtype_ == DType::kFloat64;
        Array out(wide ? DType::kFloat64 : DType::kFloat32, count_);
        for (int64_t i = 0; i < count_; ++i) out.set(i, (*this)[i]);
        return out;
    }

  private:
    DType dtype_;
    int64_t count_;
    std::vector<unsigned char> bytes_;
};

using Ints = std::vector<int32_t>;
using Floats = std::vector<float>;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % uint64_t(limit)); }
    // Four uniform numbers added: near enough to a normal one, mean 0 and variance 1.
    double normal() {
        const uint64_t b = bits();
        const auto sum = (b & 0xffff) + (b >> 16 & 0xffff) + (b >> 32 & 0xffff) + (b >> 48);
        return (static_cast<double>(sum) / 65536.0 - 2.0) * 1.7320508;
    }

  private:
    uint64_t state_;
};

// A (batch, heads, tokens, dim) tensor somewhere in memory, with NaN wherever it is not.
struct Heads {
    Array memory;
    int64_t offset;
    tome::HeadStrides strides;
};

// One of three in qkv, contiguous, off 16 bytes; of attention also each of its tensors another.
enum class Layout { kPacked, kHeads, kOdd, kMixed };

inline Heads random_heads(DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                          Layout layout, Random& random) {
    const int64_t row = layout == Layout::kOdd ? dim + 3 : dim;
    const int64_t parts = layout == Layout::kPacked ? 3 : 1;
    Heads t{Array(dtype, batch * tokens * heads * parts * row + 1), 0, {}};
    if (layout == Layout::kPacked) {
        t.strides = {tokens * 3 * heads * row, row, 3 * heads * row};
        t.offset = heads * row;
    } else {
        t.strides = {heads * tokens * row, tokens * row, row};
        t.offset = layout == Layout::kOdd ? 1 : 0;
    }
    for (int64_t i = 0; i < t.memory.count(); ++i) t.memory.set(i, std::nan(""));
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t n = 0; n < tokens; ++n) {
                const int64_t at =
                    t.offset + b * t.strides.batch + h * t.strides.head + n * t.strides.token;
                for (int64_t d = 0; d < dim; ++d) t.memory.set(at + d, random.normal());
            }
        }
    }
    return t;
}

inline Array random_array(DType dtype, int64_t count, Random& random) {
    Array out(dtype, count);
    for (int64_t i = 0; i < count; ++i) out.set(i, random.normal());
    return out;
}

// The relative error of rounding to dtype.
inline double roundoff(DType dtype) {
    return dtype == DType::kFloat16    ? 0x1p-11
           : dtype == DType::kBFloat16 ? 0x1p-8
           : dtype == DType::kFloat32  ? 0x1p-24
                                       : 0x1p-53;
}

}  // namespace gpu_check
