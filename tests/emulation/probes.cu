// See probes.h.

#include "probes.h"

#include "device.h"

namespace tome_test {

using namespace tome::device;

namespace {

int* shared_ints() { return reinterpret_cast<int*>(dynamic_shared()); }
int thread_number() { return static_cast<int>(threadIdx.x); }

}  // namespace

__global__ void reverse_block(const __grid_constant__ Ints p) {
    int* shared = shared_ints();
    shared[threadIdx.x] = thread_number();
    __syncthreads();
    p.out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_operations(const __grid_constant__ Ints p) {
    const int t = thread_number();
    int sum = t;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    const bool right = __ballot_sync(kFullMask, t % 2) == 0xaaaaaaaau &&
                       __popc(__match_any_sync(kFullMask, t / 8)) == 8 &&
                       __shfl_up_sync(kFullMask, t, 1) == (t % 32 > 0 ? t - 1 : t) &&
                       __shfl_down_sync(kFullMask, t, 4, 8) == (t % 8 < 4 ? t + 4 : t) &&
                       __shfl_sync(kFullMask, t, 3) == t / 32 * 32 + 3 &&
                       __any_sync(kFullMask, t == 5) == (t < 32) && __all_sync(kFullMask, t >= 0);
    p.out[t] = right ? sum : -1;
}

__global__ void last_block_sums(const __grid_constant__ Ints p) {
    int* last = shared_ints();
    if (threadIdx.x == 0) {
        p.out[2 + blockIdx.x] = static_cast<int>(blockIdx.x);
        __threadfence();
        *last = atomicAdd(&p.out[0], 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (*last && threadIdx.x == 1) {
        for (unsigned b = 0; b < gridDim.x; ++b) p.out[1] += p.out[2 + b];
    }
}

__global__ void warp_exchange(const __grid_constant__ Ints p) {
    int* shared = shared_ints();
    shared[threadIdx.x] = thread_number();
    __syncwarp();
    p.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void async_copies(const __grid_constant__ Ints p) {
    int* shared = shared_ints() + 4 * threadIdx.x;
    int* out = p.out + 4 * threadIdx.x;
    cp_async_16(shared, out, threadIdx.x != 3);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[i] = 2 * shared[i];
}

__global__ void waits_first(const __grid_constant__ Ints p) {
    int* shared = shared_ints();
    shared[threadIdx.x] = thread_number() + static_cast<int>(blockIdx.x * blockDim.x);
    wait_for_earlier_kernels();
    let_next_kernel_begin();
    p.out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
}

__global__ void reads_without_barrier(const __grid_constant__ Ints p) {
    int* shared = shared_ints();
    shared[threadIdx.x] = thread_number();
    p.out[threadIdx.x] = shared[threadIdx.x ^ 32];
}

__global__ void writes_without_barrier(const __grid_constant__ Ints p) {
    int* shared = shared_ints();
    shared[threadIdx.x] = thread_number();
    __syncthreads();
    p.out[threadIdx.x] = shared[threadIdx.x ^ 1];
    shared[threadIdx.x] = 0;
}

__global__ void reads_other_blocks(const __grid_constant__ Ints p) {
    if (threadIdx.x == 0) {
        p.out[blockIdx.x] = 1;
        p.out[2] = p.out[blockIdx.x ^ 1];
    }
}

__global__ void shuffles_without_a_lane(const __grid_constant__ Ints p) {
    if (threadIdx.x == 7) return;
    p.out[threadIdx.x] = __shfl_xor_sync(kFullMask, thread_number(), 1);
}

__global__ void shuffles_in_two_places(const __grid_constant__ Ints p) {
    if (threadIdx.x % 2) {
        p.out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1, 1);
    } else {
        p.out[threadIdx.x] = __shfl_xor_sync(kFullMask, 2, 1);
    }
}

__global__ void shuffles_from_outside_the_mask(const __grid_constant__ Ints p) {
    if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_sync(0xffffu, thread_number(), 20);
}

__global__ void forgets_a_barrier(const __grid_constant__ Ints p) {
    if (threadIdx.x < 32) __syncthreads();
    p.out[threadIdx.x] = 0;
}

__global__ void returns_before_a_barrier(const __grid_constant__ Ints p) {
    if (threadIdx.x == 40) return;
    __syncthreads();
    p.out[threadIdx.x] = 0;
}

__global__ void forgets_to_wait_for_copies(const __grid_constant__ Ints p) {
    int* shared = shared_ints() + 4 * threadIdx.x;
    int* out = p.out + 4 * threadIdx.x;
    cp_async_16(shared, out);
    cp_async_commit();
    cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) out[i] = 2 * shared[i];
}

// Each thread copies `kInts` of its own and reads a neighbour warp's.
template <int kInts>
__device__ void copy_over_what_is_read(const Ints& p) {
    int* mine = p.out + kInts * threadIdx.x;
    const auto copy = [&] {
        int* to = shared_ints() + kInts * threadIdx.x;
        if constexpr (kInts == 4) {
            cp_async_16(to, mine);
        } else {
            cp_async_4(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(mine));
        }
        cp_async_commit();
    };
    copy();
    cp_async_wait<0>();
    __syncthreads();
    const int seen = shared_ints()[kInts * (threadIdx.x ^ 32)];
    copy();
    __syncthreads();
    cp_async_wait<0>();
    mine[0] = seen;
}

__global__ void copies_over_what_is_read(const __grid_constant__ Ints p) {
    copy_over_what_is_read<4>(p);
}

__global__ void copies_four_bytes_over_what_is_read(const __grid_constant__ Ints p) {
    copy_over_what_is_read<1>(p);
}

__global__ void passes_the_end_of_shared_memory(const __grid_constant__ Ints p) {
    p.out[threadIdx.x] = shared_ints()[threadIdx.x + 1];
}

__global__ void returns_before_waiting(const __grid_constant__ Ints p) {
    if (threadIdx.x == 9) return;
    wait_for_earlier_kernels();
    p.out[threadIdx.x] = 0;
}

__global__ void reads_before_waiting(const __grid_constant__ Ints p) {
    const int early = p.out[threadIdx.x];
    wait_for_earlier_kernels();
    p.out[threadIdx.x] = early + 1;
}

__global__ void lets_go_before_waiting(const __grid_constant__ Ints p) {
    let_next_kernel_begin();
    wait_for_earlier_kernels();
    p.out[threadIdx.x] = 0;
}

namespace {

template <class T>
void multiply(const Matrices& p) {
    // Rows of 16 bytes apart: a as 16 x 16, then b as 16 x 8.
    auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
    const int lane = thread_number();
    for (int i = lane; i < 256; i += kWarp) shared[i] = p.a[i];
    for (int i = lane; i < 128; i += kWarp) shared[256 + i] = p.b[i];
    __syncthreads();
    uint32_t a[4], b[4];
    const int row = lane % 8, matrix = lane / 8;
    ldmatrix_x4(a, shared + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    // Matrices 2 and 3 are not used; they repeat the first two.
    ldmatrix_x4_trans(b, shared + 256 + (row + matrix % 2 * 8) * 8);
    float c[4] = {}, plain[4] = {};
    const uint32_t b2[2] = {b[0], b[1]};
    for (int repeat = 0; repeat < 2; ++repeat) {
        mma_m16n8k16<T>(c, a, b2);
        mma_m16n8k16_plain<T>(plain, a, b2);
    }
    for (int i = 0; i < 4; ++i) {
        const int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        p.c[at] = c[i];
        p.c_plain[at] = plain[i];
    }
}

}  // namespace

__global__ void multiply_half(const __grid_constant__ Matrices p) { multiply<Half>(p); }
__global__ void multiply_bfloat(const __grid_constant__ Matrices p) { multiply<BFloat>(p); }

}  // namespace tome_test
