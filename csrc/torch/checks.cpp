#include "checks.h"

namespace tome::torch_layer {
namespace {

const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Bool:
            return "bool";
        default:
            return "another dtype";
    }
}

std::string shape_of(const Tensor& x) {
    std::string text = "(";
    for (int64_t d = 0; d < x.dim(); ++d) {
        text += (d > 0 ? ", " : "") + std::to_string(x.size(d));
    }
    return text + (x.dim() == 1 ? ",)" : ")");
}

void check_same_device(const Tensor& x, const char* x_name, const Tensor& y, const char* y_name) {
    STD_TORCH_CHECK(x.device() == y.device(), x_name, " and ", y_name,
                    ": expected one device, got ", x_name, " on ", x.is_cuda() ? "cuda" : "cpu",
                    " and ", y_name, " on ", y.is_cuda() ? "cuda" : "cpu");
}

// (batch, columns) of the given dtype; columns < 0 accepts any number.
void check_table(const Tensor& x, const char* name, int64_t batch, int64_t columns,
                 const char* columns_name, ScalarType dtype) {
    const bool fits = x.dim() == 2 && x.scalar_type() == dtype && x.size(0) == batch &&
                      (columns < 0 || x.size(1) == columns);
    STD_TORCH_CHECK(fits, name, ": expected (", batch, ", ",
                    columns < 0 ? std::string(columns_name)
                                : std::string(columns_name) + " = " + std::to_string(columns),
                    ") ", dtype_name(dtype), ", got ", describe(x));
}

bool same_shape(const Tensor& x, const Tensor& y) {
    if (x.dim() != y.dim()) return false;
    for (int64_t d = 0; d < x.dim(); ++d) {
        if (x.size(d) != y.size(d)) return false;
    }
    return true;
}

// (batch, heads, tokens, dim) twice, alike but for the number of tokens.
void check_heads(const Tensor& q, const char* q_name, const Tensor& k, const char* k_name) {
    STD_TORCH_CHECK(q.dim() == 4, q_name, ": expected (B, H, M, D), got ", describe(q));
    float_dtype(q, q_name);
    const bool fits = k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                      k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type();
    STD_TORCH_CHECK(fits, k_name, ": expected (B, H, N, D) = (", q.size(0), ", ", q.size(1),
                    ", N, ", q.size(3), ") ", dtype_name(q.scalar_type()), " as ", q_name,
                    " is, got ", describe(k));
    check_same_device(q, q_name, k, k_name);
}

// (channels) of x's dtype.
void check_channels(const std::optional<Tensor>& v, const char* name, const Tensor& x) {
    if (!v.has_value()) return;
    const bool fits =
        v->dim() == 1 && v->size(0) == x.size(2) && v->scalar_type() == x.scalar_type();
    STD_TORCH_CHECK(fits, name, ": expected (C = ", x.size(2), ",) ", dtype_name(x.scalar_type()),
                    " as x is, got ", describe(*v));
    check_same_device(x, "x", *v, name);
}

void check_key_sizes(const Tensor& k, const std::optional<Tensor>& size) {
    if (!size.has_value()) return;
    check_table(*size, "size", k.size(0), k.size(2), "N", ScalarType::Float);
    check_same_device(k, "k", *size, "size");
}

}  // namespace

std::string describe(const Tensor& x) { return shape_of(x) + " " + dtype_name(x.scalar_type()); }

DType float_dtype(const Tensor& x, const char* name) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::Half:
            return DType::kFloat16;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        case ScalarType::Double:
            return DType::kFloat64;
        default:
            break;
    }
    STD_TORCH_CHECK(false, name, ": expected float32, float16, bfloat16 or float64, got ",
                    describe(x));
}

