// The device: a GPU, or the stand-in of tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef TOME_EMULATION
#include "emulator.h"
#endif

namespace gpu_check {

#ifdef TOME_EMULATION
inline constexpr bool kEmulated = true;
inline cudaError_t device_allocate(void** data, size_t bytes) {
    *data = std::malloc(bytes);
    return *data == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
inline void device_free(void* data) { std::free(data); }
inline cudaError_t device_fill(void* data, int value, size_t bytes) {
    std::memset(data, value, bytes);
    return cudaSuccess;
}
inline cudaError_t upload(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t download(void* to, const void* from, size_t bytes) {
    return upload(to, from, bytes);
}
inline cudaError_t device_wait() { return cudaSuccess; }
inline std::string error_text(cudaError_t error) {
    return std::string(cudaGetErrorString(error)) + ": " + tome_emulation::last_failure();
}
inline std::string device_name() { return "emulator"; }
// Another order of threads and blocks every time.
inline void choose_order(int run) { tome_emulation::options().seed = static_cast<uint32_t>(run); }
#else
inline constexpr bool kEmulated = false;
inline cudaError_t device_allocate(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
inline void device_free(void* data) { cudaFree(data); }
inline cudaError_t device_fill(void* data, int value, size_t bytes) {
    return cudaMemsetAsync(data, value, bytes, nullptr);
}
inline cudaError_t upload(void* to, const void* from, size_t bytes) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
}
inline cudaError_t download(void* to, const void* from, size_t bytes) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost);
}
inline cudaError_t device_wait() { return cudaDeviceSynchronize(); }
inline std::string error_text(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}
inline std::string device_name() {
    cudaDeviceProp about{};
    return cudaGetDeviceProperties(&about, 0) == cudaSuccess ? about.name : "no GPU";
}
inline void choose_order(int) {}
#endif

// What a CUDA call answered, thrown to where a case is reported.
struct CudaError {
    cudaError_t error;
    const char* where;
};

inline void check(cudaError_t error, const char* where) {
    if (error != cudaSuccess) throw CudaError{error, where};
}

}  // namespace gpu_check
