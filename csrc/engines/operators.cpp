#include "operators.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "tome_core/tome_core.h"

namespace tome::engines {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- what inputs are checked by ------------------------------------------------------------------

std::string text(const Shape& shape) {
    std::string all = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
        all += (i > 0 ? ", " : "") + (shape[i] < 0 ? "?" : std::to_string(shape[i]));
    }
    return all + (shape.size() == 1 ? ",)" : ")");
}

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const Shape& got) {
    throw std::invalid_argument(name + ": expected " + expected + ", got " + text(got));
}

bool alike(int64_t a, int64_t b) { return a < 0 || b < 0 || a == b; }

void expect(const Tensor& x, const char* name, const Shape& expected) {
    bool fits = x.shape.size() == expected.size();
    for (size_t i = 0; fits && i < expected.size(); ++i) fits = alike(x.shape[i], expected[i]);
    if (!fits) refuse(name, text(expected), x.shape);
}

void expect_if_given(const Tensor& x, const char* name, const Shape& expected) {
    if (x.given) expect(x, name, expected);
}

void expect_rank(const Tensor& x, const char* name, size_t rank, const char* expected) {
    if (x.shape.size() != rank) refuse(name, expected, x.shape);
}

void expect_plan(const Status& status, const char* name) {
    if (status) return;
    throw std::invalid_argument(std::string(name) + ": expected a plan, got one whose entry " +
                                std::to_string(status.index) + " of image " +
                                std::to_string(status.batch) + " is " +
                                std::to_string(status.value));
}

template <class T>
T* data(const Tensor& x) {
    return x.given ? static_cast<T*>(x.data) : nullptr;
}

int64_t integer(const Call& call, size_t attribute) {
    return static_cast<int64_t>(call.attributes[attribute]);
}

// (batch, tokens, heads, dim)
HeadStrides head_strides(const Shape& x) { return {x[1] * x[2] * x[3], x[3], x[2] * x[3]}; }

// Infinity stands for the usual one.
double scale_of(double attribute, int64_t dim) {
    if (attribute != kInfinity) return attribute;
    return 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, dim)));
}

// --- plans ---------------------------------------------------------------------------------------

std::vector<Shape> plan_shapes(int64_t batch, int64_t tokens, int64_t rows) {
    return {{batch, tokens}, {batch, tokens}, {batch, rows < 0 ? -1 : rows + 1}};
}

// All but where the data lie. Inputs: metric, weight, targets, size, importance.
MatchParams match_params(const Call& call) {
    static const int32_t kUnread = 0;
    const Shape& metric = call.inputs[0].shape;
    const bool has_heads = metric.size() == 4;
    const Tensor& targets = call.inputs[2];
    MatchParams p{};
    p.dtype = call.dtype;
    p.batch = metric[0];
    p.tokens = metric[1];
    p.heads = has_heads ? metric[2] : 1;
    p.dim = metric.back();
    p.stride_batch = p.tokens * p.heads * p.dim;
    p.stride_token = p.heads * p.dim;
    p.stride_head = p.dim;
    p.r = integer(call, 0);
    p.num_prefix_tokens = std::min(integer(call, 1), p.tokens);
    p.threshold = call.attributes[2];
    if (targets.given) {
        p.targets = &kUnread;
        p.num_targets = targets.shape[0];
        if (p.num_targets == 0) {  // nothing to merge into
            p.r = 0;
            p.threshold = kInfinity;
        }
    }
    return p;
}

