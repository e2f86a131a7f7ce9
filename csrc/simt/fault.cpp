#include "simt/fault.h"

namespace flashinfer_lite::simt {

namespace {

constexpr size_t kHandlerStackBytes = 64 * 1024;

struct sigaction previous_segv;
struct sigaction previous_bus;

void handle(int signal_number, siginfo_t* info, void*) {
  FaultPoint& point = fault_point();
  if (point.armed) {
    point.armed = false;
    point.address = info->si_addr;
    siglongjmp(point.context, 1);
  }
  // Not ours: the instruction faults again on return, under the handler of before.
  sigaction(signal_number, signal_number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
}

}  // namespace

FaultPoint& fault_point() {
  static constinit thread_local FaultPoint point{};
  return point;
}

FaultHandlers::FaultHandlers() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

FaultHandlers::~FaultHandlers() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
}

FaultStack::FaultStack() : memory_(kHandlerStackBytes) {
  stack_t stack = {};
  stack.ss_sp = memory_.data();
  stack.ss_size = memory_.size();
  sigaltstack(&stack, &before_);
}

FaultStack::~FaultStack() { sigaltstack(&before_, nullptr); }

}  // namespace flashinfer_lite::simt
