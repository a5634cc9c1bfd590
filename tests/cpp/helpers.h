// What the C++ tests share: arrays of every dtype, instruction sets, threads, and plan building.
// Nothing here uses the code under test for what it checks.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <ostream>
#include <random>
#include <stdexcept>
#include <vector>

#include "tome_core/thread_pool.h"
#include "tome_core/tome_core.h"

namespace tome {

inline const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kFloat16:
            return "float16";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kFloat64:
            break;
    }
    return "float64";
}

// What GoogleTest prints; it looks in the type's own namespace.
inline void PrintTo(DType dtype, std::ostream* out) { *out << dtype_name(dtype); }

}  // namespace tome

namespace tome_test {

using tome::DType;
using tome::dtype_name;
using tome::Isa;
using tome::Threads;

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();

// --- 16-bit floats: `mantissa` stored bits, exponents around `bias`
// --------------------------------

struct Format16 {
    int mantissa, bias;
};
inline constexpr Format16 kHalf{10, 15}, kBFloat{7, 127};

inline double decode16(uint16_t bits, Format16 f) {
    const double sign = bits >> 15 ? -1.0 : 1.0;
    const int exponent = (bits & 0x7fff) >> f.mantissa;
    const int fraction = bits & ((1 << f.mantissa) - 1);
    if (exponent == (0x7fff >> f.mantissa)) return fraction ? kNaN : sign * kInf;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias - f.mantissa);
    return sign * std::ldexp(fraction + (1 << f.mantissa), exponent - f.bias - f.mantissa);
}

// Rounds to nearest, ties to even.
inline uint16_t encode16(double value, Format16 f) {
    const int infinity = (0x7fff >> f.mantissa) << f.mantissa;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (f.mantissa - 1));
    if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
    int64_t bits = 0;
    if (size < std::ldexp(1.0, 1 - f.bias)) {
        bits = static_cast<int64_t>(std::nearbyint(std::ldexp(size, f.bias - 1 + f.mantissa)));
    } else {
        const int e = std::ilogb(size);
        const auto m = static_cast<int64_t>(std::nearbyint(std::ldexp(size, f.mantissa - e)));
        bits = (static_cast<int64_t>(e + f.bias) << f.mantissa) + m - (1 << f.mantissa);
    }
    return static_cast<uint16_t>(sign | std::min<int64_t>(bits, infinity));
}

// --- arrays
// ---------------------------------------------------------------------------------------

inline double load(DType dtype, const void* data, int64_t i) {
    switch (dtype) {
        case DType::kFloat32:
            return static_cast<const float*>(data)[i];
        case DType::kFloat16:
            return decode16(static_cast<const uint16_t*>(data)[i], kHalf);
        case DType::kBFloat16:
            return decode16(static_cast<const uint16_t*>(data)[i], kBFloat);
        case DType::kFloat64:
            break;
    }
    return static_cast<const double*>(data)[i];
}

inline void store(DType dtype, void* data, int64_t i, double value) {
    switch (dtype) {
        case DType::kFloat32:
            static_cast<float*>(data)[i] = static_cast<float>(value);
            return;
        case DType::kFloat16:
            static_cast<uint16_t*>(data)[i] = encode16(value, kHalf);
            return;
        case DType::kBFloat16:
            static_cast<uint16_t*>(data)[i] = encode16(value, kBFloat);
            return;
        case DType::kFloat64:
            static_cast<double*>(data)[i] = value;
            return;
    }
}

// Elements of any dtype, read and written as doubles. Starts out poisoned, not zeroed.
class Array {
  public:
    Array(DType dtype, int64_t count)
        : dtype_(dtype),
          bytes_(static_cast<size_t>(count * tome::element_size(dtype)), kPoison),
          count_(count) {}

    DType dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    const void* at(int64_t i) const { return bytes_.data() + i * tome::element_size(dtype_); }
    double operator[](int64_t i) const { return load(dtype_, data(), i); }
    void set(int64_t i, double value) { store(dtype_, data(), i, value); }

    // The same bits, which is stricter than equal values.
    bool operator==(const Array& other) const {
        return dtype_ == other.dtype_ && bytes_ == other.bytes_;
    }
    bool same(int64_t i, const Array& other, int64_t j) const {
        return std::memcmp(at(i), other.at(j), static_cast<size_t>(tome::element_size(dtype_))) ==
               0;
    }
    bool untouched() const {
        for (unsigned char byte : bytes_) {
            if (byte != kPoison) return false;
        }
        return true;
    }