std::vector<Shape> match_shapes(const Call& call) {
    const Shape& metric = call.inputs[0].shape;
    if (metric.size() != 3 && metric.size() != 4) {
        refuse("tome_ext::Match: metric", "(B, N, D) or (B, N, H, D)", metric);
    }
    const int64_t batch = metric[0], tokens = metric[1];
    expect_if_given(call.inputs[1], "tome_ext::Match: weight", {batch, tokens});
    if (call.inputs[2].given) {
        expect_rank(call.inputs[2], "tome_ext::Match: targets", 1, "(T,)");
    }
    expect_if_given(call.inputs[3], "tome_ext::Match: size", {batch, tokens});
    expect_if_given(call.inputs[4], "tome_ext::Match: importance", {batch, tokens});
    const bool known = tokens >= 0 && (!call.inputs[2].given || call.inputs[2].shape[0] >= 0);
    const MatchParams p = match_params(call);
    if (known && p.num_targets > std::max<int64_t>(0, tokens - p.num_prefix_tokens)) {
        refuse("tome_ext::Match: targets", "at most as many as tokens behind the prefix",
               call.inputs[2].shape);
    }
    return plan_shapes(batch, tokens, known ? tokens - cut_r(p) : -1);
}

void match_run(const Call& call) {
    MatchParams p = match_params(call);
    p.metric = call.inputs[0].data;
    p.weight = data<float>(call.inputs[1]);
    if (p.num_targets > 0) p.targets = data<int32_t>(call.inputs[2]);
    p.size = data<float>(call.inputs[3]);
    p.importance = data<float>(call.inputs[4]);
    p.assign = data<int32_t>(call.outputs[0]);
    p.members = data<int32_t>(call.outputs[1]);
    p.offsets = data<int32_t>(call.outputs[2]);
    if (const Status status = match(p, call.threads); !status) {
        throw std::invalid_argument(
            "tome_ext::Match: targets: expected ascending positions behind the prefix, got " +
            std::to_string(status.value) + " at " + std::to_string(status.index));
    }
}

// Inputs: scores.
SelectParams select_params(const Call& call) {
    const Shape& scores = call.inputs[0].shape;
    SelectParams p{};
    p.scores = call.inputs[0].data;
    p.dtype = call.dtype;
    p.batch = scores[0];
    p.tokens = p.stride_batch = scores[1];
    p.keep = integer(call, 0);
    p.num_prefix_tokens = std::min(integer(call, 1), p.tokens);
    p.fuse = integer(call, 2) != 0;
    return p;
}

std::vector<Shape> select_shapes(const Call& call) {
    expect_rank(call.inputs[0], "tome_ext::Select: scores", 2, "(B, N)");
    const SelectParams p = select_params(call);
    const int64_t rows =
        p.tokens < 0 ? -1 : select_rows(p.tokens, p.keep, p.num_prefix_tokens, p.fuse);
    return plan_shapes(p.batch, p.tokens, rows);
}

void select_run(const Call& call) {
    SelectParams p = select_params(call);
    p.assign = data<int32_t>(call.outputs[0]);
    p.members = data<int32_t>(call.outputs[1]);
    p.offsets = data<int32_t>(call.outputs[2]);
    select(p, call.threads);
}

// Inputs: assign.
std::vector<Shape> regroup_shapes(const Call& call) {
    expect_rank(call.inputs[0], "tome_ext::Plan: assign", 2, "(B, N)");
    const Shape& assign = call.inputs[0].shape;
    return {assign, {assign[0], integer(call, 0) + 1}};
}

void regroup_run(const Call& call) {
    const Shape& assign = call.inputs[0].shape;
    PlanParams p{};
    p.assign = data<int32_t>(call.inputs[0]);
    p.batch = assign[0];
    p.tokens = assign[1];
    p.rows = integer(call, 0);
    p.members = data<int32_t>(call.outputs[0]);
    p.offsets = data<int32_t>(call.outputs[1]);
    expect_plan(plan(p, call.threads), "tome_ext::Plan: assign");
}

// --- merging -------------------------------------------------------------------------------------

