// merge_add_norm by plain loops in double precision, from the same params struct that the kernels
// take; and inputs of every kind for the tests of every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "helpers.h"
#include "tome_core/merge.h"

namespace tome_test {

// --- inputs ------------------------------------------------------------------------------------

struct MergeAddNormShape {
    int64_t batch, tokens, rows, channels;
};

inline void PrintTo(const MergeAddNormShape& s, std::ostream* out) {
    *out << "B" << s.batch << " N" << s.tokens << " M" << s.rows << " C" << s.channels;
}

// Channels of one vector and of many, with and without a remainder; more rows than tokens; nothing.
inline const std::vector<MergeAddNormShape> kMergeAddNormShapes = {
    {1, 1, 1, 1},     {2, 9, 5, 1},    {2, 9, 5, 3},     {2, 13, 20, 8},
    {4, 61, 33, 31},  {2, 40, 30, 64}, {2, 30, 20, 100}, {2, 20, 11, 129},
    {1, 17, 12, 384}, {1, 10, 7, 768}, {1, 5, 3, 1025},  {1, 4, 3, 4100},
    {2, 9, 5, 0},     {2, 0, 3, 8},    {2, 5, 0, 8},     {0, 5, 3, 8},
};

// What may be left out, and how the inputs lie and are spread.
struct MergeAddNormKind {
    const char* name;
    bool sized, scaled, weighted, biased;
    int64_t x_pad, branch_pad;  // elements before the first row and after each
    double mean;                // of x; the spread is 1
    double eps;
    bool keep_norms = false;
};

inline const std::vector<MergeAddNormKind> kMergeAddNormKinds = {
    {"plain", false, false, false, false, 0, 0, 0.0, 1e-6},
    {"block", true, false, true, true, 0, 0, 0.0, 1e-6},
    {"block with LayerScale", true, true, true, true, 0, 0, 0.0, 1e-6},
    {"weight only", true, true, true, false, 1, 0, 0.0, 1e-5},
    {"bias only", false, true, false, true, 0, 3, 0.0, 1e-5},
    {"strided", true, true, true, true, 5, 8, 0.0, 1e-6},
    {"large mean", true, true, true, true, 0, 0, 3000.0, 1e-6},
    {"large eps", true, false, true, true, 8, 16, 0.0, 10.0},
    {"norms kept", true, true, true, true, 0, 0, 0.0, 1e-6, true},
    {"norms kept, strided", false, false, true, true, 5, 8, 3.0, 1e-6, true},
};

// Tokens (batch, tokens, channels) among NaN, which shows if a neighbour is read.
struct PaddedTokens {
    Array memory;
    int64_t pad, stride_batch, stride_token;

    PaddedTokens(DType dtype, const MergeAddNormShape& s, int64_t padding, double mean,
                 unsigned seed)
        : memory(dtype, padding + s.batch * s.tokens * (s.channels + padding)),
          pad(padding),
          stride_batch(s.tokens * (s.channels + padding)),
          stride_token(s.channels + padding) {
        std::mt19937 engine(seed);
        std::normal_distribution<double> normal(mean);
        for (int64_t i = 0; i < memory.count(); ++i) {
            const bool inside = i >= pad && (i - pad) % stride_token < s.channels;
            memory.set(i, inside ? normal(engine) : kNaN);
        }
    }

    const void* data() const { return memory.at(pad); }
};

struct MergeAddNormOutputs {
    Array out, normed;
    std::vector<float> size;

    bool operator==(const MergeAddNormOutputs&) const = default;
};

struct MergeAddNormInputs {
    DType dtype;
    MergeAddNormShape shape;
    MergeAddNormKind kind;
    // Rows of no, one and more members; dropped tokens.
    Plan plan;
    PaddedTokens x, branch;
    Array scale, weight, bias;
    // One in six is 0, so that some rows have a total of 0.
    std::vector<float> size;

