// Entry points of attention, its gradient and the class token's attention: split over threads.

#include "tome_core/attention.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "tuning.h"

namespace tome {
namespace {

// out (keys) = the mean over heads of one image's rows, in the order of the heads.
template <class T>
void cls_attention_image(const ClsAttentionParams& p, int64_t image, const Threads& threads) {
    T* out = static_cast<T*>(p.out) + image * p.keys;
    const Scratch<T> rows(p.heads * p.keys);  // (heads, keys)
    threads.parallel_for(p.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
            active_kernels().cls_attention_head(p, image, head, rows.get() + head * p.keys);
        }
    });
    std::fill(out, out + p.keys, T(0));
    for (int64_t head = 0; head < p.heads; ++head) {
        const T* row = rows.get() + head * p.keys;
        for (int64_t j = 0; j < p.keys; ++j) out[j] += row[j];
    }
    for (int64_t j = 0; j < p.keys; ++j) out[j] /= T(p.heads);
}

template <class T>
void cls_attention_batch(const ClsAttentionParams& p, const Threads& threads) {
    if (p.batch < threads.count) {
        for (int64_t image = 0; image < p.batch; ++image) {
            cls_attention_image<T>(p, image, threads);
        }
        return;
    }
    threads.parallel_for(p.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
            cls_attention_image<T>(p, image, Threads::serial());
        }
    });
}

}  // namespace

void attention(const AttentionParams& p, const Threads& threads) {
    const int64_t heads = p.batch * p.heads;
    if (heads == 0 || p.queries == 0) return;
    const int64_t parts = tuning::query_parts(heads, threads.count, p.queries);
    threads.parallel_for(heads * parts, 1, [&](int64_t begin, int64_t end) {
        active_kernels().attention_parts(p, parts, begin, end);
    });
}

void attention_backward(const AttentionBackwardParams& p, const Threads& threads) {
    threads.parallel_for(p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
        active_kernels().attention_backward_heads(p, begin, end);
    });
}

void cls_attention(const ClsAttentionParams& p, const Threads& threads) {
    if (p.dtype == DType::kFloat64) {
        cls_attention_batch<double>(p, threads);
    } else {
        cls_attention_batch<float>(p, threads);
    }
}

}  // namespace tome