// Of tokens x (batch, tokens, channels), where `first` is the place of size, members and offsets.
Shape merged_shape(const Call& call, const char* name, size_t first) {
    const std::string prefix = std::string("tome_ext::") + name + ": ";
    const Tensor &x = call.inputs[0], &offsets = call.inputs[first + 2];
    expect_rank(x, (prefix + "x").c_str(), 3, "(B, N, C)");
    const Shape tokens{x.shape[0], x.shape[1]};
    expect_if_given(call.inputs[first], (prefix + "size").c_str(), tokens);
    expect(call.inputs[first + 1], (prefix + "members").c_str(), tokens);
    expect(offsets, (prefix + "offsets").c_str(), {x.shape[0], -1});
    if (offsets.shape[1] == 0) refuse(prefix + "offsets", "(B, M + 1)", offsets.shape);
    return {x.shape[0], offsets.shape[1] < 0 ? -1 : offsets.shape[1] - 1, x.shape[2]};
}

// Inputs: x, size, members, offsets.
std::vector<Shape> merge_shapes(const Call& call) {
    const Shape merged = merged_shape(call, "Merge", 1);
    return {merged, {merged[0], merged[1]}};
}

void merge_run(const Call& call) {
    const Shape &x = call.inputs[0].shape, &out = call.outputs[0].shape;
    MergeParams p{};
    p.x = call.inputs[0].data;
    p.dtype = call.dtype;
    p.batch = x[0];
    p.tokens = x[1];
    p.rows = out[1];
    p.channels = p.stride_token = x[2];
    p.stride_batch = x[1] * x[2];
    p.size = data<float>(call.inputs[1]);
    p.members = data<int32_t>(call.inputs[2]);
    p.offsets = data<int32_t>(call.inputs[3]);
    p.reduce = static_cast<Reduce>(integer(call, 0));
    p.out = call.outputs[0].data;
    p.out_size = data<float>(call.outputs[1]);
    expect_plan(merge(p, call.threads), "tome_ext::Merge: members, offsets");
}

// Inputs: x, branch, size, members, offsets, scale, weight, bias.
std::vector<Shape> merge_add_norm_shapes(const Call& call) {
    const Shape merged = merged_shape(call, "MergeAddNorm", 2);
    const Shape& x = call.inputs[0].shape;
    expect(call.inputs[1], "tome_ext::MergeAddNorm: branch", x);
    expect_if_given(call.inputs[5], "tome_ext::MergeAddNorm: scale", {x[2]});
    expect_if_given(call.inputs[6], "tome_ext::MergeAddNorm: weight", {x[2]});
    expect_if_given(call.inputs[7], "tome_ext::MergeAddNorm: bias", {x[2]});
    return {merged, {merged[0], merged[1]}, merged};
}

void merge_add_norm_run(const Call& call) {
    const Shape &x = call.inputs[0].shape, &out = call.outputs[0].shape;
    MergeAddNormParams p{};
    p.x = call.inputs[0].data;
    p.branch = call.inputs[1].data;
    p.dtype = call.dtype;
    p.batch = x[0];
    p.tokens = x[1];
    p.rows = out[1];
    p.channels = p.x_stride_token = p.branch_stride_token = x[2];
    p.x_stride_batch = p.branch_stride_batch = x[1] * x[2];
    p.size = data<float>(call.inputs[2]);
    p.members = data<int32_t>(call.inputs[3]);
    p.offsets = data<int32_t>(call.inputs[4]);
    p.scale = data<void>(call.inputs[5]);
    p.weight = data<void>(call.inputs[6]);
    p.bias = data<void>(call.inputs[7]);
    p.eps = call.attributes[0];
    p.keep_norms = integer(call, 1) != 0;
    p.out = call.outputs[0].data;
    p.out_size = data<float>(call.outputs[1]);
    p.normed = call.outputs[2].data;
    expect_plan(merge_add_norm(p, call.threads), "tome_ext::MergeAddNorm: members, offsets");
}

// Inputs: x, assign.
std::vector<Shape> unmerge_shapes(const Call& call) {
    const Tensor &x = call.inputs[0], &assign = call.inputs[1];
    expect_rank(x, "tome_ext::Unmerge: x", 3, "(B, M, C)");
    expect(assign, "tome_ext::Unmerge: assign", {x.shape[0], -1});
    return {{x.shape[0], assign.shape[1], x.shape[2]}};
}

