// What every CUDA op needs around its launch: device, stream, lengths, errors, counters.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/dispatch.h"
#include "ops/attention.h"

namespace flashinfer_lite {

// Makes x's device current while an op launches, and holds what a launch is chosen by and goes to.
// Throws if the device is too old for every kernel.
struct CudaContext {
  explicit CudaContext(const Tensor& x);

  torch::stable::accelerator::DeviceGuard guard;
  const cuda::Device& device;
  Stream stream;
};

cuda::ElementType cuda_element_type(ScalarType type);

// set_params, and the lengths as views that only the device reads, unless they are to be checked:
// here, but for those of a ragged batch.
void set_cuda_params(CudaAttentionParams& p, const AttentionArgs& args);

// True if no kernel has to run: there are no rows, or none has a key and the outputs are filled.
bool finish_without_keys(Outputs& outputs, int64_t num_keys);

// Throw if a launch failed, saying what was launched.
void check_launch(Status status, const CudaContext& context, const cuda::Instance& instance,
                  int64_t blocks);
void check_combine(Status status, const CudaContext& context, const CombineParams& p);
void check_append_kv(Status status, const CudaContext& context, const AppendKvParams& p);

LengthsView lengths_view(const Tensor& x);
BlockTableView block_table_view(const Tensor& x);

// Whether to read lengths and pages and check them before a launch on x's device:
// FLASHINFER_LITE_CHECK=1, unless a CUDA graph is being captured, where nothing can wait.
bool wants_value_checks(const Tensor& x);
// A copy in host memory, for that.
std::optional<Tensor> on_host(const std::optional<Tensor>& x);

// Whether what is launched on the stream goes into a CUDA graph.
bool is_capturing(Stream stream);

// `count` counters for arch::ticket, each 0 when the launch begins; the launch must leave them at
// 0. Keep them until it is under way. Outside of a capture they are the stream's own, zeroed once
// and for all; in a graph they are zeroed by each replay, which so may run beside whatever else.
struct Tickets {
  uint32_t* data = nullptr;
  std::optional<Tensor> own;
};
Tickets cuda_tickets(const CudaContext& context, const Tensor& like, int64_t count);

// While it lives, this thread may call what a capture anywhere in the process otherwise forbids.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then what it was
};

// From the driver and not from torch, which may be lending the memory of a graph: torch's CUDA
// graph trees do that while they warm up, and take all of it back. Null if there is none left.
void* allocate_for_good(int64_t bytes);

// Counts one call for cuda_stats().
void count_cuda_call();

// Where kernels on x's device count rows for cuda_stats(); made by the first call, zeroed once.
RowCounters* cuda_row_counters(const Tensor& x);

}  // namespace flashinfer_lite
