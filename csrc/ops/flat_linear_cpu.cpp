// flat_linear (the flat GEMM of FlashDecoding++) on the CPU.
#include "ops/flat_linear.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

// Weight rows per task. A task reads several streams, the better the longer they are; but a few
// tasks per thread even out what else the machine does. Each converts or packs up to 64 rows of x
// for itself, so it has 16 rows of the weight for each of those.
int64_t weight_rows_per_task(const FlatLinearParams& p, int64_t threads) {
  constexpr int64_t kTaskElements = 1 << 18, kMostTasksPerThread = 4, kWeightRows = 16;
  const int64_t elements = p.n * p.k / threads;
  const int64_t least = std::max(kTaskElements, kWeightRows * std::min<int64_t>(p.m, 64) * p.k);
  const int64_t tasks = std::clamp<int64_t>(elements / least, 1, kMostTasksPerThread);
  return ceil_div(p.n, threads * tasks);
}

void run(FlatLinearParams& p, ScalarType type, FlatLinearKernel which) {
  const cpu::Kernels& kernels = cpu_kernels(type);
  count_call();
  if (p.m == 0 || p.n == 0) return;
  p.weight_rows_per_task = weight_rows_per_task(p, torch::stable::get_num_threads());
  const auto& kernel = which == FlatLinearKernel::kGemv ? kernels.gemv : kernels.flat_gemm;
  run_tasks(kernel, p, double(p.m) * double(p.n) * double(p.k));
}

Tensor flat_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   std::string kernel) {
  FlatLinearParams p;
  const FlatLinearKernel which = flat_linear_kernel(kernel);
  set_flat_linear(p, x, weight, bias, DeviceType::CPU);
  Tensor out = new_flat_linear_out(p, x);
  run(p, x.scalar_type(), which);
  return out;
}

void flat_linear_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     std::string kernel, Tensor out) {
  FlatLinearParams p;
  const FlatLinearKernel which = flat_linear_kernel(kernel);
  set_flat_linear(p, x, weight, bias, DeviceType::CPU);
  set_flat_linear_out(p, x, out);
  run(p, x.scalar_type(), which);
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("flat_linear", FIL_BOX(flashinfer_lite::flat_linear));
  m.impl("flat_linear.out", FIL_BOX(flashinfer_lite::flat_linear_out));
}