void unmerge_run(const Call& call) {
    const Shape& x = call.inputs[0].shape;
    UnmergeParams p{};
    p.x = call.inputs[0].data;
    p.dtype = call.dtype;
    p.batch = x[0];
    p.rows = x[1];
    p.channels = p.stride_row = x[2];
    p.stride_batch = x[1] * x[2];
    p.tokens = call.inputs[1].shape[1];
    p.assign = data<int32_t>(call.inputs[1]);
    p.out = call.outputs[0].data;
    expect_plan(unmerge(p, call.threads), "tome_ext::Unmerge: assign");
}

// --- attention -----------------------------------------------------------------------------------

// Inputs: q, k, v, size.
std::vector<Shape> attention_shapes(const Call& call) {
    const Shape &q = call.inputs[0].shape, &k = call.inputs[1].shape;
    expect_rank(call.inputs[0], "tome_ext::ProportionalAttention: q", 4, "(B, M, H, D)");
    expect(call.inputs[1], "tome_ext::ProportionalAttention: k", {q[0], -1, q[2], q[3]});
    expect(call.inputs[2], "tome_ext::ProportionalAttention: v", k);
    expect_if_given(call.inputs[3], "tome_ext::ProportionalAttention: size", {q[0], k[1]});
    return {q};
}

void attention_run(const Call& call) {
    const Shape &q = call.inputs[0].shape, &k = call.inputs[1].shape;
    AttentionParams p{};
    p.q = call.inputs[0].data;
    p.k = call.inputs[1].data;
    p.v = call.inputs[2].data;
    p.dtype = call.dtype;
    p.batch = q[0];
    p.queries = q[1];
    p.heads = q[2];
    p.dim = q[3];
    p.keys = k[1];
    p.q_strides = head_strides(q);
    p.k_strides = p.v_strides = head_strides(k);
    p.size = data<float>(call.inputs[3]);
    p.scale = scale_of(call.attributes[0], p.dim);
    p.out = call.outputs[0].data;
    const auto lse = std::make_unique_for_overwrite<double[]>(
        static_cast<size_t>(p.batch * p.heads * p.queries));  // of which nothing is made
    p.lse = lse.get();
    attention(p, call.threads);
}

// Inputs: q, k, size. Of the queries (batch, queries, heads, dim), the first ones' are read.
std::vector<Shape> cls_attention_shapes(const Call& call) {
    const Shape &q = call.inputs[0].shape, &k = call.inputs[1].shape;
    expect_rank(call.inputs[0], "tome_ext::ClsAttention: q", 4, "(B, M, H, D)");
    if (q[1] == 0 || q[2] == 0) {
        refuse("tome_ext::ClsAttention: q", "at least one token and head", q);
    }
    expect(call.inputs[1], "tome_ext::ClsAttention: k", {q[0], -1, q[2], q[3]});
    expect_if_given(call.inputs[2], "tome_ext::ClsAttention: size", {q[0], k[1]});
    return {{q[0], k[1]}};
}

void cls_attention_run(const Call& call) {
    const Shape &q = call.inputs[0].shape, &k = call.inputs[1].shape;
    ClsAttentionParams p{};
    p.q = call.inputs[0].data;
    p.k = call.inputs[1].data;
    p.dtype = call.dtype;
    p.batch = q[0];
    p.heads = q[2];
    p.dim = q[3];
    p.keys = k[1];
    p.q_stride_batch = q[1] * q[2] * q[3];
    p.q_stride_head = q[3];
    p.k_strides = head_strides(k);
    p.size = data<float>(call.inputs[2]);
    p.scale = scale_of(call.attributes[0], p.dim);
    p.out = call.outputs[0].data;
    cls_attention(p, call.threads);
}

