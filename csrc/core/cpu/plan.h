// Checks of plan tensors: what they hold may come from anywhere, and is never followed unchecked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "tome_core/types.h"

namespace tome {

// Every entry of assign (batch, tokens) is in [-1, rows).
Status check_assign(const int32_t* assign, int64_t batch, int64_t tokens, int64_t rows);

// members (batch, tokens) is a permutation of the tokens; offsets (batch, rows + 1) start at 0,
// never decrease and never pass `tokens`.
Status check_plan(const int32_t* members, const int32_t* offsets, int64_t batch, int64_t tokens,
                  int64_t rows);

// Indices as they were at one moment. What is checked is the copy, and the copy is what kernels
// follow: a thread that writes to the caller's array meanwhile can change results, but lead nothing
// out of the tensors.
class OwnIndices {
  public:
    OwnIndices(const int32_t* indices, int64_t count)
        : data_(std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(count))) {
        std::copy_n(indices, count, data_.get());
    }

    const int32_t* get() const { return data_.get(); }
    int32_t operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }

  private:
    std::unique_ptr<int32_t[]> data_;
};

// A plan's own copy, in place of members and offsets in params.
class OwnPlan {
  public:
    template <class P>
    explicit OwnPlan(P& p)
        : members_(p.members, p.batch * p.tokens),
          offsets_(p.offsets, p.batch * (p.rows + 1)),
          status_(check_plan(members_.get(), offsets_.get(), p.batch, p.tokens, p.rows)) {
        p.members = members_.get();
        p.offsets = offsets_.get();
    }

    const Status& status() const { return status_; }

  private:
    OwnIndices members_, offsets_;
    Status status_;
};

}  // namespace tome
