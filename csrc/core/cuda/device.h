// Everything in the kernels that is not plain C++: PTX and packed conversions. Each has a device
// body and a host body, the second for the tests' emulator (tests/emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef TOME_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace tome::device {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// --- 16-bit floats, as bits
// -----------------------------------------------------------------------

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

#ifdef TOME_EMULATION

inline float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Scaling by 2^112 also makes subnormals right.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}
inline BFloat to_bfloat(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Half to_half(float x) {
    const uint32_t bits = __float_as_uint(x);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < 0x1p-14f) {  // subnormal: a whole number of 2^-24
        return {
            static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
    }
    const uint32_t magnitude = (bits & 0x7fffffff) - (112u << 23);
    return {static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

#else

__device__ __forceinline__ float to_float(BFloat x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ BFloat to_bfloat(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
__device__ __forceinline__ Half to_half(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

#endif

// The type that sums of T are taken in, and the way there and back.
template <class T>
struct Accumulate {
    using Type = float;
};
template <>
struct Accumulate<double> {
    using Type = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Half x) { return to_float(x); }
__device__ __forceinline__ float widen(BFloat x) { return to_float(x); }

template <class T>
__device__ __forceinline__ T narrow(typename Accumulate<T>::Type x) {
    if constexpr (sizeof(T) == sizeof(x)) {
        return x;
    } else if constexpr (std::is_same_v<T, Half>) {
        return to_half(x);
    } else {
        return to_bfloat(x);
    }
}

// 1 / x to within a unit in the last place, without the slow path of a division.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef TOME_EMULATION
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// 1 / sqrt(x) to within two units in the last place.
#ifdef TOME_EMULATION
inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline double inverse_sqrt(double x) { return 1.0 / std::sqrt(x); }
#else
__device__ __forceinline__ float inverse_sqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_sqrt(double x) { return rsqrt(x); }
#endif

// sqrt(x) to within three units in the last place; x >= 0, NaN of infinity.
template <class A>
__device__ __forceinline__ A square_root(A x) {
    return x == 0 ? A(0) : x * inverse_sqrt(x);
}

// 2^x to within two units in the last place; 0 where that is below 2^-126, 0 of -inf.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef TOME_EMULATION
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// x, of which the compiler no longer knows where it came from: what is computed from it is computed
// there and then, not kept in registers from where the same was computed before.
__device__ __forceinline__ unsigned forget_origin(unsigned x) {
#ifndef TOME_EMULATION
    asm volatile("" : "+r"(x));
#endif
    return x;
}
template <class T>
__device__ __forceinline__ const T* forget_origin(const T* x) {
#ifndef TOME_EMULATION
    asm volatile("" : "+l"(x));
#endif
    return x;
}

// Two 16-bit values in a register; `low` is the one at the lower address.
__device__ __forceinline__ uint32_t pack(BFloat low, BFloat high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
__device__ __forceinline__ uint32_t pack(Half low, Half high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// The same of two floats, rounded to nearest even: the bits of narrow, in one instruction.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if !defined(TOME_EMULATION) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
    uint32_t pair;
    if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
#else
    return pack(narrow<T>(low), narrow<T>(high));
#endif
}

// --- vectors in memory
// ----------------------------------------------------------------------------

// kCount elements that lie side by side, loaded and stored at once: 16 bytes, or one element.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    static_assert(sizeof(T) * kCount <= 16);
    T v[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, kCount>*>(from);
}
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& value) {
    *reinterpret_cast<Vector<T, kCount>*>(to) = value;
}

// The same as bits, to copy them in whole registers.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
    using Type = uint16_t;
};
template <>
struct Word<4> {
    using Type = uint32_t;
};
template <>
struct Word<8> {
    using Type = uint64_t;
};
template <>
struct Word<16> {
    using Type = uint4;
};

template <class T, int kCount>
__device__ __forceinline__ typename Word<sizeof(T) * kCount>::Type load_word(const T* from) {
    return *reinterpret_cast<const typename Word<sizeof(T) * kCount>::Type*>(from);
}
template <class T, int kCount>
__device__ __forceinline__ void store_word(T* to, typename Word<sizeof(T) * kCount>::Type value) {
    *reinterpret_cast<typename Word<sizeof(T) * kCount>::Type*>(to) = value;
}

// The same to global memory, and not taken apart: what it makes of several registers of its own the
// compiler may store by fours of bytes, a quarter of every sector at a time.
template <class T, int kCount>
__device__ __forceinline__ void store_global(T* to, typename Word<sizeof(T) * kCount>::Type value) {
#ifndef TOME_EMULATION
    if constexpr (sizeof(T) * kCount == 16) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                     "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                     : "memory");
        return;
    }
#endif
    store_word<T, kCount>(to, value);
}

// From one to the other. As elements, 16-bit values take a whole register each: words are for what
// is held, vectors for what is computed with.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> as_vector(
    typename Word<sizeof(T) * kCount>::Type word) {
    Vector<T, kCount> out;
    memcpy(&out, &word, sizeof(out));
    return out;
}
template <class T, int kCount>
__device__ __forceinline__ typename Word<sizeof(T) * kCount>::Type as_word(
    const Vector<T, kCount>& value) {
    typename Word<sizeof(T) * kCount>::Type out;
    memcpy(&out, &value, sizeof(out));
    return out;
}

// A vector of sums rounded to T, as bits: 16-bit floats two at a time.
template <class T, int kCount, class A>
__device__ __forceinline__ typename Word<sizeof(T) * kCount>::Type narrow_word(
    const A (&values)[kCount]) {
    if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
        uint32_t pairs[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            pairs[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
        }
        typename Word<sizeof(T) * kCount>::Type out;
        memcpy(&out, pairs, sizeof(out));
        return out;
    } else {
        Vector<T, kCount> rounded;
#pragma unroll
        for (int i = 0; i < kCount; ++i) rounded.v[i] = narrow<T>(values[i]);
        return as_word(rounded);
    }
}

// --- shared memory
// --------------------------------------------------------------------------------

// The block's dynamic shared memory, the only kind in use; aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef TOME_EMULATION
    return tome_emulation::dynamic_shared();
#else
    extern __shared__ __align__(1024) unsigned char tome_dynamic_shared[];
    return tome_dynamic_shared;
#endif
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16; of 16 zeros instead
// where `valid` is false (`global` must still be a valid address of 16 bytes). The bytes are there
// for the copying thread after cp_async_wait, for others after a barrier behind that.
//   kAhead  brings the 256 bytes around it to L2, for who copies the rest of them next
template <bool kAhead = false>
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef TOME_EMULATION
    tome_emulation::async_copy_16(shared, global, valid ? 16 : 0);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;  // the rest is filled with zeros
    if constexpr (kAhead) {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to),
                     "l"(global), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                     "r"(bytes)
                     : "memory");
    }
#else
    *static_cast<uint4*>(shared) =
        valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// The same of four bytes.
__device__ __forceinline__ void cp_async_4(float* shared, const float* global) {
#ifdef TOME_EMULATION
    tome_emulation::async_copy_4(shared, global);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef TOME_EMULATION
    tome_emulation::async_commit();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kLeft of the newest groups are still on their way.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
#ifdef TOME_EMULATION
    tome_emulation::async_wait(kLeft);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// --- programmatic dependent launch
// --------------------------------------------------------------------------------
//
// A kernel started by launch_overlapping (launch.h) may begin while the one before it on the stream
// still runs. Before sm_90 both of these do nothing.

// Returns when the kernels before this one have ended and all they wrote can be seen. Every thread
// calls it, also one with nothing to do, before it reads or writes global memory: what follows this
// kernel counts on its end being behind theirs.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#ifdef TOME_EMULATION
    tome_emulation::wait_for_earlier_kernels();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // launch.h's kWaitsFrom
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, if it was started by launch_overlapping, as soon as every block of
// this one has come here or ended. It says nothing about memory: the other one waits for that.
__device__ __forceinline__ void let_next_kernel_begin() {
#ifdef TOME_EMULATION
    tome_emulation::let_next_kernel_begin();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- matrices of 16-bit values, spread over a warp
// ------------------------------------------------
//
// With g = lane / 4 and t = lane % 4, a lane holds of an 8 x 8 matrix the elements (g, 2t) and
// (g, 2t + 1), packed into one register:
//
//          column  0 1  2 3  4 5  6 7
//   row 0          L0   L1   L2   L3
//   row 1          L4   L5   L6   L7      and so on, to lane 31 in row 7

// Loads four 8 x 8 matrices from shared memory. Lane 8 i + j gives the address of row j of matrix
// i: 8 values, 16 bytes, aligned to 16.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef TOME_EMULATION
    uint32_t in[4];  // read here, so that the race detector sees whose address it was
    for (int i = 0; i < 4; ++i) in[i] = static_cast<const uint32_t*>(row)[i];
    tome_emulation::collective(
        kFullMask, "ldmatrix_x4", tome_emulation::Site::current(), in, out,
        [](const tome_emulation::Lanes& lanes) TOME_NO_HOOKS {
            for (int lane = 0; lane < kWarp; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    static_cast<uint32_t*>(lanes.out[lane])[i] =
                        static_cast<const uint32_t*>(lanes.in[8 * i + lane / 4])[lane % 4];
                }
            }
        });
#else
    const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
#ifdef TOME_EMULATION
    uint32_t in[4];
    for (int i = 0; i < 4; ++i) in[i] = static_cast<const uint32_t*>(row)[i];
    tome_emulation::collective(
        kFullMask, "ldmatrix_x4_trans", tome_emulation::Site::current(), in, out,
        [](const tome_emulation::Lanes& lanes) TOME_NO_HOOKS {
            const auto element = [&](int i, int r, int c) TOME_NO_HOOKS {
                return static_cast<const uint32_t*>(lanes.in[8 * i + r])[c / 2] >> 16 * (c % 2) &
                       0xffff;
            };
            for (int lane = 0; lane < kWarp; ++lane) {
                const int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; ++i) {
                    static_cast<uint32_t*>(lanes.out[lane])[i] =
                        element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16;
                }
            }
        });
#else
    const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
#endif
}