std::vector<Operator> make_operators() {
    using enum Element;
    const std::vector<DType> any{DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                 DType::kFloat64},
        sums{DType::kFloat32, DType::kFloat64}, none{DType::kFloat32};
    const std::vector<Argument> plan{{"assign", kInt32}, {"members", kInt32}, {"offsets", kInt32}};
    constexpr double kMost = std::numeric_limits<int32_t>::max();
    return {
        {"Match",
         {{"metric", kTokens},
          {"weight", kFloat32, true},
          {"targets", kInt32, true},
          {"size", kFloat32, true},
          {"importance", kFloat32, true}},
         plan,
         {{"r", true, 0, -kMost, kMost},
          {"num_prefix_tokens", true, 0, 0, kMost},
          {"threshold", false, kInfinity, -kInfinity, kInfinity}},
         any,
         match_shapes,
         match_run},
        {"Select",
         {{"scores", kSums}},
         plan,
         {{"keep", true, 0, 0, kMost},
          {"num_prefix_tokens", true, 0, 0, kMost},
          {"fuse", true, 0, 0, 1}},
         sums,
         select_shapes,
         select_run},
        {"Plan",
         {{"assign", kInt32}},
         {{"members", kInt32}, {"offsets", kInt32}},
         {{"num_rows", true, 0, 0, kMost - 1}},
         none,
         regroup_shapes,
         regroup_run},
        {"Merge",
         {{"x", kTokens}, {"size", kFloat32, true}, {"members", kInt32}, {"offsets", kInt32}},
         {{"merged", kTokens}, {"new_size", kFloat32}},
         {{"reduce", true, 0, 0, 2}},
         any,
         merge_shapes,
         merge_run},
        {"MergeAddNorm",
         {{"x", kTokens},
          {"branch", kTokens},
          {"size", kFloat32, true},
          {"members", kInt32},
          {"offsets", kInt32},
          {"scale", kTokens, true},
          {"weight", kTokens, true},
          {"bias", kTokens, true}},
         {{"merged", kTokens}, {"new_size", kFloat32}, {"normed", kTokens}},
         {{"eps", false, 1e-6, 0, kInfinity}, {"keep_norms", true, 0, 0, 1}},
         any,
         merge_add_norm_shapes,
         merge_add_norm_run},
        {"Unmerge",
         {{"x", kTokens}, {"assign", kInt32}},
         {{"tokens", kTokens}},
         {},
         any,
         unmerge_shapes,
         unmerge_run},
        {"ProportionalAttention",
         {{"q", kTokens}, {"k", kTokens}, {"v", kTokens}, {"size", kFloat32, true}},
         {{"out", kTokens}},
         {{"scale", false, kInfinity, -kInfinity, kInfinity}},
         any,
         attention_shapes,
         attention_run},
        {"ClsAttention",
         {{"q", kTokens}, {"k", kTokens}, {"size", kFloat32, true}},
         {{"scores", kSums}},
         {{"scale", false, kInfinity, -kInfinity, kInfinity}},
         any,
         cls_attention_shapes,
         cls_attention_run},
    };
}

}  // namespace

const char* const kDomain = "tome_ext";

const std::vector<Operator>& operators() {
    static const auto& all = *new std::vector<Operator>(make_operators());
    return all;
}

std::optional<DType> dtype_of(Element element, DType call) {
    switch (element) {
        case Element::kTokens:
            return call;
        case Element::kSums:
            return call == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        case Element::kInt32:
            return std::nullopt;
        case Element::kFloat32:
            break;
    }
    return DType::kFloat32;
}

std::vector<Shape> output_shapes(const Operator& what, const Call& call) {
    for (size_t i = 0; i < what.attributes.size(); ++i) {
        const Attribute& attribute = what.attributes[i];
        const double value = call.attributes[i];
        if (value >= attribute.least && value <= attribute.most) continue;
        std::ostringstream message;
        message << "tome_ext::" << what.name << ": " << attribute.name << ": expected "
                << attribute.least << " to " << attribute.most << ", got " << value;
        throw std::invalid_argument(message.str());
    }
    return what.shapes(call);
}

}  // namespace tome::engines
