// append_kv on CUDA devices.
#include "ops/append_kv.h"
#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

void append_kv(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v,
               const Tensor& seqlens_kv, const std::optional<Tensor>& block_table,
               const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
               bool rotary_interleaved) {
  CudaAppendKvParams p;
  set_append_params(
      p,
      {k_cache, v_cache, k, v, seqlens_kv, block_table, rotary_cos, rotary_sin, rotary_interleaved},
      DeviceType::CUDA);
  p.device_seqlens_kv = lengths_view(seqlens_kv);
  if (block_table) p.device_block_table = block_table_view(*block_table);
  if (wants_value_checks(k)) {
    AppendKvParams host = p;
    Lengths lengths;
    set_append_slots(host, lengths, *on_host(seqlens_kv), on_host(block_table));
  }
  count_cuda_call();
  if (k.numel() == 0) return;
  const CudaContext context(k);
  const cuda::ElementType element = cuda_element_type(k.scalar_type());
  check_append_kv(cuda::run_append_kv(p, element, context.device, context.stream), context, p);
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CUDA, m) {
  m.impl("append_kv", FIL_BOX(flashinfer_lite::append_kv));
}
