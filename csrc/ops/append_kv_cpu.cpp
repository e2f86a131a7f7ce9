// append_kv on the CPU.
#include "ops/append_kv.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

void append_kv(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v,
               const Tensor& seqlens_kv, const std::optional<Tensor>& block_table,
               const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
               bool rotary_interleaved) {
  AppendKvParams p;
  Lengths lengths;
  set_append_params(
      p,
      {k_cache, v_cache, k, v, seqlens_kv, block_table, rotary_cos, rotary_sin, rotary_interleaved},
      DeviceType::CPU);
  set_append_slots(p, lengths, seqlens_kv, block_table);
  count_call();
  if (k.numel() == 0) return;
  run_tasks(cpu_kernels(k.scalar_type()).append_kv, p, double(k.numel() + v.numel()), 16);
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("append_kv", FIL_BOX(flashinfer_lite::append_kv));
}
