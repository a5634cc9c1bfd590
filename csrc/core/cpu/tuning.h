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

// How much of the next image's set B is asked for while this image is multiplied. It lies in L2
// beside kPackedBytes.
constexpr int64_t kAheadBytes = 384 * 1024;

// Columns of set B to pack at a time, a multiple of `panel`, at least one panel.
constexpr int64_t columns_per_chunk(int64_t dim, int64_t element_bytes, int64_t panel) {
    const int64_t columns = kPackedBytes / std::max<int64_t>(1, dim * element_bytes);
    return std::max(panel, columns / panel * panel);
}

// One image is spread over threads when there are too few images to keep all threads busy, or
// they don't divide evenly and the remainder matters, and the image itself is worth it: 2^17
// multiply-adds come with keys of 10 microseconds to read, twice that where another core's cache
// holds them, and two forks and joins take as long as half of it.
constexpr bool split_image(int64_t batch, int64_t threads, int64_t multiply_adds) {
    if (threads <= 1 || multiply_adds < (int64_t{1} << 17)) return false;
    return batch < 4 * threads && batch % threads != 0;
}

// Keys and values of one head that are packed together stay in L2 while all queries pass over them,
// beside the scores of a tile in L1: 512 keys of 64 channels in float32 are 256 KiB.
constexpr int64_t kKeyBlockBytes = 256 * 1024;
constexpr int64_t kMaxBlockKeys = 1024;

// Keys per block, a multiple of `panel`, evenly shared out.
constexpr int64_t keys_per_block(int64_t keys, int64_t dim, int64_t element_bytes, int64_t panel) {
    const int64_t fit = kKeyBlockBytes / std::max<int64_t>(1, 2 * dim * element_bytes);
    const int64_t most = std::clamp<int64_t>(fit, panel, kMaxBlockKeys);
    const int64_t blocks = std::max<int64_t>(1, (keys + most - 1) / most);
    const int64_t share = (keys + blocks - 1) / blocks;
    return std::max(panel, (share + panel - 1) / panel * panel);
}

// Into how many parts the queries of one head are split, so that all threads have work to the end.
// Each part packs the head's keys again, which costs as much as about 8 queries.
constexpr int64_t query_parts(int64_t heads, int64_t threads, int64_t queries) {
    if (heads <= 0 || threads <= 1 || heads % threads == 0 || heads >= 4 * threads) return 1;
    return std::clamp<int64_t>(queries / 64, 1, (4 * threads + heads - 1) / heads);
}

}  // namespace tome::tuning
