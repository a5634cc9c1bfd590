// select_cuda: one block per image. It finds the last score that is kept eight bits at a time, and
// then writes the plan by prefix sums. Nothing depends on the order in which threads run.

#include "tome_core/select.h"

#include "launch.h"
#include "plan.cuh"
#include "tome_core/cuda.h"

namespace tome {
namespace {

using namespace tome::device;

constexpr int kThreads = tiles::kSelectThreads;

struct Shared {
    int histogram[kThreads];  // by the digit
    int scratch[kWarp + 1];
    int digit, left, done;
};

// A score as a number that sorts like it: NaN lowest, both zeros alike. Scores are read as bits.
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) {
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0;
    if (size == 0) return 0x80000000u;
    return bits == size ? bits | 0x80000000u : ~bits;
}
__device__ __forceinline__ uint64_t rank_of(uint64_t bits) {
    const uint64_t size = bits << 1 >> 1;
    if (size > 0x7ff0000000000000u) return 0;
    if (size == 0) return uint64_t{1} << 63;
    return bits == size ? bits | uint64_t{1} << 63 : ~bits;
}

// The last candidate that is kept: those of a higher rank are, and of its own rank those up to its
// index.
template <class Bits>
struct Cut {
    Bits rank;
    uint32_t index;

    __device__ bool includes(Bits other, uint32_t i) const {
        return other > rank || (other == rank && i <= index);
    }
};

// One step of finding the cut: of the candidates of which `is_candidate(i)` holds, the digit
// `digit_of(i)` of the one that is `left`-th from the top. Every thread gets the same answer.
template <class IsCandidate, class DigitOf>
__device__ __forceinline__ int digit_of_cut(Shared& s, int64_t count, int64_t* left,
                                            const IsCandidate& is_candidate,
                                            const DigitOf& digit_of) {
    const int thread = static_cast<int>(threadIdx.x);
    s.histogram[thread] = 0;
    __syncthreads();
    for (int64_t i = thread; i < count; i += kThreads) {
        if (is_candidate(i)) atomicAdd(&s.histogram[digit_of(i)], 1);
    }
    __syncthreads();
    const int digit = kThreads - 1 - thread;  // from the top
    const int here = s.histogram[digit];
    int total = 0;
    const int above = block_exclusive_sum(here, &total, s.scratch);
    if (above < *left && *left <= above + here) {
        s.digit = digit;
        s.left = static_cast<int>(*left - above);
        s.done = *left - above == here;  // all of them are kept: no need to look closer
    }
    __syncthreads();
    *left = s.left;
    return s.digit;
}

template <class Bits>
__device__ __forceinline__ Cut<Bits> find_cut(Shared& s, const Bits* scores, int64_t count,
                                              int64_t keep) {
    static_assert(kThreads == 256, "a thread for each value of a digit");
    constexpr uint32_t kLast = 0xffffffffu;
    if (keep == 0) return {static_cast<Bits>(~Bits{0}), 0};  // no score has that rank
    int64_t left = keep;
    Bits rank = 0;
    for (int shift = 8 * sizeof(Bits) - 8; shift >= 0; shift -= 8) {
        const Bits above = shift + 8 == 8 * sizeof(Bits) ? Bits{0} : ~Bits{0} << (shift + 8);
        const int digit = digit_of_cut(
            s, count, &left, [&](int64_t i) { return ((rank_of(scores[i]) ^ rank) & above) == 0; },
            [&](int64_t i) { return static_cast<int>(rank_of(scores[i]) >> shift & 255); });
        rank |= static_cast<Bits>(digit) << shift;
        if (s.done != 0) return {rank, kLast};
    }
    // Several of this very rank: the lower indices are kept.
    uint32_t inverse = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        const uint32_t above = shift == 24 ? 0u : ~0u << (shift + 8);
        const int digit = digit_of_cut(
            s, count, &left,
            [&](int64_t i) {
                return rank_of(scores[i]) == rank &&
                       ((~static_cast<uint32_t>(i) ^ inverse) & above) == 0;
            },
            [&](int64_t i) { return static_cast<int>(~static_cast<uint32_t>(i) >> shift & 255); });
        inverse |= static_cast<uint32_t>(digit) << shift;
        if (s.done != 0) return {rank, ~inverse};
    }
    return {rank, ~inverse};
}

template <class Bits>
__device__ __forceinline__ void select_image(Shared& s, const SelectParams& p, int64_t b) {
    const Bits* scores = static_cast<const Bits*>(p.scores) + b * p.stride_batch;
    const int64_t thread = threadIdx.x;
    const int64_t prefix = p.num_prefix_tokens < p.tokens ? p.num_prefix_tokens : p.tokens;
    const int64_t kept = p.keep < p.tokens - prefix ? prefix + p.keep : p.tokens;
    const bool fuses = p.fuse && kept < p.tokens;
    const int64_t rows = kept + fuses;
    int32_t* assign = p.assign + b * p.tokens;
    int32_t* members = p.members + b * p.tokens;
    int32_t* offsets = p.offsets + b * (rows + 1);

    const bool all = kept == p.tokens;
    Cut<Bits> cut{0, 0};
    if (!all) cut = find_cut(s, scores + prefix, p.tokens - prefix, kept - prefix);
    int64_t before = 0;  // tokens kept so far
    for (int64_t base = 0; base < p.tokens; base += kThreads) {
        const int64_t n = base + thread;
        const bool stays =
            n < p.tokens && (all || n < prefix ||
                             cut.includes(rank_of(scores[n]), static_cast<uint32_t>(n - prefix)));
        int total = 0;
        const int64_t row = before + block_exclusive_sum(stays, &total, s.scratch);
        if (n < p.tokens) {
            assign[n] = static_cast<int32_t>(stays ? row : fuses ? kept : -1);
            members[stays ? row : kept + n - row] = static_cast<int32_t>(n);
        }
        before += total;
    }
    for (int64_t m = thread; m <= kept; m += kThreads) offsets[m] = static_cast<int32_t>(m);
    if (thread == 0 && fuses) offsets[rows] = static_cast<int32_t>(p.tokens);
    __syncthreads();  // the next image's histogram takes the place of this one's
}

__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ SelectParams p) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    wait_for_earlier_kernels();  // they may have written the scores, and have read the outputs
    for (int64_t b = blockIdx.x; b < p.batch; b += tiles::kMaxImages) {
        if (p.dtype == DType::kFloat64) {
            select_image<uint64_t>(shared, p, b);
        } else {
            select_image<uint32_t>(shared, p, b);
        }
    }
}

}  // namespace

cudaError_t select_cuda(const SelectParams& params, cudaStream_t stream) {
    // As many as the kernel's step, or one for each image if they are fewer.
    const int64_t blocks = params.batch < tiles::kMaxImages ? params.batch : tiles::kMaxImages;
    return launch_overlapping(select_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                              sizeof(Shared), stream, params);
}

}  // namespace tome