ScalarType accumulate_dtype(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Reduce parse_reduce(const std::string& reduce) {
    if (reduce == "mean") return Reduce::kMean;
    if (reduce == "sum") return Reduce::kSum;
    if (reduce == "amax") return Reduce::kAmax;
    STD_TORCH_CHECK(false, "reduce: expected 'mean', 'sum' or 'amax', got '", reduce, "'");
}

Tensor with_contiguous_last_dim(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

void check_match(const Tensor& metric, int64_t num_prefix_tokens) {
    STD_TORCH_CHECK(metric.dim() == 3 || metric.dim() == 4,
                    "metric: expected (B, N, D) or (B, H, N, D), got ", describe(metric));
    float_dtype(metric, "metric");
    STD_TORCH_CHECK(metric.dim() == 3 || metric.size(1) > 0,
                    "metric: expected at least one head, got ", describe(metric));
    STD_TORCH_CHECK(metric.size(metric.dim() - 2) <= INT32_MAX,
                    "metric: expected at most 2^31 - 1 tokens, got ", describe(metric));
    STD_TORCH_CHECK(num_prefix_tokens >= 0, "num_prefix_tokens: expected a number >= 0, got ",
                    num_prefix_tokens);
}

void check_select(const Tensor& scores, int64_t keep, int64_t num_prefix_tokens) {
    STD_TORCH_CHECK(scores.dim() == 2 && (scores.scalar_type() == ScalarType::Float ||
                                          scores.scalar_type() == ScalarType::Double),
                    "scores: expected (B, N) float32 or float64, got ", describe(scores));
    STD_TORCH_CHECK(scores.size(1) < INT32_MAX, "scores: expected fewer than 2^31 - 1 tokens, got ",
                    describe(scores));
    STD_TORCH_CHECK(keep >= 0, "keep: expected a number >= 0, got ", keep);
    STD_TORCH_CHECK(num_prefix_tokens >= 0, "num_prefix_tokens: expected a number >= 0, got ",
                    num_prefix_tokens);
}

void check_plan_args(const Tensor& assign, int64_t num_rows) {
    STD_TORCH_CHECK(assign.dim() == 2 && assign.scalar_type() == ScalarType::Int,
                    "assign: expected (B, N) int32, got ", describe(assign));
    STD_TORCH_CHECK(num_rows >= 0 && num_rows < INT32_MAX,
                    "num_rows: expected a number >= 0 and < 2^31 - 1, got ", num_rows);
}

void check_merge(const Tensor& x, const char* name, int64_t tokens,
                 const std::optional<Tensor>& size, const Tensor& members, const Tensor& offsets) {
    STD_TORCH_CHECK(x.dim() == 3, name, ": expected (B, N, C), got ", describe(x));
    float_dtype(x, name);
    const int64_t batch = x.size(0);
    check_table(members, "members", batch, tokens, "N", ScalarType::Int);
    check_table(offsets, "offsets", batch, -1, "M + 1", ScalarType::Int);
    STD_TORCH_CHECK(offsets.size(1) > 0, "offsets: expected at least one column, got ",
                    describe(offsets));
    check_same_device(x, name, members, "members");
    check_same_device(x, name, offsets, "offsets");
    if (size.has_value()) {
        check_table(*size, "size", batch, members.size(1), "N", ScalarType::Float);
        check_same_device(x, name, *size, "size");
    }
}

void check_add_norm(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                    double eps) {
    check_same_as(branch, "branch", x, "x");
    check_channels(scale, "scale", x);
    check_channels(weight, "weight", x);
    check_channels(bias, "bias", x);
    STD_TORCH_CHECK(eps >= 0, "eps: expected a number >= 0, got ", eps);
}

void check_unmerge(const Tensor& x, const Tensor& assign) {
    STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, M, C), got ", describe(x));
    float_dtype(x, "x");
    check_table(assign, "assign", x.size(0), -1, "N", ScalarType::Int);
    check_same_device(x, "x", assign, "assign");
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& size) {
    check_heads(q, "q", k, "k");
    STD_TORCH_CHECK(same_shape(k, v) && v.scalar_type() == k.scalar_type(),
                    "v: expected the shape and dtype of k, ", describe(k), ", got ", describe(v));
    check_same_device(q, "q", v, "v");
    check_key_sizes(k, size);
}

void check_same_as(const Tensor& x, const char* name, const Tensor& of, const char* of_name) {
    STD_TORCH_CHECK(same_shape(x, of) && x.scalar_type() == of.scalar_type(), name,
                    ": expected the shape and dtype of ", of_name, ", ", describe(of), ", got ",
                    describe(x));
    check_same_device(of, of_name, x, name);
}

void check_lse(const Tensor& lse, const Tensor& q) {
    const ScalarType dtype = accumulate_dtype(q);
    STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) &&
                        lse.size(2) == q.size(2) && lse.scalar_type() == dtype,
                    "lse: expected (B, H, M) = (", q.size(0), ", ", q.size(1), ", ", q.size(2),
                    ") ", dtype_name(dtype), ", got ", describe(lse));
    check_same_device(q, "q", lse, "lse");
}

void check_cls_attention(const Tensor& q, const Tensor& k, const std::optional<Tensor>& size) {
    check_heads(q, "q", k, "k");
    STD_TORCH_CHECK(q.size(1) > 0 && q.size(2) > 0,
                    "q: expected at least one head and one token, got ", describe(q));
    check_key_sizes(k, size);
}

}  // namespace tome::torch_layer