// One value of a packed register, as float: T is Half or BFloat.
template <class T>
__device__ __forceinline__ float unpack(uint32_t packed, int which) {
    return to_float(T{static_cast<uint16_t>(packed >> 16 * which)});
}

// c (16 x 8, float) += a (16 x 16) * b (16 x 8), of T = Half or BFloat, by shuffles and plain
// multiplications: for chips whose tensor cores lack it. The layout is mma_m16n8k16's. Not inlined:
// a kernel has hundreds of these, which took the compiler minutes.
template <class T>
__device__ __attribute__((noinline)) void mma_m16n8k16_plain(float (&c)[4], const uint32_t (&a)[4],
                                                             const uint32_t (&b)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = lane / 4 * 4;  // the first lane that holds this lane's rows of a
    const int column = lane % 4 * 8;
    for (int s = 0; s < 4; ++s) {  // lane s of four holds k = 2s, 2s + 1, 2s + 8, 2s + 9
        for (int half = 0; half < 2; ++half) {
            const uint32_t a_low = __shfl_sync(kFullMask, a[2 * half], row + s);
            const uint32_t a_high = __shfl_sync(kFullMask, a[2 * half + 1], row + s);
            const uint32_t b_left = __shfl_sync(kFullMask, b[half], column + s);
            const uint32_t b_right = __shfl_sync(kFullMask, b[half], column + 4 + s);
            for (int j = 0; j < 2; ++j) {
                c[0] += unpack<T>(a_low, j) * unpack<T>(b_left, j);
                c[1] += unpack<T>(a_low, j) * unpack<T>(b_right, j);
                c[2] += unpack<T>(a_high, j) * unpack<T>(b_left, j);
                c[3] += unpack<T>(a_high, j) * unpack<T>(b_right, j);
            }
        }
    }
}

