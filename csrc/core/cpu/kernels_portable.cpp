// The baseline of the target machine: SSE2 on x86, NEON on Arm.
#include "kernel_includes.h"

#define TOME_ISA_NAMESPACE portable
#define TOME_VECTOR_BYTES 16
#define TOME_TILE_ROWS 4

#include "attention_dtypes.inl"
#include "match.inl"
#include "merge.inl"
#include "merge_add_norm.inl"

const tome::Kernels tome::kPortableKernels = {
    tome::portable::nearest,
    tome::portable::merge_rows,
    tome::portable::merge_backward_rows,
    tome::portable::merge_add_norm_rows,
    tome::portable::attention_parts,
    tome::portable::attention_backward_heads,
    tome::portable::cls_attention_head,
};
