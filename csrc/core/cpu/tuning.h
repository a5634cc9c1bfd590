// Sizes at which the CPU kernels change path, as pure functions with the reason for each.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tome::tuning {

// Bytes a task should move before a second thread is worth waking: a fork and join of the pool
// takes 2 to 5 microseconds, in which one core copies about this much from its own cache.
constexpr int64_t kBytesPerTask = 64 * 1024;

// Rows (or tokens) of `row_bytes` each that make one task.
constexpr int64_t rows_per_task(int64_t row_bytes) {
    return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
}

// The part of set B that is packed at a time must stay in the core's own cache while all of set A
// passes over it. 512 KiB leaves room beside it in the 1 MiB and larger L2 caches of servers, and
// keeps the extra memory of a large match small: 2,048 x 320 float32 are packed in five parts.
constexpr int64_t kPackedBytes = 512 * 1024;

// Columns of set B to pack at a time, a multiple of `panel`, at least one panel.
constexpr int64_t columns_per_chunk(int64_t dim, int64_t element_bytes, int64_t panel) {
    const int64_t columns = kPackedBytes / std::max<int64_t>(1, dim * element_bytes);
    return std::max(panel, columns / panel * panel);
}

// One image is spread over threads when there are too few images to keep all threads busy, or
// they don't divide evenly and the remainder matters, and the image itself is worth it: 2^20
// multiply-adds are about 20 microseconds on one core.
constexpr bool split_image(int64_t batch, int64_t threads, int64_t multiply_adds) {
    if (threads <= 1 || multiply_adds < (int64_t{1} << 20)) return false;
    return batch < 4 * threads && batch % threads != 0;
}

}  // namespace tome::tuning
