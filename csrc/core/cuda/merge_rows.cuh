// What the kernels that merge rows of channels share: who works on which row, the members of a row,
// and division.
#pragma once

#include "device.h"
#include "tiles.h"
#include "tome_core/types.h"

namespace tome::device {

// Threads of a block; each of its warps works on rows, or on chunks of them, of its own.
inline constexpr int kRowsBlock = tiles::kWarpsPerBlock * kWarp;

__device__ __forceinline__ int64_t lane_id() { return threadIdx.x % kWarp; }

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ bool inside(int64_t index, int64_t count) {
    return index >= 0 && index < count;
}

// This warp's items of an image's `items`, one after another: body(item).
template <class Body>
__device__ __forceinline__ void for_each_item(int64_t items, const Body& body) {
    const auto warp = static_cast<int64_t>(threadIdx.x / kWarp);
    int64_t item = int64_t{blockIdx.x} * tiles::kWarpsPerBlock + warp;
#pragma unroll 1
    for (; item < items; item += int64_t{gridDim.x} * tiles::kWarpsPerBlock) body(item);
}

// The blocks for it: blockIdx.y is the image.
inline dim3 grid_of(int64_t items, int64_t batch) {
    return dim3(tiles::blocks_for(items),
                static_cast<unsigned>(batch < tiles::kMaxImages ? batch : tiles::kMaxImages));
}

// A lane's vectors of a row: every kWarp-th from its own on, as far as the row goes.
struct Lane {
    int64_t begin;  // element of the lane's first vector
    int left;       // elements from there to the row's end, or more than a warp works on at once

    template <int kVec>
    static __device__ __forceinline__ Lane of(int64_t first, int64_t channels) {
        const int64_t begin = (first + lane_id()) * kVec;
        return {begin, static_cast<int>(clamp(channels - begin, 0, 1 << 30))};
    }

    template <int kVec>
    __device__ __forceinline__ bool has(int vector) const {
        return vector * kWarp * kVec < left;
    }
};

// The tokens of an output row.
struct Members {
    const int32_t* tokens;  // (count)
    int count;
};

// Those of row m of image b, as far as they lie inside the plan; P has the plan's fields.
template <class P>
__device__ __forceinline__ Members members_of(const P& p, int64_t b, int64_t m) {
    const int32_t* offsets = p.offsets + b * (p.rows + 1) + m;
    const int64_t begin = clamp(offsets[0], 0, p.tokens);
    const int64_t end = clamp(offsets[1], begin, p.tokens);
    return {p.members + b * p.tokens + begin, static_cast<int>(end - begin)};
}

// body(token, weight) for each member that is one of the image's `tokens`, in order, all lanes
// together; weights are ones unless `weighted`. Returns their sum.
template <class A, class Body>
__device__ __forceinline__ A for_each_member(const Members& members, int64_t tokens,
                                             const float* size, bool weighted, const Body& body) {
    A total = 0;
#pragma unroll 1
    for (int begin = 0; begin < members.count; begin += kWarp) {
        // Each lane fetches one member, then all go through them together.
        const int m = begin + static_cast<int>(lane_id());
        const int32_t mine = m < members.count ? members.tokens[m] : -1;
        const bool valid = inside(mine, tokens);
        const float my_weight = weighted && valid ? size[mine] : 1.0f;
        const int here = members.count - begin < kWarp ? members.count - begin : kWarp;
#pragma unroll 1
        for (int j = 0; j < here; ++j) {
            const int32_t token = __shfl_sync(kFullMask, mine, j);
            const float weight = __shfl_sync(kFullMask, my_weight, j);
            if (!inside(token, tokens)) continue;
            total += A(weight);
            body(token, A(weight));
        }
    }
    return total;
}

// sum / divisor from the divisor's reciprocal: the slow path of the chip's own division is a call,
// around which registers spill. The remainder, which fma finds exactly, corrects the quotient to
// what a division gives but for the rarest ties; infinities make it NaN.
template <class A>
__device__ __forceinline__ A divide(A sum, A divisor, A inverse) {
    const A quotient = sum * inverse;
    const A remainder = fma(-quotient, divisor, sum);
    return remainder == remainder ? fma(remainder, inverse, quotient) : quotient;
}

// go(T{}) with the element type T of a dtype.
template <class Go>
cudaError_t for_dtype(DType dtype, const Go& go) {
    switch (dtype) {
        case DType::kFloat32:
            return go(float{});
        case DType::kFloat16:
            return go(Half{});
        case DType::kBFloat16:
            return go(BFloat{});
        case DType::kFloat64:
            break;
    }
    return go(double{});
}

}  // namespace tome::device
