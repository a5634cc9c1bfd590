// A stand-in for the CUDA runtime, so that kernels run on a CPU in tests: the .cu files compile as
// C++20 with this folder first on the include path. It holds what our kernels use, not all of CUDA.
//
// The threads of a block are fibers; blocks run one after another. Everything that waits
// (__syncthreads, shuffles, votes) switches fibers. See emulator.h for what is checked.
//
// Shared memory is dynamic only, through tome::device::dynamic_shared(): the emulator then knows
// its exact bounds and can poison it. A static __shared__ does not compile here, on purpose.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define TOME_EMULATION 1

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

// The kernels' files are compiled with hooks on every memory access (see races.cpp); the emulator's
// own functions are not kernels' accesses.
#define TOME_NO_HOOKS __attribute__((no_sanitize("thread")))

// --- types
// ----------------------------------------------------------------------------------------

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- the host's side
// ------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "error in the emulator";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);

// --- inside a kernel
// ------------------------------------------------------------------------------

// Set by the emulator whenever it switches to another thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace tome_emulation {

// std::source_location, which Clang 14 has not.
struct Site {
    const char* file;
    int line;

    static constexpr Site current(const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
        return {file, line};
    }
};

// One lane's part of a warp-wide operation: waits until every lane that `mask` names has come to
// the same `site`; then `apply` fills every lane's `out` from every lane's `in`.
struct Lanes {
    unsigned mask;
    const void* in[32];  // null for lanes that `mask` does not name
    void* out[32];
};
using Apply = void (*)(const Lanes&);
void collective(unsigned mask, const char* what, const Site& site, const void* in, void* out,
                Apply apply);

// Stops the block with a failure.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Tells the race detector of an access that no hook sees.
void note_access(const void* address, size_t bytes, Access access);

// A __syncthreads; returns the number of threads whose `predicate` was not 0.
int block_barrier(const char* what, int predicate, const Site& site);
void warp_barrier(unsigned mask, const Site& site);

unsigned char* dynamic_shared();  // exactly as many bytes as the launch asked for
void wait_for_earlier_kernels();
void let_next_kernel_begin();
void async_copy_16(void* shared, const void* global, int bytes);
void async_copy_4(void* shared, const void* global);
void async_commit();
void async_wait(int groups_left);

// --- warpgroups (device_hopper.h)

uint64_t shared_offset(const void* data);  // from the begin of dynamic shared memory
void share_with_products();
void products_begin();
void products_wait();

// One warp's 16 rows of d (64 x 64) += a (64 x 16) * b (16 x 64). Operands in shared
// memory are read as their descriptors say; `a` is in registers unless null. The result is in `d`
// only after products_wait; until then there is NaN.
void warpgroup_product(float* d, const uint32_t* a, uint64_t a_shared, bool a_rows_summed,
                       uint64_t b_shared, bool b_rows_summed, bool add, float (*to_float)(uint16_t),
                       const Site& site = Site::current());

template <class T, class Pick>
TOME_NO_HOOKS T shuffle(unsigned mask, const char* what, const Site& site, T value, int argument,
                        int width, Pick) {
    static_assert(std::is_trivially_copyable_v<T>);
    struct In {
        T value;
        int argument, width;
    };
    In in{value, argument, width};
    T out{};
    collective(mask, what, site, &in, &out, [](const Lanes& lanes) TOME_NO_HOOKS {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(lanes.mask >> lane & 1)) continue;
            const In& mine = *static_cast<const In*>(lanes.in[lane]);
            const int base = lane / mine.width * mine.width;
            const int from = Pick{}(lane, base, mine.argument, mine.width);
            if (!(lanes.mask >> from & 1)) {
                fail("lane %d shuffles from lane %d, which mask %08x does not name", lane, from,
                     lanes.mask);
            }
            *static_cast<T*>(lanes.out[lane]) = static_cast<const In*>(lanes.in[from])->value;
        }
    });
    return out;
}

