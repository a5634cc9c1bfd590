#include "kernel_includes.h"

#ifdef TOME_HAS_X86_KERNELS
// After the standard headers; see kernels_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#if !defined(__clang__)
// GCC's own avx512fintrin.h reads a deliberately undefined vector (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define TOME_ISA_NAMESPACE avx512
#define TOME_VECTOR_BYTES 64
#define TOME_TILE_ROWS 12
#define TOME_X86_VECTORS 1

#include "attention_dtypes.inl"
#include "match.inl"
#include "merge.inl"
#include "merge_add_norm.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const tome::Kernels tome::kAvx512Kernels = {
    tome::avx512::nearest,
    tome::avx512::merge_rows,
    tome::avx512::merge_backward_rows,
    tome::avx512::merge_add_norm_rows,
    tome::avx512::attention_parts,
    tome::avx512::attention_backward_heads,
    tome::avx512::cls_attention_head,
};
#endif
