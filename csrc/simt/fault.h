// Turns a fault in a fiber into a return to the code that started the fibers.
#pragma once

#include <csetjmp>
#include <csignal>
#include <vector>

namespace flashinfer_lite::simt {

// While it lives, faults of memory and arithmetic in a fiber go to the fault point of their OS
// thread; any other goes to the handler that was there before.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;
};

// The stack on which this OS thread's handlers run: that of a fiber may be what overflowed.
class FaultStack {
 public:
  FaultStack();
  ~FaultStack();
  FaultStack(const FaultStack&) = delete;
  FaultStack& operator=(const FaultStack&) = delete;

 private:
  std::vector<char> memory_;
  stack_t before_{};
};

// Where a fault of this OS thread continues, as set by sigsetjmp; valid while `armed`.
struct FaultPoint {
  sigjmp_buf context;
  void* address;
  int signal_number;
  bool armed;
};
FaultPoint& fault_point();

}  // namespace flashinfer_lite::simt
