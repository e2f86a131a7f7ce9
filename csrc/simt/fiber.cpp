#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

asm(R"(
.text
.globl flashinfer_lite_simt_swap
.hidden flashinfer_lite_simt_swap
.type flashinfer_lite_simt_swap, @function
flashinfer_lite_simt_swap:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size flashinfer_lite_simt_swap, .-flashinfer_lite_simt_swap
)");

namespace flashinfer_lite::simt {

namespace {
constexpr size_t kPage = 4096;
// Wider than any frame, so that no frame reaches over it into the next stack.
constexpr size_t kGuardBytes = 64 * 1024;
constexpr int kSavedRegisters = 6;
// Stack tops are shifted against each other: frames at one offset of every page would all fall into
// the same L1 sets, and a switch would cost twice as much.
constexpr int kColors = 16;
constexpr size_t kColorBytes = 576;
}  // namespace

FiberStacks::FiberStacks(int count, size_t usable_bytes)
    : count_(count),
      usable_bytes_(usable_bytes),
      stride_((usable_bytes + kColors * kColorBytes + kPage - 1) / kPage * kPage + kGuardBytes),
      mapped_bytes_(stride_ * count) {
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(memory);
  for (int i = 0; i < count; i++) mprotect(base_ + i * stride_, kGuardBytes, PROT_NONE);
}

FiberStacks::~FiberStacks() { munmap(base_, mapped_bytes_); }

void* FiberStacks::prepare(int index, void (*entry)()) const {
  uint8_t* top = base_ + (index + 1) * stride_ - (index % kColors) * kColorBytes;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where `entry` would return to; also aligns its frame
  *--stack = reinterpret_cast<void*>(entry);
  stack -= kSavedRegisters;
  std::memset(stack, 0, kSavedRegisters * sizeof(void*));
  return stack;
}

bool FiberStacks::contains(const void* address) const {
  const uint8_t* p = static_cast<const uint8_t*>(address);
  return p >= base_ && p < base_ + mapped_bytes_;
}

bool FiberStacks::overflows(int index, const void* address) const {
  const uint8_t* p = static_cast<const uint8_t*>(address);
  const uint8_t* guard = base_ + index * stride_;
  return p >= guard && p < guard + kGuardBytes;
}

}  // namespace flashinfer_lite::simt
