// What emulator.cpp and races.cpp share: which thread of which block runs.
#pragma once

#include <cstdint>

namespace tome_emulation {

// The thread whose kernel code runs now; `serial` is 0 outside kernels.
struct Running {
    uint32_t serial = 0;        // of the block, counted over all launches
    uint32_t launch_begin = 0;  // the first serial of this launch
    uint16_t thread = 0;        // within the block, linear
    uint32_t epoch = 0;         // barriers of the block so far
    uint32_t warp_epoch = 0;    // __syncwarps of its warp so far
};
extern Running running;

// Fibers' stacks: memory of one thread, not tracked.
extern const unsigned char *stacks_begin, *stacks_end;

// Whether the running thread may touch global memory; if not, it stops at `data`.
void check_waited(const void* data);

void record_failure(const char* text);
void forget_accesses();                                 // a new launch
void forget_accesses(const void* begin, size_t bytes);  // memory with a new life

}  // namespace tome_emulation
