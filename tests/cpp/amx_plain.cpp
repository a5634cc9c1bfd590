// The kernels for matrix units, with the plain bodies of their instructions.

#include "kernel_includes.h"

#define TOME_ISA_NAMESPACE plain_amx
#define TOME_VECTOR_BYTES 64
#define TOME_TILE_ROWS 12

#include "attention_amx.inl"
#include "attention_backward_amx.inl"
#include "cls_attention_amx.inl"

#include "amx_kernels.h"

namespace tome_test {

const tome::Kernels kPlainAmxKernels = [] {
    tome::Kernels kernels = tome::kPortableKernels;
    kernels.attention_parts = tome::plain_amx::attention_parts;
    kernels.attention_backward_heads = tome::plain_amx::attention_backward_heads;
    kernels.cls_attention_head = [](const tome::ClsAttentionParams& p, int64_t image, int64_t head,
                                    void* weights) {
        tome::plain_amx::cls_attention_head(p, image, head, static_cast<float*>(weights));
    };
    return kernels;
}();

}  // namespace tome_test
