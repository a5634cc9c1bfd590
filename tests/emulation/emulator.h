// The emulator as tests see it: launching, choosing the order of things, and what went wrong.
//
// A launch fails, naming the place, when
//  - a warp-wide operation is not reached by every lane its mask names, or is reached at different
//    places of the program; a shuffle reads a lane outside the mask;
//  - a barrier of the block is not reached by every thread of it;
//  - a thread reads or writes what another thread of the block wrote (or writes what it read) and
//    no barrier lies between; or what another block of the launch wrote, without both having used
//    one atomic in between (builds without AddressSanitizer: see races.cpp);
//  - of a kernel that may overlap the one before it, a thread ends without having waited for it,
//    touches global memory before (ordinary accesses: the same builds), or lets the next one begin;
//  - the launch itself is out of a GPU's bounds.
// Accesses out of bounds are left to AddressSanitizer. Nothing here says anything about speed, or
// about reorderings that a GPU's memory model allows beyond the checks above.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_runtime.h"

namespace tome_emulation {

struct Options {
    uint32_t seed = 0;              // of the order in which blocks, and threads between waits, run
    int multiprocessors = 4;        // what cudaDeviceGetAttribute says
    int shared_limit = 227 * 1024;  // bytes a block may ask for
    int capability = 80;            // the chip's compute capability, times 10
};
Options& options();

// Options, or the order in which threads and blocks run, changed for a scope.
class UseOptions {
  public:
    explicit UseOptions(const Options& use) : before_(options()) { options() = use; }
    ~UseOptions() { options() = before_; }
    UseOptions(const UseOptions&) = delete;
    UseOptions& operator=(const UseOptions&) = delete;

  private:
    Options before_;
};

// Whether this build can see data races.
bool detects_races();

// What went wrong in the last launch; empty if nothing did.
const std::string& last_failure();

// Of GoogleTest: the launch must go well.
#define ASSERT_LAUNCHED(call) ASSERT_EQ(call, cudaSuccess) << tome_emulation::last_failure()
#define EXPECT_LAUNCHED(call) EXPECT_EQ(call, cudaSuccess) << tome_emulation::last_failure()

// How many launches there were, failed ones included.
int64_t launches();
int64_t warpgroup_products();  // so far, in all launches: one for each warp

// What the last launch said about its neighbours on the stream.
struct Neighbours {
    bool overlapping = false;       // it may begin before the one before it has ended
    uint64_t blocks = 0;            // of its grid
    uint64_t releasing_blocks = 0;  // that let the next kernel begin
};
const Neighbours& neighbours();

using Body = void (*)(const void* kernel, const void* params);
cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* kernel,
                     const void* params, bool overlapping);

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   const Params& params, bool overlapping = false) {
    return run_grid(
        grid, block, shared_bytes,
        [](const void* k, const void* p) TOME_NO_HOOKS {
            (*static_cast<void (*const*)(Params)>(k))(*static_cast<const Params*>(p));
        },
        &kernel, &params, overlapping);
}

}  // namespace tome_emulation
