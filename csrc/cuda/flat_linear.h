// From the parameters of flat_linear and a device to a launch: which instance, how K is cut. Host
// code as in dispatch.h.
#pragma once

#include "common/params/flat_linear_cuda.h"
#include "cuda/dispatch.h"

namespace flashinfer_lite::cuda {

struct FlatLinearPlan {
  const Instance* instance = nullptr;
  int64_t rows_per_launch = 0;  // of x; more are more launches, one after another
  int64_t num_m_blocks = 0;     // of a launch
  int64_t num_n_blocks = 0;
  int64_t splits = 1;  // of K; more than one need `partial` and `tickets`
  int64_t k_per_split = 0;

  int64_t num_partials() const {  // floats
    return num_blocks() * instance->block_m * instance->block_n;
  }
  int64_t num_tickets() const { return num_m_blocks * num_n_blocks; }
  int64_t num_blocks() const { return num_m_blocks * num_n_blocks * splits; }
};

// The row of least block_m that holds all m rows, or else the largest that fits the device. Throws
// std::runtime_error if there is none.
const Instance& choose_flat_linear(FlatLinearKernel kernel, ElementType element, int64_t m,
                                   const Device& device);

// `splits` 0 chooses by [n, k] alone: a row's bits depend neither on m nor on the device's size.
FlatLinearPlan plan_flat_linear(const FlatLinearParams& p, const Instance& row, int64_t splits);

// Fills what follows from the rest, then launches, unless there is nothing to compute. The launches
// of one call share the workspace.
Status run_flat_linear(CudaFlatLinearParams& p, const FlatLinearPlan& plan, Stream stream);

}  // namespace flashinfer_lite::cuda
