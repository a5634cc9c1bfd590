// The operators as inference engines call them: named nodes with tensors and numbers for
// attributes. Engines differ in how they ask for this, not in what they ask; onnxruntime.cpp and
// openvino.cpp are thin.
//
// Every tensor is dense. Queries, keys and metrics are (batch, tokens, heads, dim), as a linear
// layer writes them, so that no engine need transpose what it multiplies.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tome_core/types.h"

namespace tome::engines {

using Shape = std::vector<int64_t>;  // -1 for a dimension that is not known yet

struct Tensor {
    void* data = nullptr;  // null while only shapes are asked for
    Shape shape;
    bool given = false;  // whether an optional input is there
};

enum class Element {
    kTokens,  // the dtype of the call
    kSums,    // float32, or float64 where the dtype of the call is
    kFloat32,
    kInt32,
};

struct Argument {
    const char* name;
    Element element;
    bool optional = false;
};

struct Attribute {
    const char* name;
    bool integer;
    double fallback;  // its value where a node has none
    double least, most;
};

// One node and what it is given.
struct Call {
    DType dtype;
    std::span<const double> attributes;  // in the order of Operator::attributes
    std::span<const Tensor> inputs, outputs;
    Threads threads = Threads::serial();
};

// `shapes` and `run` throw std::invalid_argument for inputs that do not go together, or that hold
// no plan; the message begins with the operator's name. Call `shapes` through output_shapes.
struct Operator {
    const char* name;
    std::vector<Argument> inputs, outputs;
    std::vector<Attribute> attributes;
    std::vector<DType> dtypes;                       // those of the calls it takes
    std::vector<Shape> (*shapes)(const Call& call);  // of the outputs; reads no data
    void (*run)(const Call& call);                   // `outputs` have these shapes
};

extern const char* const kDomain;  // of the nodes: "tome_ext"

// What an argument's elements are in a call of this dtype; none for int32.
std::optional<DType> dtype_of(Element element, DType call);

const std::vector<Operator>& operators();  // there until the process ends

// The shapes of a call's outputs. Throws std::invalid_argument for attributes out of range too.
std::vector<Shape> output_shapes(const Operator& what, const Call& call);

}  // namespace tome::engines