// Every lane gets combine(combine(first, second), ...) of the lanes' values.
template <class T, class Combine>
TOME_NO_HOOKS T reduce(unsigned mask, const char* what, const Site& site, T value, Combine) {
    T out{};
    collective(mask, what, site, &value, &out, [](const Lanes& lanes) TOME_NO_HOOKS {
        T total{};
        bool first = true;
        for (int lane = 0; lane < 32; ++lane) {
            if (!(lanes.mask >> lane & 1)) continue;
            const T& mine = *static_cast<const T*>(lanes.in[lane]);
            total = first ? mine : Combine{}(total, mine);
            first = false;
        }
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes.mask >> lane & 1) *static_cast<T*>(lanes.out[lane]) = total;
        }
    });
    return out;
}

// One OS thread runs everything, so a plain update is atomic.
template <class T, class Update>
TOME_NO_HOOKS T atomic(T* address, Update update) {
    note_access(address, sizeof(T), Access::kAtomic);
    const T before = *address;
    *address = update(before);
    return before;
}

}  // namespace tome_emulation

#define TOME_SITE const tome_emulation::Site& site = tome_emulation::Site::current()

inline void __syncthreads(TOME_SITE) { tome_emulation::block_barrier("__syncthreads", 0, site); }
inline int __syncthreads_count(int predicate, TOME_SITE) {
    return tome_emulation::block_barrier("__syncthreads_count", predicate, site);
}
inline int __syncthreads_or(int predicate, TOME_SITE) {
    return tome_emulation::block_barrier("__syncthreads_or", predicate, site) != 0;
}
inline int __syncthreads_and(int predicate, TOME_SITE) {
    return tome_emulation::block_barrier("__syncthreads_and", !predicate, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, TOME_SITE) {
    tome_emulation::warp_barrier(mask, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, TOME_SITE) {
    return tome_emulation::shuffle(
        mask, "__shfl_sync", site, value, source, width,
        [](int, int base, int from, int w) { return base + (from & (w - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, TOME_SITE) {
    return tome_emulation::shuffle(mask, "__shfl_xor_sync", site, value, flip, width,
                                   [](int lane, int base, int by, int w) {
                                       const int from = lane ^ by;
                                       return from < base + w ? from : lane;
                                   });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, TOME_SITE) {
    return tome_emulation::shuffle(
        mask, "__shfl_up_sync", site, value, static_cast<int>(by), width,
        [](int lane, int base, int d, int) { return lane - d >= base ? lane - d : lane; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, TOME_SITE) {
    return tome_emulation::shuffle(
        mask, "__shfl_down_sync", site, value, static_cast<int>(by), width,
        [](int lane, int base, int d, int w) { return lane + d < base + w ? lane + d : lane; });
}

TOME_NO_HOOKS inline unsigned __ballot_sync(unsigned mask, int predicate, TOME_SITE) {
    unsigned out = 0;
    tome_emulation::collective(
        mask, "__ballot_sync", site, &predicate, &out,
        [](const tome_emulation::Lanes& lanes) TOME_NO_HOOKS {
            unsigned votes = 0;
            for (int lane = 0; lane < 32; ++lane) {
                if (lanes.in[lane] && *static_cast<const int*>(lanes.in[lane])) votes |= 1u << lane;
            }
            for (void* out : lanes.out) {
                if (out) *static_cast<unsigned*>(out) = votes;
            }
        });
    return out;
}
inline int __any_sync(unsigned mask, int predicate, TOME_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, TOME_SITE) {
    return __ballot_sync(mask, predicate, site) == mask;
}
template <class T>
TOME_NO_HOOKS unsigned __match_any_sync(unsigned mask, T value, TOME_SITE) {
    unsigned out = 0;
    tome_emulation::collective(
        mask, "__match_any_sync", site, &value, &out,
        [](const tome_emulation::Lanes& lanes) TOME_NO_HOOKS {
            for (int lane = 0; lane < 32; ++lane) {
                if (!lanes.in[lane]) continue;
                unsigned same = 0;
                for (int other = 0; other < 32; ++other) {
                    if (lanes.in[other] && *static_cast<const T*>(lanes.in[other]) ==
                                               *static_cast<const T*>(lanes.in[lane])) {
                        same |= 1u << other;
                    }
                }
                *static_cast<unsigned*>(lanes.out[lane]) = same;
            }
        });
    return out;
}

// --- atomics
// --------------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return tome_emulation::atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return tome_emulation::atomic(address,
                                  [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// --- arithmetic
// -----------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
