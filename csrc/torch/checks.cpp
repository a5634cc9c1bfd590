#include "checks.h"

namespace tome::torch_layer {

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
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::ComplexHalf:
            return "complex32";
        case ScalarType::ComplexFloat:
            return "complex64";
        case ScalarType::ComplexDouble:
            return "complex128";
        default:  // float8 and the like, quantized
            return "another dtype";
    }
}

namespace {

std::string shape_of(const Tensor& x) {
    std::string text = "(";
    for (int64_t d = 0; d < x.dim(); ++d) {
        text += (d > 0 ? ", " : "") + std::to_string(x.size(d));
    }
    return text + (x.dim() == 1 ? ",)" : ")");
}

}  // namespace

void check_same_device(const Tensor& x, const char* x_name, const Tensor& y, const char* y_name) {
    TOME_EXPECT(x.device() == y.device(), x_name, " and ", y_name, ": expected one device, got ",
                x_name, " on ", x.is_cuda() ? "cuda" : "cpu", " and ", y_name, " on ",
                y.is_cuda() ? "cuda" : "cpu");
}

void check_table(const Tensor& x, const char* name, int64_t batch, int64_t columns,
                 const char* columns_name, ScalarType dtype) {
    const bool fits = x.dim() == 2 && x.scalar_type() == dtype && x.size(0) == batch &&
                      (columns < 0 || x.size(1) == columns);
    TOME_EXPECT(fits, name, ": expected (", batch, ", ",
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
    TOME_EXPECT(false, name, ": expected float32, float16, bfloat16 or float64, got ", describe(x));
}

ScalarType accumulate_dtype(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Reduce parse_reduce(const std::string& reduce) {
    if (reduce == "mean") return Reduce::kMean;
    if (reduce == "sum") return Reduce::kSum;
    if (reduce == "amax") return Reduce::kAmax;
    TOME_EXPECT(false, "reduce: expected 'mean', 'sum' or 'amax', got '", reduce, "'");
}

Tensor with_contiguous_last_dim(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

void check_same_as(const Tensor& x, const char* name, const Tensor& of, const char* of_name) {
    TOME_EXPECT(same_shape(x, of) && x.scalar_type() == of.scalar_type(), name,
                ": expected the shape and dtype of ", of_name, ", ", describe(of), ", got ",
                describe(x));
    check_same_device(of, of_name, x, name);
}

}  // namespace tome::torch_layer
