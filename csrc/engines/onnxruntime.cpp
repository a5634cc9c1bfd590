// The operators for ONNX Runtime: a library for SessionOptions.register_custom_ops_library.

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "onnxruntime_api.h"
#include "operators.h"

namespace tome::engines::ort {
namespace {

// --- errors --------------------------------------------------------------------------------------

void check(const OrtApi* api, OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = kGetErrorMessage.of(api)(status);
    kReleaseStatus.of(api)(status);
    throw std::runtime_error(message);
}

// What `body` throws, as ONNX Runtime passes it on.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const Body& body) {
    try {
        body();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return kCreateStatus.of(api)(kOrtInvalidArgument, error.what());
    } catch (const std::exception& error) {
        return kCreateStatus.of(api)(kOrtFail, error.what());
    } catch (...) {
        return kCreateStatus.of(api)(kOrtFail, "tome_ext: an error without a message");
    }
}

// --- the session's threads -----------------------------------------------------------------------

// As many as a session may have: ONNX Runtime does not say how many it has. With fewer, tasks are
// smaller than they need be.
int most_threads() {
    static const auto count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return count;
}

struct SessionThreads {
    const OrtApi* api;
    const OrtKernelContext* context;
    int count = most_threads();

    Threads threads() { return {run, this, count}; }

    static void run(void* self, int64_t count, int64_t grain, Threads::Body body, void* context) {
        const auto& session = *static_cast<const SessionThreads*>(self);
        // A few chunks for each thread, so that one that falls behind is relieved.
        const int64_t even = (count + 4 * session.count - 1) / (4 * session.count);
        struct Loop {
            int64_t count, chunk;
            Threads::Body body;
            void* context;
            std::mutex mutex;
            std::exception_ptr error;
        } loop{count, std::max({grain, even, int64_t{1}}), body, context, {}, {}};
        const auto step = [](void* self, size_t index) {
            Loop& loop = *static_cast<Loop*>(self);
            const int64_t begin = static_cast<int64_t>(index) * loop.chunk;
            try {
                loop.body(loop.context, begin, std::min(begin + loop.chunk, loop.count));
            } catch (...) {
                const std::lock_guard<std::mutex> lock(loop.mutex);
                loop.error = std::current_exception();
            }
        };
        const auto chunks = static_cast<size_t>((count + loop.chunk - 1) / loop.chunk);
        check(session.api, kParallelFor.of(session.api)(session.context, step, chunks, 0, &loop));
        if (loop.error) std::rethrow_exception(loop.error);
    }
};

// --- tensors -------------------------------------------------------------------------------------

Tensor input(const OrtApi* api, const OrtKernelContext* context, size_t index) {
    const OrtValue* value = nullptr;
    check(api, kGetInput.of(api)(context, index, &value));
    if (value == nullptr) return {};
    Tensor tensor;
    tensor.given = true;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, kGetShape.of(api)(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> release(
        info, kReleaseShape.of(api));
    size_t rank = 0;
    check(api, kGetRank.of(api)(info, &rank));
    tensor.shape.resize(rank);
    check(api, kGetDims.of(api)(info, tensor.shape.data(), rank));
    check(api, kGetTensorData.of(api)(const_cast<OrtValue*>(value), &tensor.data));
    return tensor;
}

Tensor output(const OrtApi* api, OrtKernelContext* context, size_t index, const Shape& shape) {
    OrtValue* value = nullptr;
    check(api, kGetOutput.of(api)(context, index, shape.data(), shape.size(), &value));
    Tensor tensor{nullptr, shape, true};
    check(api, kGetTensorData.of(api)(value, &tensor.data));
    return tensor;
}

OrtElement element(DType dtype) {
    switch (dtype) {
        case DType::kFloat16:
            return kOrtFloat16;
        case DType::kBFloat16:
            return kOrtBFloat16;
        case DType::kFloat64:
            return kOrtFloat64;
        default:
            return kOrtFloat32;
    }
}

OrtElement element(Element of, DType call) {
    const std::optional<DType> dtype = dtype_of(of, call);
    return dtype.has_value() ? element(*dtype) : kOrtInt32;
}

// --- operators -----------------------------------------------------------------------------------

// An operator for one dtype, as ONNX Runtime knows it. `table` is first, so that its address is
// this one's.
struct Registered {
    OrtCustomOp table;
    const Operator* what;
    DType dtype;

    static const Registered& from(const OrtCustomOp* op) {
        return *reinterpret_cast<const Registered*>(op);
    }
};

// One node of a session.
struct Kernel {
    const OrtApi* api;
    const Operator* what;
    DType dtype;
    std::vector<double> attributes;

    Kernel(const OrtApi* api, const Registered& op, const OrtKernelInfo* info)
        : api(api), what(op.what), dtype(op.dtype) {
        for (const Attribute& attribute : what->attributes) {
            attributes.push_back(read(info, attribute));
        }
    }

    double read(const OrtKernelInfo* info, const Attribute& attribute) const {
        int64_t integer = 0;
        float real = 0;
        size_t length = 0;
        // ONNX Runtime has the same answer for what is missing and for what is of another type.
        const auto found = [&](OrtStatus* status) {
            if (status != nullptr) kReleaseStatus.of(api)(status);
            return status == nullptr;
        };
        if (found(kGetInteger.of(api)(info, attribute.name, &integer))) {
            return static_cast<double>(integer);
        }
        const bool is_real = found(kGetFloat.of(api)(info, attribute.name, &real));
        if (is_real && !attribute.integer) return real;
        if (is_real || found(kGetString.of(api)(info, attribute.name, nullptr, &length))) {
            throw std::invalid_argument(std::string("tome_ext::") + what->name + ": " +
                                        attribute.name + ": expected " +
                                        (attribute.integer ? "an integer" : "a number"));
        }
        return attribute.fallback;
    }

    void compute(OrtKernelContext* context) {
        size_t given = 0;
        check(api, kGetInputCount.of(api)(context, &given));
        std::vector<Tensor> inputs(what->inputs.size()), outputs;
        for (size_t i = 0; i < std::min(given, inputs.size()); ++i) {
            inputs[i] = input(api, context, i);
        }
        SessionThreads session{api, context};
        Call call{dtype, attributes, inputs, {}, session.threads()};
        for (const Shape& shape : output_shapes(*what, call)) {
            outputs.push_back(output(api, context, outputs.size(), shape));
        }
        call.outputs = outputs;
        what->run(call);
    }
};

Registered registered(const Operator& what, DType dtype) {
    OrtCustomOp table{};
    table.version = kApiVersion;
    table.GetName = [](const OrtCustomOp* op) { return Registered::from(op).what->name; };
    table.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* {
        return "CPUExecutionProvider";
    };
    table.GetInputTypeCount = [](const OrtCustomOp* op) {
        return Registered::from(op).what->inputs.size();
    };
    table.GetInputType = [](const OrtCustomOp* op, size_t i) {
        const Registered& self = Registered::from(op);
        return element(self.what->inputs[i].element, self.dtype);
    };
    table.GetOutputTypeCount = [](const OrtCustomOp* op) {
        return Registered::from(op).what->outputs.size();
    };
    table.GetOutputType = [](const OrtCustomOp* op, size_t i) {
        const Registered& self = Registered::from(op);
        return element(self.what->outputs[i].element, self.dtype);
    };
    table.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
        return Registered::from(op).what->inputs[i].optional ? kOrtOptional : kOrtRequired;
    };
    table.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
    table.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return int32_t{0}; };
    table.CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                              void** kernel) {
        return guarded(api, [&] { *kernel = new Kernel(api, Registered::from(op), info); });
    };
    table.KernelComputeV2 = [](void* self, OrtKernelContext* context) {
        auto& kernel = *static_cast<Kernel*>(self);
        return guarded(kernel.api, [&] { kernel.compute(context); });
    };
    table.KernelDestroy = [](void* self) { delete static_cast<Kernel*>(self); };
    return {table, &what, dtype};
}

