// Fibers, barriers and warp-wide operations of the stand-in for CUDA. See emulator.h.

#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#define TOME_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TOME_ASAN 1
#endif
#endif
#ifdef TOME_ASAN
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace tome_emulation {

Running running;
const unsigned char *stacks_begin = nullptr, *stacks_end = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned char kPoison = 0xcd;

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct AsyncCopy {
    void* to;
    const void* from;
    int bytes;  // read; the rest up to `width` is zeros
    size_t width = 16;
};

// A product's result on its way to the registers it goes to.
struct PendingProduct {
    float* to;
    std::vector<float> values;
};

struct Fiber {
    jmp_buf place;
    bool started = false;
    State state = State::kDone;
    bool waited = false;  // for earlier kernels
    unsigned char* stack = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's
    // What it waits for.
    const char* what = nullptr;
    Site site;
    unsigned mask = 0;
    int predicate = 0;
    const void* in = nullptr;
    void* out = nullptr;
    std::deque<std::vector<AsyncCopy>> copies;  // groups; the last one is still open
    bool copies_unshared = false;  // some have arrived, and no fence stands behind them
    std::vector<PendingProduct> products;
};

struct Launch {
    Body body = nullptr;
    const void* kernel = nullptr;
    const void* params = nullptr;
    size_t shared_bytes = 0;
};

Options the_options;
std::string failure;
int64_t launch_count = 0;
int64_t product_count = 0;  // of warps, of warpgroups' products
uint32_t serials = 0;
Launch launch_now;
Neighbours neighbours_now;
uint32_t released_by = 0;   // the last block that let the next kernel begin
std::vector<Fiber> fibers;  // kMaxThreads of them, kept from block to block
int threads = 0;            // of the block
int current = 0;
std::vector<uint32_t> warp_epochs;
int barrier_result = 0;
bool stop = false;
jmp_buf scheduler;
std::unique_ptr<unsigned char[]> shared_memory;
unsigned char* shared_begin = nullptr;

std::string place(const Site& site) {
    const std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void describe(std::string& text, int thread) {
    const Fiber& fiber = fibers[static_cast<size_t>(thread)];
    text += "thread " + std::to_string(thread);
    if (fiber.state == State::kDone) {
        text += " has returned";
    } else {
        text += std::string(" waits in ") + fiber.what + " at " + place(fiber.site);
    }
}

// --- switching
// ------------------------------------------------------------------------------------

#ifdef TOME_ASAN
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

#ifdef TOME_ASAN
// libc's own. AddressSanitizer's takes most of a test's time to forget what it knows of the stack
// that is left, and fibers come back to theirs.
const auto jump = reinterpret_cast<void (*)(jmp_buf, int)>(
    dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "_longjmp"));
#else
constexpr auto jump = _longjmp;
#endif

void arrived_in_fiber() {
#ifdef TOME_ASAN
    __sanitizer_finish_switch_fiber(fibers[size_t(current)].fake_stack, &scheduler_stack,
                                    &scheduler_stack_bytes);
#endif
}

__attribute__((noinline)) void to_scheduler() {
    Fiber& fiber = fibers[static_cast<size_t>(current)];
    if (_setjmp(fiber.place) == 0) {
#ifdef TOME_ASAN
        __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
        jump(scheduler, 1);
    }
    arrived_in_fiber();
}

bool may_touch_memory() {
    return !neighbours_now.overlapping || fibers[static_cast<size_t>(current)].waited;
}

template <class T>
bool within(const void* data, const T* begin, size_t count) {
    return data >= begin && data < begin + count;
}

// A fiber serves one thread of block after block.
void fiber_main() {
    arrived_in_fiber();
    for (;;) {
        launch_now.body(launch_now.kernel, launch_now.params);
        if (!may_touch_memory()) {
            record_failure(("thread " + std::to_string(current) +
                            " ends without having waited for earlier kernels")
                               .c_str());
            stop = true;
        }
        fibers[static_cast<size_t>(current)].state = State::kDone;
        to_scheduler();
    }
}

void enter_thread(int thread) {
    current = thread;
    const auto t = static_cast<unsigned>(thread);
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    running.thread = static_cast<uint16_t>(thread);
    running.warp_epoch = warp_epochs[t / kWarp];
}

__attribute__((noinline)) void resume(int thread) {
    enter_thread(thread);
    Fiber& fiber = fibers[static_cast<size_t>(thread)];
    if (_setjmp(scheduler) == 0) {
#ifdef TOME_ASAN
        __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
        if (fiber.started) jump(fiber.place, 1);
        fiber.started = true;
#ifdef TOME_ASAN
        ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);  // of a block that was given up
#endif
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
        setcontext(&context);
    }
#ifdef TOME_ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, const char* what, const Site& site, unsigned mask) {
    Fiber& fiber = fibers[static_cast<size_t>(current)];
    fiber.state = state;
    fiber.what = what;
    fiber.site = site;
    fiber.mask = mask;
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.what == b.what && a.site.line == b.site.line &&
           std::strcmp(a.site.file, b.site.file) == 0;
}

// --- blocks
// ---------------------------------------------------------------------------------------

void make_fibers() {
    if (!fibers.empty()) return;
    fibers.resize(kMaxThreads);
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks_begin = static_cast<unsigned char*>(memory);
    stacks_end = stacks_begin + kMaxThreads * kStackBytes;
    for (size_t i = 0; i < kMaxThreads; ++i) {
        fibers[i].stack = static_cast<unsigned char*>(memory) + i * kStackBytes;
    }
}

void report_stuck() {
    std::string text = "no thread can go on: ";
    for (int t = 0; t < threads; ++t) {
        const Fiber& fiber = fibers[static_cast<size_t>(t)];
        if (fiber.state != State::kInCollective) continue;
        for (int lane = 0; lane < kWarp; ++lane) {
            const int other = t / kWarp * kWarp + lane;
            if (!(fiber.mask >> lane & 1)) continue;
            if (other >= threads) {
                text += "the mask names lane " + std::to_string(lane) + ", which is no thread; ";
            } else if (!same_place(fiber, fibers[static_cast<size_t>(other)])) {
                describe(text, t);
                text += " for ";
                describe(text, other);
                record_failure(text.c_str());
                return;
            }
        }
    }
    for (int t = 0, shown = 0; t < threads && shown < 2; ++t) {
        const Fiber& fiber = fibers[static_cast<size_t>(t)];
        if (t == 0 || !same_place(fiber, fibers[0]) || fiber.state != fibers[0].state) {
            text += shown > 0 ? ", " : "";
            describe(text, t);
            ++shown;
        }
    }
    record_failure(text.c_str());
}

void run_block(std::mt19937& random, size_t shared_bytes) {
    running.serial = ++serials;
    running.epoch = 0;
    std::fill(warp_epochs.begin(), warp_epochs.end(), 0u);
    if (shared_bytes > 0) std::memset(shared_begin, kPoison, shared_bytes);
    forget_accesses(shared_begin, shared_bytes);
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[static_cast<size_t>(t)];
        fiber.state = State::kReady;
        fiber.waited = false;
        fiber.copies.assign(1, {});
        fiber.copies_unshared = false;
        fiber.products.clear();
    }
    std::vector<int> order(static_cast<size_t>(threads));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (;;) {
        bool moved = false;
        for (int t : order) {
            if (fibers[static_cast<size_t>(t)].state != State::kReady) continue;
            moved = true;
            resume(t);
            if (stop) {
                // Its threads are abandoned in the middle: they need new fibers.
                for (Fiber& fiber : fibers) fiber.started = false;
                return;
            }
        }
        if (!moved) break;
    }
    for (int t = 0; t < threads; ++t) {
        if (fibers[static_cast<size_t>(t)].state != State::kDone) {
            report_stuck();
            stop = true;
            for (Fiber& fiber : fibers) fiber.started = false;
            return;
        }
    }
}

}  // namespace

// --- what kernels call
// ----------------------------------------------------------------------------

void record_failure(const char* text) {
    if (failure.size() > 2000) return;
    failure += "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
               std::to_string(blockIdx.z) + "): " + text + "\n";
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    record_failure(text);
    stop = true;
    for (;;) to_scheduler();
}

