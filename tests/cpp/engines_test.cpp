// The operators as engines call them: what nodes say of shapes that are not all known yet, and what
// they refuse. That they compute what the kernels do is tested in the engines themselves.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>

#include "operators.h"

namespace tome::engines {
namespace {

const Operator& find(const std::string& name) {
    for (const Operator& what : operators()) {
        if (what.name == name) return what;
    }
    throw std::out_of_range(name);
}

Tensor shaped(Shape shape) { return {nullptr, std::move(shape), true}; }

std::vector<Shape> shapes(const std::string& name, const std::vector<double>& attributes,
                          const std::vector<Tensor>& given) {
    const Operator& what = find(name);
    std::vector<Tensor> inputs = given;
    inputs.resize(what.inputs.size());
    return output_shapes(what, {DType::kFloat32, attributes, inputs, {}});
}

std::string refusal(const std::string& name, const std::vector<double>& attributes,
                    const std::vector<Tensor>& given) {
    try {
        shapes(name, attributes, given);
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "none";
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Engines, EveryOperatorIsWhole) {
    std::set<std::string> names;
    for (const Operator& what : operators()) {
        EXPECT_TRUE(names.insert(what.name).second);
        EXPECT_FALSE(what.inputs.empty());
        EXPECT_FALSE(what.outputs.empty());
        EXPECT_FALSE(what.dtypes.empty());
        EXPECT_FALSE(what.inputs.front().optional);
    }
    EXPECT_EQ(names.size(), 8u);
}

TEST(Engines, MatchSaysWhatItLeaves) {
    const std::vector<double> three_of_prefix_one{3, 1, kInfinity};
    EXPECT_EQ(shapes("Match", three_of_prefix_one, {shaped({2, 10, 4, 8})}),
              (std::vector<Shape>{{2, 10}, {2, 10}, {2, 8}}));
    EXPECT_EQ(shapes("Match", three_of_prefix_one, {shaped({-1, 10, 8})}),
              (std::vector<Shape>{{-1, 10}, {-1, 10}, {-1, 8}}));
    EXPECT_EQ(shapes("Match", three_of_prefix_one, {shaped({-1, -1, 8})}),
              (std::vector<Shape>{{-1, -1}, {-1, -1}, {-1, -1}}));
    // At most half of the tokens behind the prefix; with targets, all others.
    EXPECT_EQ(shapes("Match", {99, 1, kInfinity}, {shaped({2, 10, 8})})[2], (Shape{2, 7}));
    EXPECT_EQ(shapes("Match", {99, 1, kInfinity}, {shaped({2, 10, 8}), {}, shaped({2})})[2],
              (Shape{2, 4}));
    EXPECT_EQ(shapes("Match", {99, 1, kInfinity}, {shaped({2, 10, 8}), {}, shaped({0})})[2],
              (Shape{2, 11}));
    EXPECT_EQ(shapes("Match", {99, 1, kInfinity}, {shaped({2, 10, 8}), {}, shaped({-1})})[2],
              (Shape{2, -1}));
}

TEST(Engines, SelectAndPlanSayTheirRows) {
    EXPECT_EQ(shapes("Select", {4, 1, 0}, {shaped({3, 10})})[2], (Shape{3, 6}));
    EXPECT_EQ(shapes("Select", {4, 1, 1}, {shaped({3, 10})})[2], (Shape{3, 7}));
    EXPECT_EQ(shapes("Select", {4, 1, 1}, {shaped({3, -1})})[2], (Shape{3, -1}));
    EXPECT_EQ(shapes("Plan", {5}, {shaped({-1, 10})}), (std::vector<Shape>{{-1, 10}, {-1, 6}}));
}

TEST(Engines, MergesSayTheirRows) {
    const std::vector<Tensor> inputs{shaped({2, 10, 8}), shaped({2, 10}), shaped({2, 10}),
                                     shaped({2, 8})};
    EXPECT_EQ(shapes("Merge", {0}, inputs), (std::vector<Shape>{{2, 7, 8}, {2, 7}}));
    const std::vector<Tensor> whole{shaped({2, 10, 8}), shaped({2, 10, 8}), {},
                                    shaped({2, 10}),    shaped({2, -1}),    shaped({8})};
    EXPECT_EQ(shapes("MergeAddNorm", {1e-6, 0}, whole),
              (std::vector<Shape>{{2, -1, 8}, {2, -1}, {2, -1, 8}}));
    EXPECT_EQ(shapes("Unmerge", {}, {shaped({2, 7, 8}), shaped({2, 10})}),
              (std::vector<Shape>{{2, 10, 8}}));
    EXPECT_EQ(shapes("ProportionalAttention", {0}, std::vector<Tensor>(3, shaped({2, 10, 4, 8}))),
              (std::vector<Shape>{{2, 10, 4, 8}}));
    EXPECT_EQ(shapes("ClsAttention", {0}, {shaped({-1, 1, 4, 8}), shaped({2, 10, 4, 8})}),
              (std::vector<Shape>{{-1, 10}}));
}

TEST(Engines, WhatDoesNotGoTogetherIsRefusedByName) {
    EXPECT_EQ(refusal("Match", {3, 1, kInfinity}, {shaped({2, 10})}),
              "tome_ext::Match: metric: expected (B, N, D) or (B, N, H, D), got (2, 10)");
    EXPECT_EQ(refusal("Match", {3, 1, kInfinity}, {shaped({2, 10, 8}), shaped({2, 9})}),
              "tome_ext::Match: weight: expected (2, 10), got (2, 9)");
    EXPECT_EQ(refusal("Match", {3, 1, kInfinity}, {shaped({2, 10, 8}), {}, shaped({10})}),
              "tome_ext::Match: targets: expected at most as many as tokens behind the prefix, got "
              "(10,)");
    EXPECT_EQ(refusal("Merge", {0}, {shaped({2, 10, 8}), {}, shaped({2, 10}), shaped({2, 0})}),
              "tome_ext::Merge: offsets: expected (B, M + 1), got (2, 0)");
    EXPECT_EQ(refusal("ProportionalAttention", {0},
                      {shaped({2, 9, 4, 8}), shaped({2, 10, 4, 8}), shaped({-1, 11, 4, 8})}),
              "tome_ext::ProportionalAttention: v: expected (2, 10, 4, 8), got (?, 11, 4, 8)");
    EXPECT_EQ(refusal("ClsAttention", {0}, {shaped({2, 0, 4, 8}), shaped({2, 10, 4, 8})}),
              "tome_ext::ClsAttention: q: expected at least one token and head, got (2, 0, 4, 8)");
}

TEST(Engines, AttributesOutOfRangeAreRefused) {
    const std::vector<Tensor> metric{shaped({2, 10, 8})}, assign{shaped({2, 10})};
    EXPECT_EQ(refusal("Match", {3, -1, kInfinity}, metric),
              "tome_ext::Match: num_prefix_tokens: expected 0 to 2.14748e+09, got -1");
    EXPECT_NE(refusal("Match", {3, 1, std::nan("")}, metric), "none");
    EXPECT_NE(refusal("Match", {0x1p40, 1, 0.5}, metric), "none");
    EXPECT_EQ(refusal("Match", {-3, 1, -kInfinity}, metric), "none");
    EXPECT_NE(refusal("Select", {-1, 1, 0}, assign), "none");
    EXPECT_NE(refusal("Select", {1, 1, 2}, assign), "none");
    EXPECT_NE(refusal("Plan", {-1}, assign), "none");
    EXPECT_NE(refusal("Plan", {0x1p31}, assign), "none");
    EXPECT_NE(refusal("Merge", {3}, {shaped({2, 10, 8}), {}, shaped({2, 10}), shaped({2, 8})}),
              "none");
}

}  // namespace
}  // namespace tome::engines
