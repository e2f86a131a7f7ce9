// Scratch memory of one worker, carved in cache lines. Run on a null base it measures itself.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

class Arena {
 public:
  explicit Arena(void* base) : next_(reinterpret_cast<uintptr_t>(base)), base_(next_) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * int64_t{sizeof(T)}, 64);
    return p;
  }

  int64_t used() const { return next_ - base_; }

 private:
  uintptr_t next_, base_;
};

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
