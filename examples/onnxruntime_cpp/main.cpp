// Runs a patched model without Python, in ONNX Runtime.
//
//   onnxruntime_cpp MODEL.onnx tome_ext/_onnxruntime.abi3.so IMAGES.bin BATCH
//
// IMAGES.bin holds BATCH images as float32, as the model takes them. The first values of each row
// of the first output are printed.

#include <algorithm>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

namespace {

const OrtApi& api() {
    static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (found == nullptr) {
        throw std::runtime_error("expected the ONNX Runtime of the header, or a newer one, got " +
                                 std::string(OrtGetApiBase()->GetVersionString()));
    }
    return *found;
}

void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw std::runtime_error(message);
}

// What `create(&made)` makes, until it goes out of scope.
template <class T, class Create>
std::unique_ptr<T, void (*)(T*)> owned(void (*release)(T*), const Create& create) {
    T* made = nullptr;
    check(create(&made));
    return {made, release};
}

std::vector<int64_t> dimensions(const OrtTensorTypeAndShapeInfo* info) {
    size_t rank = 0;
    check(api().GetDimensionsCount(info, &rank));
    std::vector<int64_t> shape(rank);
    check(api().GetDimensions(info, shape.data(), rank));
    return shape;
}

std::vector<float> read(const std::string& path, const std::vector<int64_t>& shape) {
    size_t count = 1;
    for (const int64_t size : shape) count *= static_cast<size_t>(size);
    std::vector<float> values(count);
    std::ifstream file(path, std::ios::binary);
    const auto bytes = static_cast<std::streamsize>(count * sizeof(float));
    if (!file.read(reinterpret_cast<char*>(values.data()), bytes)) {
        throw std::runtime_error(path + ": expected " + std::to_string(bytes) + " bytes");
    }
    return values;
}

void run(const std::filesystem::path& model, const std::filesystem::path& library,
         const std::string& images, int64_t batch) {
    const auto environment = owned<OrtEnv>(api().ReleaseEnv, [](OrtEnv** made) {
        return api().CreateEnv(ORT_LOGGING_LEVEL_WARNING, "onnxruntime_cpp", made);
    });
    const auto options = owned<OrtSessionOptions>(
        api().ReleaseSessionOptions,
        [](OrtSessionOptions** made) { return api().CreateSessionOptions(made); });
    check(api().RegisterCustomOpsLibrary_V2(options.get(), library.c_str()));
    const auto session = owned<OrtSession>(api().ReleaseSession, [&](OrtSession** made) {
        return api().CreateSession(environment.get(), model.c_str(), options.get(), made);
    });

    const auto type = owned<OrtTypeInfo>(api().ReleaseTypeInfo, [&](OrtTypeInfo** made) {
        return api().SessionGetInputTypeInfo(session.get(), 0, made);
    });
    const OrtTensorTypeAndShapeInfo* taken = nullptr;
    check(api().CastTypeInfoToTensorInfo(type.get(), &taken));
    std::vector<int64_t> shape = dimensions(taken);
    shape[0] = batch;  // the batch size is free
    std::vector<float> values = read(images, shape);

    const auto memory = owned<OrtMemoryInfo>(api().ReleaseMemoryInfo, [](OrtMemoryInfo** made) {
        return api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, made);
    });
    const auto input = owned<OrtValue>(api().ReleaseValue, [&](OrtValue** made) {
        return api().CreateTensorWithDataAsOrtValue(
            memory.get(), values.data(), values.size() * sizeof(float), shape.data(), shape.size(),
            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, made);
    });
    const OrtValue* const inputs[] = {input.get()};
    const char* const input_names[] = {"images"};  // as export_onnx.py calls them
    const char* const output_names[] = {"logits"};
    const auto output = owned<OrtValue>(api().ReleaseValue, [&](OrtValue** made) {
        return api().Run(session.get(), nullptr, input_names, inputs, 1, output_names, 1, made);
    });

    const auto given = owned<OrtTensorTypeAndShapeInfo>(
        api().ReleaseTensorTypeAndShapeInfo, [&](OrtTensorTypeAndShapeInfo** made) {
            return api().GetTensorTypeAndShape(output.get(), made);
        });
    const int64_t classes = dimensions(given.get()).at(1);
    void* logits = nullptr;
    check(api().GetTensorMutableData(output.get(), &logits));
    const int64_t shown = std::min<int64_t>(classes, 5);
    for (int64_t image = 0; image < batch; ++image) {
        const float* row = static_cast<const float*>(logits) + image * classes;
        for (int64_t i = 0; i < shown; ++i) std::cout << row[i] << (i + 1 < shown ? ' ' : '\n');
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::cerr << "usage: onnxruntime_cpp MODEL.onnx LIBRARY IMAGES.bin BATCH\n";
        return 2;
    }
    try {
        run(argv[1], argv[2], argv[3], std::stoll(argv[4]));
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "onnxruntime_cpp: " << error.what() << '\n';
        return 1;
    }
}
