// Fibers: a stack and a saved stack pointer, switched by hand.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#error "the SIMT executor switches fibers by x86-64 assembly"
#endif

// Saves the callee-saved registers and the stack pointer, continues at `to`.
extern "C" void flashinfer_lite_simt_swap(void** save, void* to);

namespace flashinfer_lite::simt {

// One stack per CUDA thread, each above an unmapped range.
class FiberStacks {
 public:
  FiberStacks(int count, size_t usable_bytes);
  ~FiberStacks();
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;

  int count() const { return count_; }
  size_t usable_bytes() const { return usable_bytes_; }

  // A stack pointer that starts `entry` when switched to. `entry` must not return.
  void* prepare(int index, void (*entry)()) const;

  bool contains(const void* address) const;
  // Is the address in the unmapped range below stack `index`?
  bool overflows(int index, const void* address) const;

 private:
  int count_;
  size_t usable_bytes_;
  size_t stride_;
  size_t mapped_bytes_;
  uint8_t* base_;
};

}  // namespace flashinfer_lite::simt
