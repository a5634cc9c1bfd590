// Aligned, uninitialised working memory that frees itself.
#pragma once

#include <cstdint>
#include <new>

namespace tome {

template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(
              ::operator new(static_cast<size_t>(count) * sizeof(T) + 1, std::align_val_t{64}))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }

  private:
    T* data_;
};

}  // namespace tome
