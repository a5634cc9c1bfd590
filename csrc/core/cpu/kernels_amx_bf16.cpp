#include "kernel_includes.h"

#ifdef TOME_HAS_X86_KERNELS
// After the standard headers; see kernels_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl," \
                          "avx512bf16,amx-tile,amx-bf16"))),                  \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC target("amx-tile,amx-bf16,prefer-vector-width=512")
#endif

#if !defined(__clang__)
// As in kernels_avx512.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define TOME_ISA_NAMESPACE amx_bf16
#define TOME_VECTOR_BYTES 64
#define TOME_TILE_ROWS 12
#define TOME_X86_VECTORS 1
#define TOME_X86_BF16 1
#define TOME_X86_AMX 1

#include "attention_amx.inl"
#include "attention_backward_amx.inl"
#include "cls_attention_amx.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
