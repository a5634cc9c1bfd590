// What every entry point of tome_core shares: dtypes, threads, and the status it returns.
#pragma once

#include <cstdint>

namespace tome {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int64_t element_size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// How a kernel runs a loop on several threads. The caller owns the threads (torch's pool, a
// program's own); the kernels only say what may run side by side. Work items never communicate,
// so the result is the same bits for any number of threads and any order.
struct Threads {
    using Body = void (*)(void* context, int64_t begin, int64_t end);

    // Calls body on disjoint ranges that cover [0, count), then returns.
    void (*run)(void* self, int64_t count, int64_t grain, Body body, void* context);
    void* self;
    int count;  // how many threads `run` may use; 1 keeps everything on the calling thread

    template <class F>
    void parallel_for(int64_t total, int64_t grain, const F& body) const {
        if (total <= 0) return;
        if (count <= 1 || total <= grain) {
            body(int64_t{0}, total);
            return;
        }
        run(
            self, total, grain,
            [](void* context, int64_t begin, int64_t end) {
                (*static_cast<const F*>(context))(begin, end);
            },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

    // Everything on the calling thread.
    static Threads serial() { return {nullptr, nullptr, 1}; }
};

// Why a plan, or what makes one, was refused. `index` and `value` locate the first offending entry.
struct Status {
    enum Code : int32_t {
        kOk,
        kAssignOutOfRange,   // an assign entry is < -1 or >= the number of rows
        kMemberOutOfRange,   // a members entry is < 0 or >= the number of tokens
        kMemberRepeated,     // a token is a member of two rows
        kOffsetsNotOrdered,  // offsets do not start at 0, decrease, or pass the number of tokens
        kTargetsNotOrdered,  // a target is of the prefix, past the last token, or not ascending
    } code = kOk;
    int64_t batch = 0;
    int64_t index = 0;
    int64_t value = 0;

    explicit operator bool() const { return code == kOk; }
};

}  // namespace tome
