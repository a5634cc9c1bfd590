// Everything the .inl files need from outside, included before any instruction set is named.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "scratch.h"
#include "tuning.h"

#if defined(TOME_HAS_X86_KERNELS)
#include <immintrin.h>
#endif
