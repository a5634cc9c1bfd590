// The race detector. Kernels are compiled with -fsanitize=thread but not linked to its runtime: the
// compiler then calls __tsan_read4(address) and its like before every access to memory, and these
// are ours. For each byte we keep who wrote it last and who read it since.
//
// Two accesses of different threads, one of them a write, are ordered
//  - within a block, if a barrier of the block lies between, or both are of one warp and a
//    __syncwarp of the whole warp does;
//  - between blocks of a launch, if the later one used an atomic that the earlier one had used
//    before (the ticket by which the last block finds out that it is the last).
// Atomics do not race with each other. AddressSanitizer cannot be combined with these hooks; such a
// build detects no races.

#include <array>
#include <cstdio>
#include <memory>
#include <set>
#include <unordered_map>

#include "emulator.h"
#include "fibers.h"

namespace tome_emulation {

#ifndef TOME_RACE_HOOKS

bool detects_races() { return false; }
void note_access(const void*, size_t, Access) {}
void forget_accesses() {}
void forget_accesses(const void*, size_t) {}

#else

namespace {

constexpr uint16_t kManyLanes = 0xfffe;  // of one warp
constexpr uint16_t kManyWarps = 0xffff;

struct Mark {
    uint32_t serial = 0, epoch = 0, warp_epoch = 0;
    uint16_t thread = 0;  // or kManyLanes, kManyWarps
    uint16_t warp = 0;
    bool atomic = false;
};
struct Byte {
    Mark write, read;
};

constexpr uintptr_t kPageBytes = 1024;
using Page = std::array<Byte, kPageBytes>;
std::unordered_map<uintptr_t, std::unique_ptr<Page> > pages;
uintptr_t last_page = 0;
Page* last_bytes = nullptr;

// Blocks that have used an atomic, by its address; and blocks that this block is ordered after.
std::unordered_map<const void*, std::set<uint32_t> > atomic_users;
std::set<uint32_t> ordered_after;
uint32_t ordered_serial = 0;

Byte& byte_at(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    if (page != last_page || last_bytes == nullptr) {
        std::unique_ptr<Page>& slot = pages[page];
        if (!slot) slot = std::make_unique<Page>();
        last_page = page;
        last_bytes = slot.get();
    }
    return (*last_bytes)[address % kPageBytes];
}

bool ordered(const Mark& before) {
    if (before.serial < running.launch_begin) return true;
    if (before.serial != running.serial) return ordered_after.count(before.serial) > 0;
    if (before.epoch != running.epoch || before.thread == running.thread) return true;
    if (before.thread == kManyWarps || before.warp != running.thread / 32) return false;
    return before.warp_epoch != running.warp_epoch;
}

void follow_atomic(const void* address) {
    if (ordered_serial != running.serial) {
        ordered_serial = running.serial;
        ordered_after.clear();
    }
    std::set<uint32_t>& users = atomic_users[address];
    ordered_after.insert(users.begin(), users.end());
    users.insert(ordered_after.begin(), ordered_after.end());
    users.insert(running.serial);
}

void report(const char* what, const Mark& before, const char* earlier, uintptr_t address) {
    char text[256];
    char who[64];
    if (before.thread >= kManyLanes) {
        std::snprintf(who, sizeof who, "several threads");
    } else {
        std::snprintf(who, sizeof who, "thread %d", before.thread);
    }
    const auto shared = reinterpret_cast<uintptr_t>(dynamic_shared());
    std::snprintf(text, sizeof text,
                  "data race: thread %d %s what %s of %s %s, no barrier between, at %p (shared "
                  "memory + %lld)",
                  running.thread, what, who,
                  before.serial == running.serial ? "the same block" : "another block", earlier,
                  reinterpret_cast<void*>(address),
                  static_cast<long long>(address) - static_cast<long long>(shared));
    record_failure(text);
}

}  // namespace

bool detects_races() { return true; }

void forget_accesses() {
    pages.clear();
    last_bytes = nullptr;
    atomic_users.clear();
    ordered_after.clear();
}

void forget_accesses(const void* begin, size_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(begin);
    for (size_t i = 0; i < bytes; ++i) byte_at(first + i) = Byte{};
}

void note_access(const void* data, size_t bytes, Access access) {
    if (running.serial == 0) return;
    if (data >= stacks_begin && data < stacks_end) return;
    if (data >= &threadIdx && data < &threadIdx + 1) return;
    check_waited(data);
    if (access == Access::kAtomic) follow_atomic(data);
    if (ordered_serial != running.serial) {
        ordered_serial = running.serial;
        ordered_after.clear();
    }
    const auto first = reinterpret_cast<uintptr_t>(data);
    const auto warp = static_cast<uint16_t>(running.thread / 32);
    const Mark mine{running.serial, running.epoch, running.warp_epoch,
                    running.thread, warp,          access == Access::kAtomic};
    bool reported = false;
    for (size_t i = 0; i < bytes; ++i) {
        Byte& byte = byte_at(first + i);
        const bool both_atomic = mine.atomic && byte.write.atomic;
        if (!reported && byte.write.serial != 0 && !both_atomic && !ordered(byte.write)) {
            report(access == Access::kRead ? "reads" : "writes", byte.write, "wrote", first + i);
            reported = true;
        }
        if (access == Access::kRead) {
            Mark& read = byte.read;
            const bool same_time = read.serial == mine.serial && read.epoch == mine.epoch;
            if (!same_time || read.thread == mine.thread) {
                read = mine;
            } else if (read.warp != mine.warp) {
                read.thread = kManyWarps;
            } else if (read.thread != kManyWarps) {
                const bool same_phase = read.warp_epoch == mine.warp_epoch;
                read = mine;
                if (same_phase) read.thread = kManyLanes;
            }
            continue;
        }
        if (!reported && byte.read.serial != 0 && !ordered(byte.read)) {
            report("writes", byte.read, "read", first + i);
            reported = true;
        }
        byte.write = mine;
    }
}

#endif

}  // namespace tome_emulation

#ifdef TOME_RACE_HOOKS

using tome_emulation::Access;
using tome_emulation::note_access;

#define TOME_HOOKS(bytes)                                                                         \
    void __tsan_read##bytes(void* p) { note_access(p, bytes, Access::kRead); }                    \
    void __tsan_write##bytes(void* p) { note_access(p, bytes, Access::kWrite); }                  \
    void __tsan_unaligned_read##bytes(void* p) { note_access(p, bytes, Access::kRead); }          \
    void __tsan_unaligned_write##bytes(void* p) { note_access(p, bytes, Access::kWrite); }        \
    void __tsan_volatile_read##bytes(void* p) { note_access(p, bytes, Access::kRead); }           \
    void __tsan_volatile_write##bytes(void* p) { note_access(p, bytes, Access::kWrite); }         \
    void __tsan_unaligned_volatile_read##bytes(void* p) { note_access(p, bytes, Access::kRead); } \
    void __tsan_unaligned_volatile_write##bytes(void* p) { note_access(p, bytes, Access::kWrite); }

extern "C" {
TOME_HOOKS(1)
TOME_HOOKS(2)
TOME_HOOKS(4)
TOME_HOOKS(8)
TOME_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { note_access(p, bytes, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { note_access(p, bytes, Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif
