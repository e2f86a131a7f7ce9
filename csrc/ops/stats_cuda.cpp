// This half's part of stats(): calls, which the host counts, and rows, which the kernels do.
#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>

#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

std::atomic<int64_t> calls{0};
std::mutex mutex;
std::map<int32_t, RowCounters*> counters;  // of each device; they are never freed

void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, "counters of rows: ", what, ": ", cudaGetErrorString(error));
}

// Now, and not when a stream that may be under capture comes to it: a graph would do it again with
// each replay.
void set_to_zero(RowCounters* data) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const cudaError_t set = cudaMemsetAsync(data, 0, sizeof(RowCounters), stream);
  const cudaError_t done = set == cudaSuccess ? cudaStreamSynchronize(stream) : set;
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
  check_cuda(done, "cudaMemset");
}

// Of one device, whose work on all streams is waited for.
RowCounters read(int32_t device, RowCounters* data, bool reset) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  RowCounters values{};
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check_cuda(cudaMemcpy(&values, data, sizeof values, cudaMemcpyDeviceToHost), "cudaMemcpy");
  if (reset) set_to_zero(data);
  return values;
}

// cuda_stats(reset) -> int64 [calls, rows_checked, rows_recomputed]
Tensor cuda_stats(bool reset) {
  Tensor out = torch::stable::empty({3}, ScalarType::Long);
  int64_t* values = static_cast<int64_t*>(out.data_ptr());
  values[0] = reset ? calls.exchange(0) : calls.load();
  values[1] = values[2] = 0;
  const std::lock_guard lock(mutex);
  for (const auto& [device, data] : counters) {
    const RowCounters rows = read(device, data, reset);
    values[1] += static_cast<int64_t>(rows.checked);
    values[2] += static_cast<int64_t>(rows.recomputed);
  }
  return out;
}

}  // namespace

void count_cuda_call() { calls.fetch_add(1, std::memory_order_relaxed); }

RowCounters* cuda_row_counters(const Tensor& x) {
  const std::lock_guard lock(mutex);
  const int32_t device = x.get_device_index();
  const auto found = counters.find(device);
  if (found != counters.end()) return found->second;
  auto* data = static_cast<RowCounters*>(allocate_for_good(sizeof(RowCounters)));
  check(data != nullptr, "counters of rows: no memory for ", sizeof(RowCounters), " bytes");
  set_to_zero(data);
  counters[device] = data;
  return data;
}

}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CompositeExplicitAutograd, m) {
  m.impl("cuda_stats", FIL_BOX(flashinfer_lite::cuda_stats));
}
