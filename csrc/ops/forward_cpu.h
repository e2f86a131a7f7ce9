// One forward pass on the CPU, of attention and decode alike.
#pragma once

#include <vector>

#include "ops/runtime_cpu.h"

namespace flashinfer_lite {

// Runs p, whose tile and splits are chosen, into p.out and p.lse. With a unified maximum the rows
// that its guard refuses are computed again by the online softmax, in the same tile, splits and
// order, and counted. Partials are allocated `like` a tensor.
void run_forward(const Tensor& like, const cpu::Kernels& kernels, AttentionFwdParams& p);

// The same for many problems without splits, side by side. `verdict` is all that their verdict
// points into, kNoKey beforehand; empty for the online softmax.
void run_forward(const cpu::Kernels& kernels, std::vector<AttentionFwdParams>& problems,
                 const std::vector<RowVerdict>& verdict);

}  // namespace flashinfer_lite
