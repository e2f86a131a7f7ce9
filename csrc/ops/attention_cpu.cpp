// attention_fwd and attention_bwd on the CPU.
#include <tuple>

#include "common/heuristics.h"
#include "ops/attention.h"
#include "ops/backward_cpu.h"
#include "ops/forward_cpu.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& kv_start, const std::optional<Tensor>& seqlens_kv,
    double softmax_scale, double softcap, int64_t causal, int64_t window_left, int64_t window_right,
    const std::optional<double>& phi, const std::optional<Tensor>& phi_heads,
    bool /*deterministic*/, const std::optional<Tensor>& alibi_slopes) {
  const AttentionArgs args{
      q,       k,      v,           mask,         kv_start,  seqlens_kv,  softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes};
  AttentionFwdParams p;
  Lengths lengths;
  set_params(p, args, DeviceType::CPU);
  set_lengths(p, lengths, kv_start, seqlens_kv);
  set_softmax(p, {phi, phi_heads}, q);
  const cpu::Kernels& kernels = cpu_kernels(q.scalar_type());
  Outputs outputs = new_outputs(q, p);
  set_outputs(p, outputs);
  count_call();
  if (outputs.lse.numel() > 0) {
    p.threads = torch::stable::get_num_threads();
    const CpuForwardPlan plan = kernels.forward_plan(p);
    const int64_t row_blocks = ceil_div(p.rows_per_kv_head(), plan.tile.block_m);
    p.heads_per_task =
        cpu_heads_per_task(plan, p.batch_size * p.num_heads_kv * row_blocks, p.threads);
    run_forward(q, kernels, p);
  }
  return {outputs.out, outputs.lse};
}

// Bitwise repeatable whether or not that is asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& kv_start, const std::optional<Tensor>& seqlens_kv,
    double softmax_scale, double softcap, int64_t causal, int64_t window_left, int64_t window_right,
    bool wants_dmask, bool /*deterministic*/, const std::optional<Tensor>& alibi_slopes) {
  const AttentionArgs args{
      q,       k,      v,           mask,         kv_start,  seqlens_kv,  softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes};
  AttentionBwdParams p;
  Lengths lengths;
  set_params(p, args, DeviceType::CPU);
  set_lengths(p, lengths, kv_start, seqlens_kv);
  set_results(p, {dout, dlse, out, lse}, args);
  Gradients gradients = new_gradients(p, args, wants_dmask);
  set_strided(p.dq, gradients.dq);
  set_strided(p.dk, gradients.dk);
  set_strided(p.dv, gradients.dv);
  count_call();
  if (gradients.finished(p, lse)) return gradients.tuple();

  bool serial = false;
  if (wants_dmask) {
    p.dmask = gradients.dmask.data_ptr();
    p.dmask_batch = gradients.dmask_stride(0);
    p.dmask_head = gradients.dmask_stride(1);
    p.dmask_row = gradients.dmask_stride(2);
    p.dmask_col = gradients.dmask_stride(3);
    // Tasks that share a gradient element may not run side by side.
    serial = (p.dmask_batch == 0 && p.batch_size > 1) ||
             (p.dmask_head == 0 && p.num_heads_kv > 1) || p.dmask_col == 0;
  }
  run_backward(q, cpu_kernels(q.scalar_type()), {p}, serial);
  return gradients.tuple();
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("attention_fwd", FIL_BOX(flashinfer_lite::attention_fwd));
  m.impl("attention_bwd", FIL_BOX(flashinfer_lite::attention_bwd));
}
