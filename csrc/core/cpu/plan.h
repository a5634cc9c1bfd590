// Checks of plan tensors: what they hold may come from anywhere, and is never followed unchecked.
#pragma once

#include <cstdint>

#include "tome_core/types.h"

namespace tome {

// Every entry of assign (batch, tokens) is in [-1, rows).
Status check_assign(const int32_t* assign, int64_t batch, int64_t tokens, int64_t rows);

// members (batch, tokens) is a permutation of the tokens; offsets (batch, rows + 1) start at 0,
// never decrease and never pass `tokens`.
Status check_plan(const int32_t* members, const int32_t* offsets, int64_t batch, int64_t tokens,
                  int64_t rows);

}  // namespace tome
