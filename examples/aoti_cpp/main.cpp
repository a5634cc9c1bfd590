// Runs a packaged model without Python: export.py writes the three files of FOLDER.
//
//   aoti_cpp FOLDER tome_ext/_C.abi3.so [tome_ext/_C_cuda.abi3.so]

#include <dlfcn.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

// The operators register themselves with torch when their library is loaded, before the package.
void load_operators(const std::string& path) {
    if (dlopen(path.c_str(), RTLD_NOW) == nullptr) {
        throw std::runtime_error("cannot load " + path + ": " + dlerror());
    }
}

// Reads what torch.save of Python has written.
c10::IValue load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot read " + path);
    }
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    return torch::jit::pickle_load(bytes);
}

int run(const std::string& folder) {
    torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
    const std::string device = model.get_metadata()["AOTI_DEVICE_KEY"];
    const at::Tensor images = load(folder + "/images.pt").toTensor().to(c10::Device(device));
    const c10::IValue expected = load(folder + "/logits.pt");

    int failures = 0;
    // The batch of the example, then its first image alone: the batch size is free.
    for (const int64_t batch : {images.size(0), int64_t{1}}) {
        std::vector<at::Tensor> inputs{images.narrow(0, 0, batch)};
        const std::vector<at::Tensor> outputs = model.run(inputs);
        for (size_t i = 0; i < outputs.size(); ++i) {
            const at::Tensor logits = outputs[i].cpu();
            const at::Tensor wanted = expected.toListRef().at(i).toTensor().narrow(0, 0, batch);
            const bool same = at::allclose(logits, wanted, 1e-3, 1e-3);
            failures += same ? 0 : 1;
            std::cout << "batch of " << batch << ", output " << i << " of shape " << logits.sizes()
                      << ": largest difference from Python "
                      << (logits - wanted).abs().max().item<double>() << (same ? "" : ", TOO LARGE")
                      << '\n';
        }
    }
    return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: aoti_cpp FOLDER OPERATOR_LIBRARY...\n";
        return 2;
    }
    try {
        for (int i = 2; i < argc; ++i) {
            load_operators(argv[i]);
        }
        return run(argv[1]);
    } catch (const std::exception& error) {
        std::cerr << "aoti_cpp: " << error.what() << '\n';
        return 1;
    }
}
