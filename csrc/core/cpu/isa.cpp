#include "tome_core/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef TOME_HAS_X86_KERNELS
#include <cpuid.h>
#endif
#if defined(TOME_HAS_X86_KERNELS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tome {
namespace {

#ifdef TOME_HAS_X86_KERNELS
// By hand: __builtin_cpu_supports of Clang 14 does not know "f16c".
bool machine_has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Whether the processor has tiles and their products of bfloat16, and the system lets this process
// use them: Linux does so only for who asks. Once it has, all threads may.
bool machine_grants_amx() {
#if defined(TOME_HAS_X86_KERNELS) && defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kOsxsave = 1u << 27;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return false;
    unsigned saved = 0, upper = 0;  // of the registers, those that the system saves
    asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
    if ((saved & kTileConfig) == 0 || (saved & kTileData) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;  // asm/prctl.h
    return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
    return false;
#endif
}

bool machine_has(Isa isa) {
#ifdef TOME_HAS_X86_KERNELS
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && machine_has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool amx = bf16 && machine_grants_amx();
    return isa == Isa::kPortable || (isa == Isa::kAvx2 && avx2) ||
           (isa == Isa::kAvx512 && avx512) || (isa == Isa::kAvx512Bf16 && bf16) ||
           (isa == Isa::kAmxBf16 && amx);
#else
    return isa == Isa::kPortable;
#endif
}

// As the processor says it: "AuthenticAMD", "GenuineIntel", ...
std::string machine_vendor() {
#ifdef TOME_HAS_X86_KERNELS
    unsigned words[3] = {}, a = 0;
    if (__get_cpuid(0, &a, &words[0], &words[2], &words[1]) == 0) return {};
    return {reinterpret_cast<const char*>(words), sizeof(words)};
#else
    return {};
#endif
}

Isa initial_isa() {
    const char* asked = std::getenv("TOME_ISA");
    if (asked == nullptr) return best_isa();
    for (Isa isa : kIsas) {
        if (std::strcmp(asked, isa_name(isa)) == 0) return machine_has(isa) ? isa : best_isa();
    }
    std::fprintf(stderr, "tome_core: TOME_ISA: expected one of");
    for (Isa isa : kIsas) std::fprintf(stderr, " %s,", isa_name(isa));
    std::fprintf(stderr, " got %s; %s is used\n", asked, isa_name(best_isa()));
    return best_isa();
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> isa{initial_isa()};
    return isa;
}

std::atomic<const Kernels*> kernels_of_test{nullptr};

}  // namespace

#ifdef TOME_HAS_X86_KERNELS
// What computes in float32, whatever it reads, is the same as under AVX-512: all but attention of
// bfloat16. match averages its metric over the heads and normalises it in float32, without another
// rounding. Made here because this runs on every machine, and the sets' own files are compiled for
// few.
using AttentionParts = decltype(Kernels::attention_parts);
template <AttentionParts kOfBFloat>
void attention_parts_or(const AttentionParams& p, int64_t parts, int64_t begin, int64_t end) {
    const bool ours = p.dtype == DType::kBFloat16;
    (ours ? kOfBFloat : kAvx512Kernels.attention_parts)(p, parts, begin, end);
}

const Kernels kAvx512Bf16Kernels = [] {
    Kernels kernels = kAvx512Kernels;
    kernels.attention_parts = attention_parts_or<avx512_bf16::attention_parts>;
    return kernels;
}();

const Kernels kAmxBf16Kernels = [] {
    Kernels kernels = kAvx512Kernels;
    kernels.attention_parts = attention_parts_or<amx_bf16::attention_parts>;
    kernels.attention_backward_heads = [](const AttentionBackwardParams& p, int64_t begin,
                                          int64_t end) {
        const bool ours = p.dtype == DType::kBFloat16;
        (ours ? amx_bf16::attention_backward_heads : kAvx512Kernels.attention_backward_heads)(
            p, begin, end);
    };
    kernels.cls_attention_head = [](const ClsAttentionParams& p, int64_t image, int64_t head,
                                    void* weights) {
        if (p.dtype != DType::kBFloat16) {
            return kAvx512Kernels.cls_attention_head(p, image, head, weights);
        }
        amx_bf16::cls_attention_head(p, image, head, static_cast<float*>(weights));
    };
    return kernels;
}();
#endif

bool serves(Isa isa, std::string_view vendor) {
    return isa != Isa::kAvx512Bf16 || vendor != "GenuineIntel";
}

Isa best_isa() {
    static const Isa best = *std::find_if(kIsas.rbegin(), kIsas.rend(), [](Isa isa) {
        return machine_has(isa) && serves(isa, machine_vendor());
    });
    return best;
}

Isa active_isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
    if (!machine_has(isa)) return false;
    current().store(isa, std::memory_order_relaxed);
    return true;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmxBf16:
            return "amx_bf16";
        case Isa::kAvx512Bf16:
            return "avx512_bf16";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kPortable:
            break;
    }
    return "portable";
}

void use_kernels(const Kernels* kernels) {
    kernels_of_test.store(kernels, std::memory_order_relaxed);
}

const Kernels& active_kernels() {
    const Kernels* of_test = kernels_of_test.load(std::memory_order_relaxed);
    if (of_test != nullptr) return *of_test;
#ifdef TOME_HAS_X86_KERNELS
    switch (active_isa()) {
        case Isa::kAmxBf16:
            return kAmxBf16Kernels;
        case Isa::kAvx512Bf16:
            return kAvx512Bf16Kernels;
        case Isa::kAvx512:
            return kAvx512Kernels;
        case Isa::kAvx2:
            return kAvx2Kernels;
        case Isa::kPortable:
            break;
    }
#endif
    return kPortableKernels;
}

}  // namespace tome