// ONNX Runtime keeps their addresses as long as any session lives, also one of a global variable.
const std::vector<Registered>& all_registered() {
    static const auto& all = *[] {
        auto* all = new std::vector<Registered>;
        for (const Operator& what : operators()) {
            for (const DType dtype : what.dtypes) all->push_back(registered(what, dtype));
        }
        return all;
    }();
    return all;
}

}  // namespace
}  // namespace tome::engines::ort

extern "C"
#if defined(_WIN32)
    __declspec(dllexport)
#else
    __attribute__((visibility("default")))
#endif
    OrtStatus*
    RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace tome::engines;
    using namespace tome::engines::ort;
    const OrtApi* api = base->GetApi(kApiVersion);
    if (api == nullptr) {
        const OrtApi* oldest = base->GetApi(1);
        const std::string message =
            std::string("tome_ext: expected ONNX Runtime 1.17 or newer, got ") +
            base->GetVersionString();
        return kCreateStatus.of(oldest)(kOrtFail, message.c_str());
    }
    return guarded(api, [&] {
        // As ONNX Runtime keeps it, the domain stays until the process ends.
        static OrtCustomOpDomain* const domain = [&] {
            OrtCustomOpDomain* made = nullptr;
            check(api, kCreateCustomOpDomain.of(api)(kDomain, &made));
            for (const Registered& op : all_registered()) {
                check(api, kAddToDomain.of(api)(made, &op.table));
            }
            return made;
        }();
        check(api, kAddDomain.of(api)(options, domain));
    });
}
