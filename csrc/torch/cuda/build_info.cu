// What this CUDA library was built with. Compiled by nvcc, so the archs are those really built.

#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// Without the parentheses of a function-like macro: 800,900 arrives as one argument list.
#define TOME_STRING(...) #__VA_ARGS__
#define TOME_EXPAND(...) TOME_STRING(__VA_ARGS__)

// "800,900,1200" as nvcc spells compute capabilities, to "8.0 9.0 12.0".
std::string archs() {
    std::string out;
    int number = 0;
    for (const char* p = TOME_EXPAND(__CUDA_ARCH_LIST__);; ++p) {
        if (*p >= '0' && *p <= '9') {
            number = number * 10 + (*p - '0');
        } else if (*p == ',' || *p == '\0') {
            if (!out.empty()) out += ' ';
            out += std::to_string(number / 100) + '.' + std::to_string(number / 10 % 10);
            number = 0;
            if (*p == '\0') return out;
        }
    }
}

// JSON, so that adding a field never changes the schema.
std::string cuda_build_info() {
    return "{\"cuda\": \"" TOME_EXPAND(__CUDACC_VER_MAJOR__) "." TOME_EXPAND(
               __CUDACC_VER_MINOR__) "\", \"archs\": \"" +
           archs() + "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tome, CompositeExplicitAutograd, m) {
    m.impl("_cuda_build_info", TORCH_BOX(&cuda_build_info));
}
