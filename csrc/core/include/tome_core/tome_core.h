// tome_core: token merging kernels without torch. One include for C++ programs.
#pragma once

#include "tome_core/attention.h"
#include "tome_core/isa.h"
#include "tome_core/match.h"
#include "tome_core/merge.h"
#include "tome_core/select.h"
#include "tome_core/types.h"