void collective(unsigned mask, const char* what, const Site& site, const void* in, void* out,
                Apply apply) {
    const int lane = current % kWarp;
    if (!(mask >> lane & 1)) {
        fail("%s at %s: lane %d calls it, which mask %08x does not name", what, place(site).c_str(),
             lane, mask);
    }
    wait(State::kInCollective, what, site, mask);
    Fiber* warp = &fibers[static_cast<size_t>(current - lane)];
    warp[lane].in = in;
    warp[lane].out = out;
    Lanes lanes{mask, {}, {}};
    bool complete = true;
    for (int i = 0; i < kWarp; ++i) {
        if (!(mask >> i & 1)) continue;
        const bool there = current - lane + i < threads && warp[i].state == State::kInCollective &&
                           warp[i].mask == mask && same_place(warp[i], warp[lane]);
        complete = complete && there;
        lanes.in[i] = warp[i].in;
        lanes.out[i] = warp[i].out;
    }
    if (!complete) {
        to_scheduler();
        return;
    }
    apply(lanes);
    for (int i = 0; i < kWarp; ++i) {
        if (mask >> i & 1) warp[i].state = State::kReady;
    }
}

void warp_barrier(unsigned mask, const Site& site) {
    collective(mask, "__syncwarp", site, nullptr, nullptr, [](const Lanes& lanes) {
        // Only a whole warp's barrier orders memory here: stricter than the chip.
        const int live = std::min(kWarp, threads - current / kWarp * kWarp);
        if (std::popcount(lanes.mask) >= live) ++warp_epochs[static_cast<size_t>(current / kWarp)];
    });
    running.warp_epoch = warp_epochs[static_cast<size_t>(current / kWarp)];
}

int block_barrier(const char* what, int predicate, const Site& site) {
    wait(State::kAtBarrier, what, site, 0);
    fibers[static_cast<size_t>(current)].predicate = predicate != 0;
    int sum = 0;
    for (int t = 0; t < threads; ++t) {
        const Fiber& fiber = fibers[static_cast<size_t>(t)];
        if (fiber.state != State::kAtBarrier) {
            to_scheduler();
            return barrier_result;
        }
        sum += fiber.predicate;
    }
    for (int t = 0; t < threads; ++t) {
        if (!same_place(fibers[static_cast<size_t>(t)], fibers[static_cast<size_t>(current)])) {
            std::string text;
            describe(text, t);
            text += ", ";
            describe(text, current);
            fail("%s", text.c_str());
        }
    }
    for (int t = 0; t < threads; ++t) fibers[static_cast<size_t>(t)].state = State::kReady;
    ++running.epoch;
    return barrier_result = sum;
}

unsigned char* dynamic_shared() { return shared_begin; }

void wait_for_earlier_kernels() { fibers[static_cast<size_t>(current)].waited = true; }

void let_next_kernel_begin() {
    if (!may_touch_memory()) {
        fail("thread %d lets the next kernel begin before it has waited for earlier ones", current);
    }
    if (released_by != running.serial) ++neighbours_now.releasing_blocks;
    released_by = running.serial;
}

void check_waited(const void* data) {
    if (may_touch_memory() || within(data, shared_begin, launch_now.shared_bytes) ||
        within(data, &blockIdx, 1) || within(data, &blockDim, 1) || within(data, &gridDim, 1)) {
        return;
    }
    fail("thread %d touches memory at %p before it has waited for earlier kernels", current, data);
}

void async_copy_16(void* shared, const void* global, int bytes) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
        fail("cp_async_16 from %p to %p: not aligned to 16 bytes", global, shared);
    }
    check_waited(global);
    // It may land from now on, so what others do with the bytes must be ordered before this, too.
    note_access(shared, 16, Access::kWrite);
    fibers[static_cast<size_t>(current)].copies.back().push_back({shared, global, bytes});
}

void async_copy_4(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 4 || reinterpret_cast<uintptr_t>(global) % 4) {
        fail("cp_async_4 from %p to %p: not aligned to 4 bytes", global, shared);
    }
    check_waited(global);
    note_access(shared, 4, Access::kWrite);
    fibers[static_cast<size_t>(current)].copies.back().push_back({shared, global, 4, 4});
}

