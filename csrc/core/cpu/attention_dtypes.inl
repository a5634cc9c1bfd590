// Attention, its gradients and the class token's attention, of whichever dtype the params name.
#ifndef TOME_ATTENTION_DTYPES_INL
#define TOME_ATTENTION_DTYPES_INL

#include "attention.inl"
#include "attention_backward.inl"
#include "cls_attention.inl"

namespace tome::TOME_ISA_NAMESPACE {

void attention_parts(const AttentionParams& p, int64_t parts, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return attention_parts_of<float>(p, parts, begin, end);
        case DType::kFloat16:
            return attention_parts_of<Half>(p, parts, begin, end);
        case DType::kBFloat16:
            return attention_parts_of<BFloat>(p, parts, begin, end);
        case DType::kFloat64:
            return attention_parts_of<double>(p, parts, begin, end);
    }
}

void attention_backward_heads(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return attention_backward_heads_of<float>(p, begin, end);
        case DType::kFloat16:
            return attention_backward_heads_of<Half>(p, begin, end);
        case DType::kBFloat16:
            return attention_backward_heads_of<BFloat>(p, begin, end);
        case DType::kFloat64:
            return attention_backward_heads_of<double>(p, begin, end);
    }
}

void cls_attention_head(const ClsAttentionParams& p, int64_t image, int64_t head, void* weights) {
    switch (p.dtype) {
        case DType::kFloat32:
            return cls_attention_head_of<float>(p, image, head, static_cast<float*>(weights));
        case DType::kFloat16:
            return cls_attention_head_of<Half>(p, image, head, static_cast<float*>(weights));
        case DType::kBFloat16:
            return cls_attention_head_of<BFloat>(p, image, head, static_cast<float*>(weights));
        case DType::kFloat64:
            return cls_attention_head_of<double>(p, image, head, static_cast<double*>(weights));
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_ATTENTION_DTYPES_INL