  private:
    static constexpr unsigned char kPoison = 0xA5;

    DType dtype_;
    std::vector<unsigned char> bytes_;
    int64_t count_;
};

// The relative error of rounding to dtype.
inline double roundoff_of(DType dtype) {
    return dtype == DType::kFloat16    ? std::ldexp(1.0, -11)
           : dtype == DType::kBFloat16 ? std::ldexp(1.0, -8)
           : dtype == DType::kFloat32  ? std::ldexp(1.0, -24)
                                       : std::ldexp(1.0, -53);
}

// Of the dtype that sums are taken in.
inline double sum_roundoff_of(DType dtype) {
    return std::min(roundoff_of(dtype), std::ldexp(1.0, -24));
}

inline Array random_array(DType dtype, int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    Array out(dtype, count);
    for (int64_t i = 0; i < count; ++i) out.set(i, normal(engine));
    return out;
}

// --- what tests run over
// --------------------------------------------------------------------------

inline const std::vector<DType> kDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                           DType::kFloat64};

// The instruction sets this machine has.
inline std::vector<Isa> isas() {
    const Isa before = tome::active_isa();
    std::vector<Isa> out;
    for (Isa isa : tome::kIsas) {
        if (tome::set_isa(isa)) out.push_back(isa);
    }
    tome::set_isa(before);
    return out;
}

class UseIsa {
  public:
    explicit UseIsa(Isa isa) : before_(tome::active_isa()) { EXPECT_TRUE(tome::set_isa(isa)); }
    ~UseIsa() { tome::set_isa(before_); }
    UseIsa(const UseIsa&) = delete;
    UseIsa& operator=(const UseIsa&) = delete;

  private:
    Isa before_;
};

// Three threads: more than one, and not a divisor of the usual batch sizes.
inline Threads pool() {
    static tome::ThreadPool threads(3);
    return threads.threads();
}

class PerDType : public ::testing::TestWithParam<DType> {};

// Runs the body of a test once per instruction set.
template <class F>
void for_each_isa(const F& body) {
    for (Isa isa : isas()) {
        SCOPED_TRACE(tome::isa_name(isa));
        const UseIsa use(isa);
        body();
    }
}

// --- plans
// ----------------------------------------------------------------------------------------

struct Plan {
    int64_t batch = 0, tokens = 0, rows = 0;
    std::vector<int32_t> assign, members, offsets;

    bool operator==(const Plan& other) const = default;
};

// The plan of an assignment, by the plainest loops.
inline Plan plan_of(const std::vector<int32_t>& assign, int64_t batch, int64_t tokens,
                    int64_t rows) {
    Plan plan{batch, tokens, rows, assign, {}, {}};
    for (int64_t b = 0; b < batch; ++b) {
        const size_t begin = plan.members.size();
        for (int64_t row = 0; row <= rows; ++row) {
            plan.offsets.push_back(static_cast<int32_t>(plan.members.size() - begin));
            for (int64_t n = 0; n < tokens; ++n) {
                const int32_t to = assign[static_cast<size_t>(b * tokens + n)];
                // One row past the last: the dropped tokens.
                if (to == row || (to == -1 && row == rows)) {
                    plan.members.push_back(static_cast<int32_t>(n));
                }
            }
        }
    }
    return plan;
}

// Every row gets tokens or none, and about one in eight tokens is dropped.
inline Plan random_plan(int64_t batch, int64_t tokens, int64_t rows, unsigned seed) {
    std::mt19937 engine(seed);
    std::uniform_int_distribution<int32_t> row(0, static_cast<int32_t>(rows) - 1);
    std::uniform_int_distribution<int> drop(0, 7);
    std::vector<int32_t> assign;
    for (int64_t i = 0; i < batch * tokens; ++i) {
        assign.push_back(drop(engine) == 0 ? -1 : row(engine));
    }
    return plan_of(assign, batch, tokens, rows);
}

// Sizes as merging makes them: small whole numbers, whose sums are exact in float32.
inline std::vector<float> random_sizes(int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<float> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(static_cast<float>(1 + engine() % 5));
    return out;
}

}  // namespace tome_test
