// The instruction sets the CPU kernels are compiled for, and which one runs.
#pragma once

#include <array>

namespace tome {

// Each has all of those before.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

inline constexpr std::array kIsas{Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16,
                                  Isa::kAmxBf16};

// The fastest one that both this build and this machine have. On Intel's processors that is not
// avx512_bf16: their products of bfloat16 take longer than float32's, but for those of amx_bf16. It
// needs permission, which Linux gives to a process that asks: the first call here asks.
Isa best_isa();

// The one in use: best_isa(), unless the environment variable TOME_ISA (portable, avx2, avx512,
// avx512_bf16, amx_bf16) or set_isa asked for another. What the machine lacks is never used; of a
// name that is none of these a line on stderr says so.
Isa active_isa();

// For tests and benchmarks. Returns false, changing nothing, when this machine lacks `isa`.
bool set_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace tome
