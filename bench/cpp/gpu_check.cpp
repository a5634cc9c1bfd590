// Runs every operator on the GPU against tome_core's CPU kernels, without torch. Prints a line of
// JSON for each case, and flushes it: what ran before a crash is never lost.
//
//   nvcc -std=c++20 -O3 -arch=native -Icsrc/core/include bench/cpp/gpu_check.cpp
//       csrc/core/cpu/*.cpp csrc/core/cuda/*.cu -o gpu_check
//                              on Hopper -gencode arch=compute_90a,code=sm_90a, or its own kernels
//                              are not in it
//   gpu_check [--list] [--set all|sanitizer|repeats|emulator] [--repeats N] [--case NAME]...
//   gpu_check --self-test        shows that wrong results are found
//
// A case runs at least twice. Before each run its outputs, and some bytes around them, are filled
// with a pattern that changes from run to run, so one comparison of bits shows both what was not
// written and what depends on timing. Before the cases a line says which kernels this device gets:
// "attention" is "hopper" or "mma". Exit status: 0 all right, 1 something wrong, 70 a CUDA error,
// after which nothing else in this process could be trusted; the cases not reached are not printed.
//
// tests/emulation builds the same source against the stand-in for CUDA.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "gpu_check/attention.h"
#include "gpu_check/merging.h"

