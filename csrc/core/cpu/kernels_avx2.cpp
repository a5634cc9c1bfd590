#include "kernel_includes.h"

#ifdef TOME_HAS_X86_KERNELS
// After the standard headers, so that none of their functions is compiled for a machine that may
// not be there: the linker keeps one copy of each for all.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define TOME_ISA_NAMESPACE avx2
#define TOME_VECTOR_BYTES 32
#define TOME_TILE_ROWS 6
#define TOME_X86_VECTORS 1

#include "attention_dtypes.inl"
#include "match.inl"
#include "merge.inl"
#include "merge_add_norm.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const tome::Kernels tome::kAvx2Kernels = {
    tome::avx2::nearest,
    tome::avx2::merge_rows,
    tome::avx2::merge_backward_rows,
    tome::avx2::merge_add_norm_rows,
    tome::avx2::attention_parts,
    tome::avx2::attention_backward_heads,
    tome::avx2::cls_attention_head,
};
#endif
