// The kernels for matrix units (AMX) on machines that lack them.
#pragma once

#include "kernels.h"

namespace tome_test {

// Made of the plain bodies of amx.inl; bfloat16 attention only, all else the portable kernels.
extern const tome::Kernels kPlainAmxKernels;

// Whether kAmxBf16Kernels can run here though the machine lacks matrix units: as Linux tells of an
// unknown instruction, a handler can do its work (amx_by_signal.cpp). The rest of what the kernels
// are made of, AVX512-BF16, must be there. The first call installs the handler.
bool amx_runs_by_signal();

}  // namespace tome_test
