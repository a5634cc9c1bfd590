// Hopper's own instructions, on top of device.h: products of a warpgroup (wgmma) with operands in
// shared memory, their descriptors and fences. They exist for sm_90a alone. A kernel that uses them
// has its body inside `if constexpr (kHasWarpgroups)` and its bound on threads from
// warpgroup_bound; before it is chosen, takes_blocks_of (launch.h) says whether this build has it
// for the device.
//
// A warpgroup is four warps, 128 threads, the first a multiple of four: warp w owns rows 16 w to
// 16 w + 15 of a product's 64. In registers, operands and results are laid out as mma_m16n8k16's.
#pragma once

#include "device.h"

namespace tome::device {

#if defined(TOME_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif

inline constexpr int kWarpgroup = 128;

// For __launch_bounds__: the threads of so many warpgroups, or fewer where the kernel has no body.
inline constexpr int warpgroup_bound(int groups) {
    return kHasWarpgroups ? groups * kWarpgroup : kWarp;
}

// --- tiles of 64 channels in shared memory
// --------------------------------------------------------------------------------
//
// A row is 64 values of 16 bits, 128 bytes, in eight pieces of 16. Piece c of row r lies where
// piece c ^ (r % 8) would: then the eight rows of a matrix of 8 x 8 meet no bank twice, read along
// or across. The tile begins at a multiple of 1024 bytes. It is what a product can read in place,
// its rows being either the columns of the product or the channels that are summed over.
inline constexpr int kTileRowBytes = 128;
inline constexpr int kTileAlign = 1024;

// Bytes from the tile's begin to piece `piece` of row `row`.
__device__ __forceinline__ constexpr int tile_offset(int row, int piece) {
    return row * kTileRowBytes + ((piece ^ (row & 7)) << 4);
}

// What a product is told of an operand in shared memory. Its address may be moved along by
// operand_rows (down the tile) and operand_channels (to the right).
//   bits 0-13   address / 16
//   bits 16-29  unused here (one repetition only)
//   bits 32-45  bytes from eight rows to the next eight, / 16
//   bits 62-63  1: pieces of 128-byte rows are exchanged as above
__device__ __forceinline__ uint64_t operand_of(const void* tile) {
#ifdef TOME_EMULATION
    const auto address = static_cast<uint64_t>(tome_emulation::shared_offset(tile));
#else
    const auto address = static_cast<uint64_t>(__cvta_generic_to_shared(tile));
#endif
    constexpr uint64_t kEightRows = 8 * kTileRowBytes / 16;
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | uint64_t{1} << 62;
}
// rows: a multiple of 8. channels: a multiple of 16, below 64.
__device__ __forceinline__ constexpr uint64_t operand_rows(int rows) {
    return static_cast<uint64_t>(rows * kTileRowBytes / 16);
}
__device__ __forceinline__ constexpr uint64_t operand_channels(int channels) {
    return static_cast<uint64_t>(channels * 2 / 16);
}

// --- order
// --------------------------------------------------------------------------------
//
// A product runs beside the threads that started it. Between
//   products_begin();  product(..); product(..); ..  products_commit();  and  products_wait<0>();
// nobody may touch its registers. Shared memory that threads wrote, cp_async too, is seen by
// products of all threads behind: share_with_products() by each writer, then a barrier.

__device__ __forceinline__ void share_with_products() {
#ifdef TOME_EMULATION
    tome_emulation::share_with_products();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void products_begin() {
#ifdef TOME_EMULATION
    tome_emulation::products_begin();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void products_wait() {
#ifdef TOME_EMULATION
    tome_emulation::products_wait();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// Keeps the compiler from moving uses of a product's registers across the place where this stands.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
#else
    (void)x;
#endif
}

// --- the product
// --------------------------------------------------------------------------------

// Whether an operand's rows in shared memory are the product's columns (or rows), each with the
// channels to sum over side by side; or are themselves what is summed over.
enum class TileRows { kAreColumns, kAreSummed };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The accumulators are asm's operands %0 to %31; then come a, b, whether to add, and how they lie.
#define TOME_D8(d, i)                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define TOME_PRODUCT_BEGIN(type, add)                                                              \
    "{\n.reg .pred add;\nsetp.ne.b32 add, %" add                                                   \
    ", 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                              \
    " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
// a in registers
#define TOME_PRODUCT_RS(type)                                                                     \
    asm volatile(TOME_PRODUCT_BEGIN(type, "37") "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}\n" \
                 : TOME_D8(d, 0), TOME_D8(d, 8), TOME_D8(d, 16), TOME_D8(d, 24)                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransB))
// a in shared memory
#define TOME_PRODUCT_SS(type)                                                         \
    asm volatile(TOME_PRODUCT_BEGIN(type, "34") "%32, %33, add, 1, 1, %35, %36;\n}\n" \
                 : TOME_D8(d, 0), TOME_D8(d, 8), TOME_D8(d, 16), TOME_D8(d, 24)       \
                 : "l"(a), "l"(b), "r"(add), "n"(kTransA), "n"(kTransB))
#endif

// d (64 x 64) += a (64 x 16) * b (16 x 64), or = where `add` is 0. Called by a whole warpgroup.
//   d  as mma_m16n8k16's c, of each 8 columns: d[4 n] to d[4 n + 3] are columns 8 n to 8 n + 7
//   a  as mma_m16n8k16's a
//   b  operand_of a tile: its 64 rows are the product's columns, channels are summed over
//      (kAreColumns); or 16 rows are summed over, channels are columns (kAreSummed)
template <class T, TileRows kB>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                        int add) {
#ifdef TOME_EMULATION
    tome_emulation::warpgroup_product(d, a, 0, false, b, kB == TileRows::kAreSummed, add != 0,
                                      [](uint16_t bits) { return to_float(T{bits}); });
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kTransB = kB == TileRows::kAreSummed;
    if constexpr (std::is_same_v<T, Half>) {
        TOME_PRODUCT_RS("f16");
    } else {
        TOME_PRODUCT_RS("bf16");
    }
#endif
}

// The same with a in shared memory, operand_of a tile whose 64 rows are the product's
// (kAreColumns), or whose 16 rows are summed over and channels are the product's rows (kAreSummed).
template <class T, TileRows kA, TileRows kB>
__device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b, int add) {
#ifdef TOME_EMULATION
    tome_emulation::warpgroup_product(d, nullptr, a, kA == TileRows::kAreSummed, b,
                                      kB == TileRows::kAreSummed, add != 0,
                                      [](uint16_t bits) { return to_float(T{bits}); });
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kTransA = kA == TileRows::kAreSummed, kTransB = kB == TileRows::kAreSummed;
    if constexpr (std::is_same_v<T, Half>) {
        TOME_PRODUCT_SS("f16");
    } else {
        TOME_PRODUCT_SS("bf16");
    }
#endif
}

}  // namespace tome::device
