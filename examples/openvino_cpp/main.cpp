// Runs a patched model without Python, in OpenVINO.
//
//   openvino_cpp MODEL.onnx tome_ext/_openvino.abi3.so IMAGES.bin BATCH
//
// IMAGES.bin holds BATCH images as float32, as the model takes them. The first values of each row
// of the first output are printed.

#include <algorithm>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

#include <openvino/openvino.hpp>

namespace {

void run(const std::string& model, const std::string& library, const std::string& images,
         size_t batch) {
    ov::Core core;
    core.add_extension(library);  // before the model is read, whose nodes it knows
    ov::CompiledModel compiled =
        core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));

    ov::PartialShape shape = compiled.input().get_partial_shape();
    shape[0] = static_cast<ov::Dimension::value_type>(batch);  // the batch size is free
    ov::Tensor input(ov::element::f32, shape.to_shape());
    std::ifstream file(images, std::ios::binary);
    const auto bytes = static_cast<std::streamsize>(input.get_byte_size());
    if (!file.read(reinterpret_cast<char*>(input.data()), bytes)) {
        throw std::runtime_error(images + ": expected " + std::to_string(bytes) + " bytes");
    }

    ov::InferRequest request = compiled.create_infer_request();
    request.set_input_tensor(input);
    request.infer();
    const ov::Tensor logits = request.get_output_tensor();
    const size_t classes = logits.get_shape()[1];
    for (size_t image = 0; image < batch; ++image) {
        const float* row = logits.data<float>() + image * classes;
        for (size_t i = 0; i < std::min<size_t>(classes, 5); ++i) {
            std::cout << row[i] << (i + 1 < std::min<size_t>(classes, 5) ? ' ' : '\n');
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::cerr << "usage: openvino_cpp MODEL.onnx LIBRARY IMAGES.bin BATCH\n";
        return 2;
    }
    try {
        run(argv[1], argv[2], argv[3], std::stoul(argv[4]));
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "openvino_cpp: " << error.what() << '\n';
        return 1;
    }
}
