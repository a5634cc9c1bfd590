// The operators for OpenVINO: a library for ov::Core::add_extension, which then reads ONNX graphs
// that hold them, and its own files of such graphs.

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

#include "operators.h"

namespace tome::engines {
namespace {

// The threads that OpenVINO runs this node on.
Threads engine_threads() {
    const auto run = [](void*, int64_t count, int64_t grain, Threads::Body body, void* context) {
        tbb::parallel_for(tbb::blocked_range<int64_t>(0, count, static_cast<size_t>(grain)),
                          [&](const tbb::blocked_range<int64_t>& range) {
                              body(context, range.begin(), range.end());
                          });
    };
    return {run, nullptr, tbb::this_task_arena::max_concurrency()};
}

ov::element::Type element(DType dtype) {
    switch (dtype) {
        case DType::kFloat16:
            return ov::element::f16;
        case DType::kBFloat16:
            return ov::element::bf16;
        case DType::kFloat64:
            return ov::element::f64;
        default:
            return ov::element::f32;
    }
}

ov::element::Type element(Element of, DType call) {
    const std::optional<DType> dtype = dtype_of(of, call);
    return dtype.has_value() ? element(*dtype) : ov::element::i32;
}

Shape shape_of(const ov::PartialShape& shape) {
    Shape dims;
    for (const ov::Dimension& dim : shape) dims.push_back(dim.is_static() ? dim.get_length() : -1);
    return dims;
}

// A node of any of our operators.
class Node : public ov::op::Op {
  public:
    explicit Node(size_t index) : index_(index) {
        for (const Attribute& attribute : what().attributes) {
            attributes_.push_back(attribute.fallback);
        }
    }

    // `arguments` are of the inputs that are there, whose bits are set in `given`.
    Node(size_t index, const ov::OutputVector& arguments, std::vector<double> attributes,
         int64_t given)
        : ov::op::Op(arguments), index_(index), attributes_(std::move(attributes)), given_(given) {
        constructor_validate_and_infer_types();
    }

    static const ov::DiscreteTypeInfo& type_of(size_t index) {
        static const std::vector<ov::DiscreteTypeInfo> types = [] {
            std::vector<ov::DiscreteTypeInfo> all;
            for (const Operator& what : operators()) all.emplace_back(what.name, kDomain);
            return all;
        }();
        return types[index];
    }

    const ov::DiscreteTypeInfo& get_type_info() const override { return type_of(index_); }

