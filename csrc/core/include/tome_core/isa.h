// The instruction sets the CPU kernels are compiled for, and which one runs.
#pragma once

#include <array>

namespace tome {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };  // each has all of those before

inline constexpr std::array kIsas{Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// The best one that both this build and this machine have.
Isa best_isa();

// The one in use: best_isa(), unless the environment variable TOME_ISA (portable, avx2, avx512,
// avx512_bf16) or set_isa asked for a lower one. What the machine lacks is never used.
Isa active_isa();

// For tests and benchmarks. Returns false, changing nothing, when this machine lacks `isa`.
bool set_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace tome
