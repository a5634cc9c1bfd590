// Small kernels, right and wrong ones, by which the emulator itself is tested.
#pragma once

#include "emulator.h"

namespace tome_test {

struct Ints {
    int* out;
};
using Probe = void (*)(Ints);

// Right ones.
void reverse_block(Ints p);    // out[thread] through shared memory: 4 bytes per thread
void warp_operations(Ints p);  // out[thread] = sum of the warp's thread numbers, or -1
void last_block_sums(Ints p);  // out[0]: ticket, out[1]: sum of block numbers, out[2 + block]
void warp_exchange(Ints p);    // out[thread] = its neighbour's number, by __syncwarp
void async_copies(Ints p);     // out[4 * thread + i] doubled, by cp_async_16; zeros for thread 3
void waits_first(Ints p);      // out[thread] = its number, shared memory before the wait; lets go

// Wrong ones.
void reads_without_barrier(Ints p);
void writes_without_barrier(Ints p);
void reads_other_blocks(Ints p);
void shuffles_without_a_lane(Ints p);
void shuffles_in_two_places(Ints p);
void shuffles_from_outside_the_mask(Ints p);
void forgets_a_barrier(Ints p);
void returns_before_a_barrier(Ints p);
void forgets_to_wait_for_copies(Ints p);  // out as async_copies
void copies_over_what_is_read(Ints p);    // by a neighbour warp, with the barrier behind the copies
void copies_four_bytes_over_what_is_read(Ints p);
void passes_the_end_of_shared_memory(Ints p);
void returns_before_waiting(Ints p);  // these three if they may overlap
void reads_before_waiting(Ints p);
void lets_go_before_waiting(Ints p);

// mma_m16n8k16 of Half (index 0) or BFloat (1), and ldmatrix. One warp.
struct Matrices {
    const uint16_t* a;  // (16, 16)
    const uint16_t* b;  // (16, 8): row k, column n
    float* c;           // (16, 8) out, by tensor cores
    float* c_plain;     // (16, 8) out, by shuffles
};
void multiply_half(Matrices p);
void multiply_bfloat(Matrices p);

}  // namespace tome_test
