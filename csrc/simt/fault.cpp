#include "simt/fault.h"

#include <algorithm>
#include <iterator>

namespace flashinfer_lite::simt {

namespace {

constexpr size_t kHandlerStackBytes = 64 * 1024;

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[std::size(kSignals)];

void handle(int signal_number, siginfo_t* info, void*) {
  FaultPoint& point = fault_point();
  if (point.armed) {
    point.armed = false;
    point.address = info->si_addr;
    point.signal_number = signal_number;
    siglongjmp(point.context, 1);
  }
  // Not ours: the instruction faults again on return, under the handler of before.
  const auto found = std::find(std::begin(kSignals), std::end(kSignals), signal_number);
  sigaction(signal_number, &previous[found - std::begin(kSignals)], nullptr);
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
  for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &action, &previous[i]);
}

FaultHandlers::~FaultHandlers() {
  for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &previous[i], nullptr);
}

FaultStack::FaultStack() : memory_(kHandlerStackBytes) {
  stack_t stack = {};
  stack.ss_sp = memory_.data();
  stack.ss_size = memory_.size();
  sigaltstack(&stack, &before_);
}

FaultStack::~FaultStack() { sigaltstack(&before_, nullptr); }

}  // namespace flashinfer_lite::simt
