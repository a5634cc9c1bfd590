#include "kernel_includes.h"

#ifdef TOME_HAS_X86_KERNELS
// After the standard headers; see kernels_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

#if !defined(__clang__)
// As in kernels_avx512.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define TOME_ISA_NAMESPACE avx512_bf16
#define TOME_VECTOR_BYTES 64
#define TOME_TILE_ROWS 12
#define TOME_X86_VECTORS 1
#define TOME_X86_BF16 1

#include "bfloat_pairs.inl"
// After the pairs, which it then uses.
#include "attention.inl"

void tome::avx512_bf16::attention_parts(const AttentionParams& p, int64_t parts, int64_t begin,
                                        int64_t end) {
    attention_parts_of<BFloat>(p, parts, begin, end);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
