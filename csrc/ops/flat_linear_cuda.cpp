// flat_linear (the flat GEMM of FlashDecoding++) on CUDA devices.
#include "cuda/flat_linear.h"
#include "ops/flat_linear.h"
#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

void run(CudaFlatLinearParams& p, const Tensor& x, FlatLinearKernel kernel) {
  count_cuda_call();
  if (p.m == 0 || p.n == 0) return;
  const CudaContext context(x);
  const cuda::Instance& row =
      cuda::choose_flat_linear(kernel, cuda_element_type(x.scalar_type()), p.m, context.device);
  const cuda::FlatLinearPlan plan = cuda::plan_flat_linear(p, row, 0);
  std::optional<Tensor> partial;
  Tickets tickets;
  if (plan.splits > 1) {
    partial = new_tensor(x, {plan.num_partials()}, ScalarType::Float);
    tickets = cuda_tickets(context, x, plan.num_tickets());
    p.partial = static_cast<float*>(partial->data_ptr());
    p.tickets = tickets.data;
  }
  const Status status = cuda::run_flat_linear(p, plan, context.stream);
  check_launch(status, context, row, plan.num_blocks());
}

Tensor flat_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   std::string kernel) {
  CudaFlatLinearParams p;
  const FlatLinearKernel which = flat_linear_kernel(kernel);
  set_flat_linear(p, x, weight, bias, DeviceType::CUDA);
  Tensor out = new_flat_linear_out(p, x);
  run(p, x, which);
  return out;
}

void flat_linear_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     std::string kernel, Tensor out) {
  CudaFlatLinearParams p;
  const FlatLinearKernel which = flat_linear_kernel(kernel);
  set_flat_linear(p, x, weight, bias, DeviceType::CUDA);
  set_flat_linear_out(p, x, out);
  run(p, x, which);
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CUDA, m) {
  m.impl("flat_linear", FIL_BOX(flashinfer_lite::flat_linear));
  m.impl("flat_linear.out", FIL_BOX(flashinfer_lite::flat_linear_out));
}