namespace gpu_check {
namespace {

void set_up(const Case& c, Trial& t) {
    uint64_t seed = 1;
    for (char letter : name_of(c)) seed = seed * 131 + static_cast<unsigned char>(letter);
    Random random(seed);
    switch (c.op) {
        case Op::kMatch:
            return set_up_match(c, t, random);
        case Op::kSelect:
            return set_up_select(c, t, random);
        case Op::kPlan:
            return set_up_plan(c, t, random);
        case Op::kMerge:
            return set_up_merge(c, t, random);
        case Op::kMergeBackward:
            return set_up_merge_backward(c, t, random);
        case Op::kMergeAddNorm:
            return set_up_merge_add_norm(c, t, random);
        case Op::kUnmerge:
            return set_up_unmerge(c, t, random);
        case Op::kChain:
            return set_up_chain(c, t, random);
        case Op::kAttention:
            return set_up_attention(c, t, random);
        case Op::kAttentionBackward:
            return set_up_attention_backward(c, t, random);
        case Op::kClsAttention:
            return set_up_cls_attention(c, t, random);
    }
}

// Faults put into the first output after a run, to show that they are found.
enum class Spoil { kNothing, kValue, kUnwritten, kGuard, kRepeat };

constexpr unsigned char pattern(int run) { return run % 2 == 0 ? 0xa5 : 0x5a; }

// Whether the bytes around some memory, as it is `now`, are as they were filled.
void look_around(Verdict& v, const std::vector<unsigned char>& now, int run,
                 const std::string& name) {
    for (size_t i = 0; i < Memory::kGuard; ++i) {
        if (now[i] != pattern(run)) v.fail("wrote in front of it", name);
        if (now[now.size() - Memory::kGuard + i] != pattern(run)) v.fail("wrote behind it", name);
    }
}

void look(Verdict& v, Output& x, int run, Spoil spoil) {
    std::vector<unsigned char> now = x.memory->content();
    const size_t guard = Memory::kGuard, bytes = x.memory->bytes();
    const auto element = static_cast<size_t>(x.element());
    if (bytes > 0) {
        const size_t at = guard + bytes / element / 2 * element;  // the middle one
        if (spoil == Spoil::kUnwritten) std::memset(&now[at], pattern(run), element);
        if (spoil == Spoil::kGuard) now[guard + bytes] ^= 1;
        if (spoil == Spoil::kRepeat && run == 1) now[at] ^= 1;
        // A bit that is worth an eighth of a value of any dtype.
        if (spoil == Spoil::kValue) {
            const bool low = x.type == Type::kInt32;
            now[at + (low ? 0 : element - 1)] ^= low ? 1 : 0x40;
        }
    }
    look_around(v, now, run, x.name);
    now.erase(now.begin(), now.begin() + guard);
    now.resize(bytes);
    if (run == 0) {
        x.bytes = std::move(now);
        return;
    }
    if (now == x.bytes) return;
    int64_t differ = 0, unwritten = 0, where = -1;
    for (size_t i = 0; i < bytes; i += element) {
        if (std::equal(&now[i], &now[i] + element, &x.bytes[i])) continue;
        if (where < 0) where = static_cast<int64_t>(i / element);
        ++differ;
        unwritten += std::all_of(&now[i], &now[i] + element,
                                 [&](unsigned char byte) { return byte == pattern(run); });
    }
    if (v.ok) v.index = where, v.wrong = differ, v.of = x.count;
    v.fail(unwritten == differ ? "not written" : "other bits in run " + std::to_string(run + 1),
           x.name);
}

Verdict run_case(const Case& c, int repeats, Spoil spoil = Spoil::kNothing) {
    Verdict v;
    Trial t;
    t.outputs.reserve(16);
    set_up(c, t);
    for (int run = 0; run < repeats && v.ok; ++run) {
        choose_order(run);
        for (const Output& x : t.outputs) x.memory->poison(pattern(run));
        if (t.workspace) t.workspace->poison(pattern(run));
        check(t.run(), "launch");
        check(device_wait(), "cudaDeviceSynchronize");
        for (size_t i = 0; i < t.outputs.size(); ++i) {
            look(v, t.outputs[i], run, i == 0 ? spoil : Spoil::kNothing);
        }
        if (t.workspace) look_around(v, t.workspace->content(), run, "workspace");
        // What was not written is not judged: the second run tells.
        if (run == 1 && v.ok) t.judge(v);
    }
    return v;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char letter : text) {
        if (letter == '"' || letter == '\\') out += '\\';
        out += static_cast<unsigned char>(letter) < 32 ? ' ' : letter;
    }
    return out + "\"";
}

void print(const Case& c, int repeats, const Verdict& v, const std::string& error) {
    std::string line = "{\"case\": " + quoted(name_of(c)) +
                       ", \"op\": " + quoted(kOpNames[int(c.op)]) +
                       ", \"ok\": " + (v.ok && error.empty() ? "true" : "false") +
                       ", \"repeats\": " + std::to_string(repeats);
    if (error.empty()) {
        line += ", \"worst\": " + number_text(v.worst) + ", \"error\": " + number_text(v.error);
    } else {
        line += ", \"cuda_error\": " + quoted(error);
    }
    if (v.ties > 0) line += ", \"ties\": " + std::to_string(v.ties);
    if (!v.ok) {
        line += ", \"why\": " + quoted(v.why) + ", \"output\": " + quoted(v.output) +
                ", \"index\": " + std::to_string(v.index) +
                ", \"wrong\": " + std::to_string(v.wrong) + ", \"of\": " + std::to_string(v.of);
        line += ", \"first\": [";
        for (size_t i = 0; i < v.first.size(); ++i) line += (i ? ", " : "") + v.first[i];
        line += "]";
    }
    std::printf("%s}\n", line.c_str());
    std::fflush(stdout);
}

int self_test() {
    int bad = 0;
    std::vector<bool> seen(std::size(kOpNames));
    for (const Case& c : every_case()) {
        const bool reference = c.dtype == kF32 || c.op == Op::kSelect || c.op == Op::kPlan;
        if (seen[size_t(c.op)] || !reference || !(c.sets & kEmulator) || c.tokens < 5) continue;
        seen[size_t(c.op)] = true;
        for (Spoil spoil :
             {Spoil::kNothing, Spoil::kValue, Spoil::kUnwritten, Spoil::kGuard, Spoil::kRepeat}) {
            const Verdict v = run_case(c, 3, spoil);
            const bool right = v.ok == (spoil == Spoil::kNothing);
            std::printf("%s spoiled in way %d: %s %s\n", name_of(c).c_str(), int(spoil),
                        v.ok ? "ok" : v.why.c_str(), right ? "" : "  WRONG");
            bad += !right;
        }
    }
    for (size_t i = 0; i < seen.size(); ++i) {
        if (!seen[i]) std::printf("no case for %s\n", kOpNames[i]), ++bad;
    }
    return bad == 0 ? 0 : 1;
}

[[noreturn]] void usage(const char* what) {
    std::fprintf(stderr,
                 "gpu_check: %s\nusage: gpu_check [--list] [--set all|sanitizer|repeats|emulator] "
                 "[--repeats N] [--case NAME]... | --self-test\n",
                 what);
    std::exit(2);
}

int run(int count, char** arguments) {
    unsigned set = kEmulated ? kEmulator : kAll;
    int repeats = 3;
    bool list = false;
    std::vector<std::string> names;
    for (int i = 1; i < count; ++i) {
        const std::string option = arguments[i];
        const auto value = [&]() -> std::string {
            if (i + 1 >= count) usage((option + " needs a value").c_str());
            return arguments[++i];
        };
        if (option == "--list") {
            list = true;
        } else if (option == "--self-test") {
            return self_test();
        } else if (option == "--case") {
            names.push_back(value());
        } else if (option == "--repeats") {
            repeats = std::max(2, std::atoi(value().c_str()));
        } else if (option == "--set") {
            const std::string name = value();
            set = name == "all"         ? kAll
                  : name == "sanitizer" ? kSanitizer
                  : name == "repeats"   ? kRepeats
                  : name == "emulator"  ? kEmulator
                                        : 0u;
            if (set == 0) usage(("no such set: " + name).c_str());
        } else {
            usage(("unknown option: " + option).c_str());
        }
    }
    std::vector<Case> chosen;
    for (const Case& c : every_case()) {
        const bool named = std::find(names.begin(), names.end(), name_of(c)) != names.end();
        if (names.empty() ? (c.sets & set) != 0 : named) chosen.push_back(c);
    }
    if (chosen.size() < names.size()) usage("no case has one of these names; see --list");
    if (list) {
        for (const Case& c : chosen) std::printf("%s\n", name_of(c).c_str());
        return 0;
    }
    std::printf("{\"kernels\": {\"device\": %s, \"attention\": %s}}\n",
                quoted(device_name()).c_str(), quoted(tome::attention_cuda_form()).c_str());
    std::fflush(stdout);
    bool good = true;
    for (const Case& c : chosen) {
        Verdict v;
        try {
            v = run_case(c, repeats);
            print(c, repeats, v, "");
        } catch (const CudaError& e) {
            print(c, repeats, v, std::string(e.where) + ": " + error_text(e.error));
            // Not through static destructors: they would wait for a context that is lost.
            std::_Exit(70);
        }
        good &= v.ok;
    }
    return good ? 0 : 1;
}

}  // namespace
}  // namespace gpu_check

int main(int count, char** arguments) { return gpu_check::run(count, arguments); }
