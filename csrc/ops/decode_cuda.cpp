// decode (Flash-Decoding) and merge_states on CUDA devices.
#include <tuple>
#include <vector>

#include "ops/decode.h"
#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

// What a launch works with besides its inputs and outputs; kept until it is under way.
struct Workspace {
  std::optional<Tensor> out_partial, lse_partial, row_max_partial;
  Tickets tickets;
};

Workspace new_workspace(const Tensor& q, CudaAttentionParams& p, const cuda::DecodePlan& plan,
                        const CudaContext& context) {
  Workspace w;
  if (p.unified) p.row_counters = cuda_row_counters(q);
  if (plan.kv_splits == 1) return w;
  const auto floats = [&](const std::vector<int64_t>& shape) {
    return new_tensor(q, shape, ScalarType::Float);
  };
  const int64_t splits = plan.kv_splits;
  w.out_partial = floats({splits, p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v});
  w.lse_partial = floats({splits, p.batch_size, p.num_heads_q, p.seqlen_q});
  p.out_partial = w.out_partial->data_ptr();
  p.lse_partial = w.lse_partial->data_ptr();
  if (!p.unified) return w;
  w.row_max_partial = floats({splits, p.batch_size, p.num_heads_q, p.seqlen_q});
  p.row_max_partial = w.row_max_partial->data_ptr();
  w.tickets = cuda_tickets(context, q, cuda::num_tickets(p, plan));
  p.tickets = w.tickets.data;
  return w;
}

void decode_into(const AttentionArgs& args, int64_t kv_splits, bool batch_invariant,
                 Outputs& outputs, CudaAttentionParams& p) {
  check_kv_splits(kv_splits);
  set_outputs(p, outputs);
  count_cuda_call();
  const bool has_keys = !args.block_table || p.block_table.num_pages > 0;
  if (finish_without_keys(outputs, has_keys ? p.seqlen_kv : 0)) return;

  const CudaContext context(args.q);
  const cuda::ElementType element = cuda_element_type(args.q.scalar_type());
  const cuda::DecodePlan plan =
      cuda::plan_decode(p, element, context.device, kv_splits, batch_invariant);
  const Workspace workspace = new_workspace(args.q, p, plan, context);
  const Status status = cuda::run_decode(p, plan, context.stream);
  check_launch(status, context, *plan.instance,
               p.batch_size * p.num_heads_kv * p.num_m_blocks * p.kv_splits);
  if (plan.kv_splits > 1 && !p.unified) {
    const CombineParams c = cuda::combine_of(p);
    check_combine(cuda::run_combine(c, element, context.device, context.stream), context, c);
  }
}

std::tuple<Tensor, Tensor> decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& kv_start,
    const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap, int64_t causal,
    int64_t window_left, int64_t window_right, int64_t kv_splits, bool batch_invariant,
    const std::optional<double>& phi, const std::optional<Tensor>& phi_heads,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& alibi_slopes) {
  const AttentionArgs args{
      q,       k_cache, v_cache,     mask,         kv_start,    seqlens_kv,  softmax_scale,
      softcap, causal,  window_left, window_right, block_table, alibi_slopes};
  CudaAttentionParams p;
  set_cuda_params(p, args);
  set_softmax(p, {phi, phi_heads}, q);
  Outputs outputs = new_outputs(q, p);
  decode_into(args, kv_splits, batch_invariant, outputs, p);
  return {outputs.out, outputs.lse};
}

void decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& kv_start,
                const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap,
                int64_t causal, int64_t window_left, int64_t window_right, int64_t kv_splits,
                bool batch_invariant, Tensor out, Tensor lse, const std::optional<double>& phi,
                const std::optional<Tensor>& phi_heads, const std::optional<Tensor>& block_table,
                const std::optional<Tensor>& alibi_slopes) {
  const AttentionArgs args{
      q,       k_cache, v_cache,     mask,         kv_start,    seqlens_kv,  softmax_scale,
      softcap, causal,  window_left, window_right, block_table, alibi_slopes};
  CudaAttentionParams p;
  set_cuda_params(p, args);
  set_softmax(p, {phi, phi_heads}, q);
  Outputs outputs{out, lse};
  check_outputs(outputs, q, p);
  decode_into(args, kv_splits, batch_invariant, outputs, p);
}

// As on the CPU; `longest` stands in for the length of the cache, the one length decode plans by.
Tensor plan(const Tensor& q, const Tensor& k, const Tensor& v, std::string kernel, int64_t longest,
            int64_t kv_splits, bool batch_invariant) {
  CudaAttentionParams p;
  const bool is_decode = prepare_plan(p, q, k, v, kernel, longest, kv_splits, DeviceType::CUDA);
  const cuda::ElementType element = cuda_element_type(q.scalar_type());
  const CudaContext context(q);
  cuda::DecodePlan plan;
  plan.instance =
      &cuda::choose_attention(kernel, element, p.head_dim, p.head_dim_v, context.device);
  if (is_decode && longest > 0 && q.numel() > 0) {
    p.seqlen_kv = longest;
    plan = cuda::plan_decode(p, element, context.device, kv_splits, batch_invariant);
  }
  int64_t index = 0;
  while (cuda::kInstances[index] != plan.instance) ++index;
  return plan_result(plan.instance->block_m, plan.instance->block_n, plan.kv_splits, index);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  CombineParams c;
  Outputs outputs = prepare_merge(c, outs, lses, DeviceType::CUDA);
  count_cuda_call();
  if (finish_without_keys(outputs, c.num_states)) return {outputs.out, outputs.lse};

  const CudaContext context(outs);
  const cuda::ElementType element = cuda_element_type(outs.scalar_type());
  check_combine(cuda::run_combine(c, element, context.device, context.stream), context, c);
  return {outputs.out, outputs.lse};
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CUDA, m) {
  m.impl("plan", FIL_BOX(flashinfer_lite::plan));
  m.impl("decode", FIL_BOX(flashinfer_lite::decode));
  m.impl("decode.out", FIL_BOX(flashinfer_lite::decode_out));
  m.impl("merge_states", FIL_BOX(flashinfer_lite::merge_states));
}