    MergeAddNormInputs(DType dtype_, const MergeAddNormShape& s, const MergeAddNormKind& k,
                       unsigned seed = 1)
        : dtype(dtype_),
          shape(s),
          kind(k),
          plan(s.rows > 0 ? random_plan(s.batch, s.tokens, s.rows, seed)
                          : plan_of(std::vector<int32_t>(size_t(s.batch * s.tokens), -1), s.batch,
                                    s.tokens, 0)),
          x(dtype, s, k.x_pad, k.mean, seed + 1),
          branch(dtype, s, k.branch_pad, 0.0, seed + 2),
          scale(random_array(dtype, s.channels, seed + 3)),
          weight(random_array(dtype, s.channels, seed + 4)),
          bias(random_array(dtype, s.channels, seed + 5)),
          size(random_sizes(s.batch * s.tokens, seed + 6)) {
        for (size_t i = 0; i < size.size(); ++i) {
            if ((i + seed) % 6 == 0) size[i] = 0;
        }
    }

    MergeAddNormOutputs outputs() const {
        const int64_t rows = shape.batch * shape.rows;
        return {Array(dtype, rows * shape.channels), Array(dtype, rows * shape.channels),
                std::vector<float>(size_t(rows), -12345.0f)};
    }

    // The outputs are written to `to`, which must outlive the params, as must this.
    tome::MergeAddNormParams params(MergeAddNormOutputs& to) const {
        tome::MergeAddNormParams p{};
        p.x = x.data();
        p.branch = branch.data();
        p.dtype = dtype;
        p.batch = shape.batch;
        p.tokens = shape.tokens;
        p.rows = shape.rows;
        p.channels = shape.channels;
        p.x_stride_batch = x.stride_batch;
        p.x_stride_token = x.stride_token;
        p.branch_stride_batch = branch.stride_batch;
        p.branch_stride_token = branch.stride_token;
        p.scale = kind.scaled ? scale.data() : nullptr;
        p.weight = kind.weighted ? weight.data() : nullptr;
        p.bias = kind.biased ? bias.data() : nullptr;
        p.eps = kind.eps;
        p.keep_norms = kind.keep_norms;
        p.size = kind.sized ? size.data() : nullptr;
        p.members = plan.members.data();
        p.offsets = plan.offsets.data();
        p.out = to.out.data();
        p.normed = to.normed.data();
        p.out_size = to.size.data();
        return p;
    }
};

// --- oracle ------------------------------------------------------------------------------------

// Of an implementation that sums `count` terms in at least four chains.
inline double chain_of(int64_t count) { return double(count) / 4 + 16; }

inline double length_of(const std::vector<double>& row) {
    double squares = 0;
    for (double value : row) squares += value * value;
    return std::sqrt(squares);
}

// The merged row `flat` of (batch, rows): its values, how far rounding may take each, its size.
struct MergedRow {
    std::vector<double> value, error;
    double size = 0;
};

inline MergedRow merged_row(const tome::MergeAddNormParams& p, int64_t flat) {
    const auto channels = size_t(p.channels);
    const int64_t b = flat / p.rows, row = flat % p.rows;
    const int32_t* offsets = p.offsets + b * (p.rows + 1) + row;
    const int32_t* members = p.members + b * p.tokens;
    const auto size_of = [&](int64_t n) { return p.size ? double(p.size[b * p.tokens + n]) : 1.0; };
    MergedRow want{std::vector<double>(channels), std::vector<double>(channels), 0};
    const int64_t count = offsets[1] - offsets[0];
    for (int64_t m = offsets[0]; m < offsets[1]; ++m) want.size += size_of(members[m]);
    const bool even = count == 1 || want.size == 0;
    const double divisor = count == 0 ? 1.0 : even ? double(count) : want.size;
    const double least = std::ldexp(1.0, p.dtype == DType::kFloat16 ? -25 : -140);
    const double unit = sum_roundoff_of(p.dtype);
    std::vector<double> squares(size_t(count), 0.0);  // of each member
    for (int64_t c = 0; c < p.channels; ++c) {
        double sum = 0, magnitude = 0;
        for (int64_t m = offsets[0]; m < offsets[1]; ++m) {
            const int64_t n = members[m];
            const double weight = even ? 1.0 : size_of(n);
            const double x = load(p.dtype, p.x, b * p.x_stride_batch + n * p.x_stride_token + c);
            const double branch =
                load(p.dtype, p.branch, b * p.branch_stride_batch + n * p.branch_stride_token + c) *
                (p.scale ? load(p.dtype, p.scale, c) : 1.0);
            sum += weight * (x + branch);
            magnitude += weight * (std::fabs(x) + std::fabs(branch));
            squares[size_t(m - offsets[0])] += (x + branch) * (x + branch);
        }
        want.value[size_t(c)] = sum / divisor;
        want.error[size_t(c)] = double(count + 6) * unit * magnitude / divisor;
    }
    double stretch = 1, stretch_error = 0;  // relative
    if (p.keep_norms && count > 1) {
        double lengths = 0;
        for (int64_t m = offsets[0]; m < offsets[1]; ++m) {
            const double weight = even ? 1.0 : size_of(members[m]);
            lengths += weight * std::sqrt(squares[size_t(m - offsets[0])]) / divisor;
        }
        const double length = length_of(want.value), off = length_of(want.error);
        if (length > 0) {
            stretch = lengths / length;
            // Of a mean that is next to nothing, its own rounding may be all that there is.
            stretch_error = (double(count) + chain_of(p.channels)) * unit +
                            (4 * off < length ? 2 * off / length : kInf);
        } else if (off > 0) {
            stretch_error = kInf;
        }
    }
    for (size_t c = 0; c < channels && count > 0; ++c) {
        want.value[c] *= stretch;
        const double size = std::fabs(want.value[c]);
        want.error[c] = std::isinf(stretch_error) ? kInf
                                                  : stretch * want.error[c] + size * stretch_error +
                                                        roundoff_of(p.dtype) * size * 1.01 + least;
    }
    return want;
}

// The norm of `row` as it was stored, and how far rounding may take each value:
//   the mean is off by e = chain * unit * mean(|row|),
//   the variance by chain * unit of itself, and e^2,
//   each value by a few units of every term it is a sum of.
struct NormedRow {
    std::vector<double> value, error;
};

inline NormedRow normed_row(const tome::MergeAddNormParams& p, const std::vector<double>& row) {
    const double unit = sum_roundoff_of(p.dtype), count = double(row.size());
    double mean = 0, size = 0, variance = 0;
    for (double value : row) mean += value / count;
    for (double value : row) size += std::fabs(value) / count;
    for (double value : row) variance += (value - mean) * (value - mean) / count;
    const double inverse = 1 / std::sqrt(variance + p.eps);
    const double mean_error = chain_of(p.channels) * unit * size;
    const double scale_error =
        chain_of(p.channels) * unit + mean_error * mean_error * inverse * inverse / 2;  // relative
    const double least = std::ldexp(1.0, p.dtype == DType::kFloat16 ? -25 : -140);
    NormedRow want;
    for (int64_t c = 0; c < p.channels; ++c) {
        const double weight = p.weight ? load(p.dtype, p.weight, c) : 1.0;
        const double bias = p.bias ? load(p.dtype, p.bias, c) : 0.0;
        const double from_mean = row[size_t(c)] - mean;
        const double value = from_mean * inverse * weight + bias;
        want.value.push_back(value);
        want.error.push_back(
            inverse * std::fabs(weight) *
                (mean_error + (std::fabs(from_mean) + mean_error) * (scale_error + 6 * unit)) +
            2 * unit * std::fabs(bias) + (roundoff_of(p.dtype) + unit) * std::fabs(value) + least);
    }
    return want;
}

// Compares what p.out, p.out_size and p.normed hold with what they should.
inline void expect_merge_add_norm(const tome::MergeAddNormParams& p) {
    for (int64_t flat = 0; flat < p.batch * p.rows; ++flat) {
        const MergedRow want = merged_row(p, flat);
        ASSERT_EQ(p.out_size[flat], static_cast<float>(want.size)) << "row " << flat;
        std::vector<double> stored;
        for (int64_t c = 0; c < p.channels; ++c) {
            stored.push_back(load(p.dtype, p.out, flat * p.channels + c));
            ASSERT_LE(std::fabs(stored.back() - want.value[size_t(c)]), want.error[size_t(c)])
                << "out: row " << flat << " channel " << c;
        }
        const NormedRow normed = normed_row(p, stored);
        for (int64_t c = 0; c < p.channels; ++c) {
            const double got = load(p.dtype, p.normed, flat * p.channels + c);
            ASSERT_LE(std::fabs(got - normed.value[size_t(c)]), normed.error[size_t(c)])
                << "normed: row " << flat << " channel " << c;
        }
    }
}

}  // namespace tome_test