// d = c + a * b of the same, on tensor cores; d may be c. Registers hold, as 8 x 8 matrices in the
// layout above,
//   a: rows 0-7, k 0-7 | rows 8-15, k 0-7 | rows 0-7, k 8-15 | rows 8-15, k 8-15
//   b: k 0-7 | k 8-15, transposed: lane (g, t) has column g, k = 2t and 2t + 1
//   c, d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef TOME_EMULATION
    struct In {
        uint32_t a[4], b[2];
        float c[4];
    };
    const In in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    tome_emulation::collective(
        kFullMask, "mma_m16n8k16", tome_emulation::Site::current(), &in, d,
        [](const tome_emulation::Lanes& lanes) TOME_NO_HOOKS {
            float ma[16][16], mb[16][8];
            for (int lane = 0; lane < kWarp; ++lane) {
                const In& mine = *static_cast<const In*>(lanes.in[lane]);
                const int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; ++i) {
                    for (int j = 0; j < 2; ++j) {
                        ma[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = unpack<T>(mine.a[i], j);
                        if (i < 2) mb[2 * t + 8 * i + j][g] = unpack<T>(mine.b[i], j);
                    }
                }
            }
            for (int lane = 0; lane < kWarp; ++lane) {
                const In& mine = *static_cast<const In*>(lanes.in[lane]);
                for (int i = 0; i < 4; ++i) {
                    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
                    double sum = mine.c[i];
                    for (int k = 0; k < 16; ++k) sum += double(ma[m][k]) * double(mb[k][n]);
                    static_cast<float*>(lanes.out[lane])[i] = static_cast<float>(sum);
                }
            }
        });
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, Half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
              "f"(c[1]), "f"(c[2]), "f"(c[3]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
              "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
#else
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    if constexpr (std::is_same_v<T, Half>) {  // Turing's tensor cores take half of k at a time
        for (int k = 0; k < 2; ++k) {
            asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
        }
    } else {
        mma_m16n8k16_plain<T>(d, a, b);
    }
#endif
}

// c += a * b.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(c, a, b, c);
}

}  // namespace tome::device