    std::shared_ptr<ov::Node> clone_with_new_inputs(
        const ov::OutputVector& arguments) const override {
        return std::make_shared<Node>(index_, arguments, attributes_, given_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        for (size_t i = 0; i < attributes_.size(); ++i) {
            visitor.on_attribute(what().attributes[i].name, attributes_[i]);
        }
        visitor.on_attribute("given", given_);
        return true;
    }

    void validate_and_infer_types() override {
        std::vector<Tensor> inputs(what().inputs.size());
        DType dtype = what().dtypes.front();
        size_t next = 0;
        bool ranked = true;
        for (size_t i = 0; i < inputs.size(); ++i) {
            if (!is_given(i)) continue;
            NODE_VALIDATION_CHECK(this, next < get_input_size(), "expected one more input");
            const ov::PartialShape& shape = get_input_partial_shape(next);
            ranked = ranked && shape.rank().is_static();
            if (ranked) inputs[i] = {nullptr, shape_of(shape), true};
            for (const DType known : what().dtypes) {
                const bool decides = what().inputs[i].element == Element::kTokens ||
                                     what().inputs[i].element == Element::kSums;
                if (decides && get_input_element_type(next) == element(known)) dtype = known;
            }
            ++next;
        }
        next = 0;
        for (size_t i = 0; i < inputs.size(); ++i) {
            if (!is_given(i)) continue;
            const ov::element::Type expected = element(what().inputs[i].element, dtype),
                                    got = get_input_element_type(next++);
            NODE_VALIDATION_CHECK(this, got.is_dynamic() || got == expected, what().inputs[i].name,
                                  ": expected ", expected, ", got ", got);
        }
        NODE_VALIDATION_CHECK(this, next == get_input_size(), "expected ", next, " inputs, got ",
                              get_input_size());
        dtype_ = dtype;
        std::vector<Shape> shapes;
        if (ranked) shapes = output_shapes(what(), {dtype, attributes_, inputs, {}});
        set_output_size(what().outputs.size());
        for (size_t i = 0; i < what().outputs.size(); ++i) {
            ov::PartialShape shape = ov::PartialShape::dynamic();
            if (ranked) shape = std::vector<ov::Dimension>(shapes[i].begin(), shapes[i].end());
            set_output_type(i, element(what().outputs[i].element, dtype), shape);
        }
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& results, const ov::TensorVector& arguments) const override {
        std::vector<Tensor> inputs(what().inputs.size()), outputs;
        size_t next = 0;
        for (size_t i = 0; i < inputs.size(); ++i) {
            if (!is_given(i)) continue;
            const ov::Tensor& x = arguments[next++];
            // It is only read: an input and an output are of one type here.
            inputs[i] = {const_cast<void*>(static_cast<const void*>(x.data())),
                         Shape(x.get_shape().begin(), x.get_shape().end()), true};
        }
        Call call{dtype_, attributes_, inputs, {}, engine_threads()};
        const std::vector<Shape> shapes = output_shapes(what(), call);
        for (size_t i = 0; i < results.size(); ++i) {
            results[i].set_shape(ov::Shape(shapes[i].begin(), shapes[i].end()));
            outputs.push_back({results[i].data(), shapes[i], true});
        }
        call.outputs = outputs;
        what().run(call);
        return true;
    }

  private:
    const Operator& what() const { return operators()[index_]; }
    bool is_given(size_t input) const { return (given_ >> input & 1) != 0; }

    size_t index_;
    std::vector<double> attributes_;
    int64_t given_ = 0;
    DType dtype_ = DType::kFloat32;
};

// Nodes of an OpenVINO file.
class Reader : public ov::BaseOpExtension {
  public:
    explicit Reader(size_t index) : index_(index) {}

    const ov::DiscreteTypeInfo& get_type_info() const override { return Node::type_of(index_); }

    ov::OutputVector create(const ov::OutputVector& inputs,
                            ov::AttributeVisitor& visitor) const override {
        const auto node = std::make_shared<Node>(index_);
        node->set_arguments(inputs);
        if (node->visit_attributes(visitor)) node->constructor_validate_and_infer_types();
        return node->outputs();
    }

    std::vector<ov::Extension::Ptr> get_attached_extensions() const override { return {}; }

  private:
    size_t index_;
};

// Nodes of an ONNX graph.
ov::OutputVector from_onnx(size_t index, const ov::frontend::NodeContext& context) {
    const Operator& what = operators()[index];
    ov::OutputVector arguments;
    int64_t given = 0;
    OPENVINO_ASSERT(context.get_input_size() <= what.inputs.size(), "tome_ext::", what.name,
                    ": expected at most ", what.inputs.size(), " inputs, got ",
                    context.get_input_size());
    for (size_t i = 0; i < context.get_input_size(); ++i) {
        const ov::Output<ov::Node> input = context.get_input(static_cast<int>(i));
        // It stands for an optional input that the node leaves out.
        if (input.get_node()->get_type_name() == std::string("NullNode")) continue;
        arguments.push_back(input);
        given |= int64_t{1} << i;
    }
    std::vector<double> attributes;
    for (const Attribute& attribute : what.attributes) {
        if (attribute.integer) {
            const auto fallback = static_cast<int64_t>(attribute.fallback);
            attributes.push_back(
                static_cast<double>(context.get_attribute<int64_t>(attribute.name, fallback)));
        } else {
            const auto fallback = static_cast<float>(attribute.fallback);
            attributes.push_back(context.get_attribute<float>(attribute.name, fallback));
        }
    }
    return std::make_shared<Node>(index, arguments, attributes, given)->outputs();
}

std::vector<ov::Extension::Ptr> extensions() {
    std::vector<ov::Extension::Ptr> all;
    for (size_t i = 0; i < operators().size(); ++i) {
        all.push_back(std::make_shared<Reader>(i));
        all.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(
            operators()[i].name, kDomain,
            [i](const ov::frontend::NodeContext& context) { return from_onnx(i, context); }));
    }
    return all;
}

}  // namespace
}  // namespace tome::engines

OPENVINO_CREATE_EXTENSIONS(tome::engines::extensions())
