// What this CUDA library was built with, and whether a GPU can run it. Compiled by nvcc as the
// kernels are, so the archs are those really built.

#include "obstacle.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace tome::torch_layer {
namespace {

__global__ void probe() {}

// What no later call will find otherwise; anything else, like a full memory, may pass.
bool lasts(cudaError_t error) {
    switch (error) {
        case cudaErrorInsufficientDriver:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidPtx:
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorJitCompilerNotFound:
        case cudaErrorJitCompilationDisabled:
            return true;
        default:
            return false;
    }
}

}  // namespace

// The runtime is asked, not a list of architectures: it knows what the library holds, which of it
// the driver can still compile, and whether the driver is new enough for this runtime at all.
bool find_obstacle(int device, cudaError_t& obstacle) {
    static const bool switched_off = [] {
        const char* asked = std::getenv("TOME_CUDA_KERNELS");
        return asked != nullptr && std::strcmp(asked, "0") == 0;
    }();
    constexpr int kMostDevices = 64;
    static std::atomic<int> known[kMostDevices];  // 0, or 1 + the answer
    if (switched_off) {
        obstacle = cudaSuccess;
        return true;
    }
    const bool fits = device >= 0 && device < kMostDevices;
    const int answer = fits ? known[device].load(std::memory_order_relaxed) : 0;
    if (answer != 0) {
        obstacle = static_cast<cudaError_t>(answer - 1);
        return obstacle != cudaSuccess;
    }
    cudaFuncAttributes attributes{};
    obstacle = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
    if (obstacle != cudaSuccess) cudaGetLastError();
    const bool lasting = lasts(obstacle);
    if (fits && (lasting || obstacle == cudaSuccess)) {
        known[device].store(1 + static_cast<int>(obstacle), std::memory_order_relaxed);
    }
    return lasting;
}

}  // namespace tome::torch_layer

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

// Why this device runs plain PyTorch operators: the name of a CUDA error, or the switch that asks
// for them. "" if it runs the kernels.
std::string cuda_obstacle(int64_t device) {
    const torch::stable::accelerator::DeviceGuard guard(
        static_cast<torch::stable::accelerator::DeviceIndex>(device));
    cudaError_t obstacle = cudaSuccess;
    if (!tome::torch_layer::find_obstacle(static_cast<int>(device), obstacle)) return "";
    return obstacle == cudaSuccess ? "TOME_CUDA_KERNELS=0" : cudaGetErrorName(obstacle);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tome, CompositeExplicitAutograd, m) {
    m.impl("_cuda_build_info", TORCH_BOX(&cuda_build_info));
    m.impl("_cuda_obstacle", TORCH_BOX(&cuda_obstacle));
}
