// One backward pass on the CPU.
#pragma once

#include <vector>

#include "ops/runtime_cpu.h"

namespace flashinfer_lite {

// Runs the backward of problems that all have queries and keys, side by side, each cut into tasks
// as suits it and the threads. `serial`: one task at a time. Working memory is allocated `like` a
// tensor.
void run_backward(const Tensor& like, const cpu::Kernels& kernels,
                  std::vector<AttentionBwdParams> problems, bool serial = false);

}  // namespace flashinfer_lite