void async_commit() { fibers[static_cast<size_t>(current)].copies.emplace_back(); }

void async_wait(int groups_left) {
    auto& copies = fibers[static_cast<size_t>(current)].copies;
    while (static_cast<int>(copies.size()) - 1 > groups_left) {
        for (const AsyncCopy& copy : copies.front()) {
            note_access(copy.to, copy.width, Access::kWrite);
            std::memset(copy.to, 0, copy.width);
            if (copy.bytes > 0) {
                note_access(copy.from, static_cast<size_t>(copy.bytes), Access::kRead);
                std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
            }
            fibers[static_cast<size_t>(current)].copies_unshared = true;
        }
        copies.pop_front();
    }
}

// --- warpgroups
// -----------------------------------------------------------------------------------

namespace {

// The byte of shared memory where an operand's element lies. `line` is its row in the tile, `along`
// its place in the row; the exchange of pieces follows from the address, as on the chip.
const unsigned char* operand_element(uint64_t operand, int line, int along) {
    if (operand >> 62 != 1) fail("an operand's pieces are not exchanged as for 128-byte rows");
    const uint64_t begin = (operand & 0x3fff) << 4, eight_rows = (operand >> 32 & 0x3fff) << 4;
    uint64_t address = begin + static_cast<uint64_t>(line / 8) * eight_rows +
                       static_cast<uint64_t>(line % 8 * 128 + along * 2);
    address ^= (address >> 7 & 7) << 4;
    if (address + 2 > launch_now.shared_bytes) {
        fail("an operand reaches beyond shared memory: byte %llu",
             static_cast<unsigned long long>(address));
    }
    return shared_begin + address;
}

struct ProductIn {
    int warp;
    uint32_t a[4];
    bool a_in_registers, a_rows_summed, b_rows_summed;
    uint64_t a_shared, b_shared;
    float c[32];
    float (*to_float)(uint16_t);
};

void one_warps_product(const Lanes& lanes) {
    ++product_count;
    const ProductIn& first = *static_cast<const ProductIn*>(lanes.in[0]);
    constexpr int columns = 64;
    const auto read = [&](const unsigned char* from) {
        note_access(from, 2, Access::kRead);
        uint16_t bits;
        std::memcpy(&bits, from, 2);
        return first.to_float(bits);
    };
    float a[16][16], b[16][64];
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n) {
            b[k][n] = read(first.b_rows_summed ? operand_element(first.b_shared, k, n)
                                               : operand_element(first.b_shared, n, k));
        }
        for (int m = 0; m < 16 && !first.a_in_registers; ++m) {
            const int row = first.warp * 16 + m;
            a[m][k] = read(first.a_rows_summed ? operand_element(first.a_shared, k, row)
                                               : operand_element(first.a_shared, row, k));
        }
    }
    for (int lane = 0; lane < kWarp && first.a_in_registers; ++lane) {
        const ProductIn& mine = *static_cast<const ProductIn*>(lanes.in[lane]);
        for (int i = 0; i < 8; ++i) {
            const auto bits = static_cast<uint16_t>(mine.a[i / 2] >> 16 * (i % 2));
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] = first.to_float(bits);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        const ProductIn& mine = *static_cast<const ProductIn*>(lanes.in[lane]);
        if (mine.b_shared != first.b_shared || mine.a_shared != first.a_shared) {
            fail("lanes of a product name different operands");
        }
        for (int i = 0; i < columns / 2; ++i) {
            const int m = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
            double sum = mine.c[i];
            for (int k = 0; k < 16; ++k) sum += double(a[m][k]) * double(b[k][n]);
            static_cast<float*>(lanes.out[lane])[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace

uint64_t shared_offset(const void* data) {
    return static_cast<uint64_t>(static_cast<const unsigned char*>(data) - shared_begin);
}

void share_with_products() { fibers[static_cast<size_t>(current)].copies_unshared = false; }

void products_begin() {}

void products_wait() {
    auto& products = fibers[static_cast<size_t>(current)].products;
    for (const PendingProduct& product : products) {
        std::copy(product.values.begin(), product.values.end(), product.to);
    }
    products.clear();
}

void warpgroup_product(float* d, const uint32_t* a, uint64_t a_shared, bool a_rows_summed,
                       uint64_t b_shared, bool b_rows_summed, bool add, float (*to_float)(uint16_t),
                       const Site& site) {
    for (int t = 0; t < threads; ++t) {
        if (fibers[static_cast<size_t>(t)].copies_unshared) {
            fail("a product may not see what thread %d has copied: no share_with_products", t);
        }
    }
    if (blockDim.x % 128 != 0) fail("a product in a block of %u threads", blockDim.x);
    auto& products = fibers[static_cast<size_t>(current)].products;
    constexpr size_t count = 32;  // of a lane: 16 rows by 64 columns of a warp's
    auto pending = std::find_if(products.begin(), products.end(),
                                [&](const PendingProduct& product) { return product.to == d; });
    if (pending == products.end()) {
        products.push_back({d, std::vector<float>(d, d + count)});
        pending = products.end() - 1;
    }
    ProductIn in{current / kWarp % 4,
                 {},
                 a != nullptr,
                 a_rows_summed,
                 b_rows_summed,
                 a_shared,
                 b_shared,
                 {},
                 to_float};
    if (a != nullptr) std::copy(a, a + 4, in.a);
    if (add) std::copy(pending->values.begin(), pending->values.end(), in.c);
    float out[32];
    collective(0xffffffffu, "product", site, &in, out, one_warps_product);
    pending = std::find_if(products.begin(), products.end(),
                           [&](const PendingProduct& product) { return product.to == d; });
    std::copy(out, out + count, pending->values.begin());
    std::fill(d, d + count, __uint_as_float(0x7fc00000));
}

// --- what hosts call
// ------------------------------------------------------------------------------

Options& options() { return the_options; }
const std::string& last_failure() { return failure; }
int64_t launches() { return launch_count; }
int64_t warpgroup_products() { return product_count; }
const Neighbours& neighbours() { return neighbours_now; }

cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* kernel,
                     const void* params, bool overlapping) {
    ++launch_count;
    failure.clear();
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    neighbours_now = {overlapping, blocks, 0};
    if (count == 0 || count > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535 ||
        shared_bytes > static_cast<size_t>(the_options.shared_limit)) {
        failure = "the launch is out of bounds: grid (" + std::to_string(grid.x) + ", " +
                  std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), " +
                  std::to_string(count) + " threads, " + std::to_string(shared_bytes) +
                  " bytes of shared memory";
        return cudaErrorInvalidConfiguration;
    }
    make_fibers();
    std::mt19937 random(the_options.seed);
    // With its exact size, so that AddressSanitizer sees what passes the end.
    constexpr size_t kAlign = 1024;
    shared_memory.reset(new unsigned char[shared_bytes + kAlign]);
    const auto address = reinterpret_cast<uintptr_t>(shared_memory.get());
    shared_begin = shared_memory.get() + (kAlign - address % kAlign) % kAlign;
#ifdef TOME_ASAN
    __asan_poison_memory_region(shared_memory.get(), shared_bytes + kAlign);
    __asan_unpoison_memory_region(shared_begin, shared_bytes);
#endif
    threads = static_cast<int>(count);
    warp_epochs.assign(kMaxThreads / kWarp, 0);
    blockDim = block;
    gridDim = grid;
    launch_now = {body, kernel, params, shared_bytes};
    running.launch_begin = serials + 1;
    stop = false;
    forget_accesses();

    std::vector<uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), uint64_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (uint64_t i : order) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block(random, shared_bytes);
        if (stop) break;
    }
    running.serial = 0;
#ifdef TOME_ASAN
    __asan_unpoison_memory_region(shared_memory.get(), shared_bytes + kAlign);
#endif
    shared_memory.reset();
    return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace tome_emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const tome_emulation::Options& options = tome_emulation::options();
    *value = attribute == cudaDevAttrMultiProcessorCount      ? options.multiprocessors
             : attribute == cudaDevAttrComputeCapabilityMajor ? options.capability / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? options.capability % 10
                                                              : options.shared_limit;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
    if (bytes > 0) std::memset(data, value, bytes);
    return cudaSuccess;
}
