// attention_fwd, attention_bwd, attention_varlen_fwd and attention_varlen_bwd on CUDA devices.
#include <tuple>

#include "ops/attention_varlen.h"
#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

// p, complete but for what goes to the outputs.
void run_forward(const Tensor& q, CudaAttentionParams& p, Outputs& outputs) {
  set_outputs(p, outputs);
  count_cuda_call();
  if (finish_without_keys(outputs, p.seqlen_kv)) return;

  const CudaContext context(q);
  if (p.unified) p.row_counters = cuda_row_counters(q);
  const cuda::Instance& instance =
      cuda::choose_attention("attention_fwd", cuda_element_type(q.scalar_type()), p.head_dim,
                             p.head_dim_v, context.device);
  const Status status = cuda::run_attention_fwd(p, instance, context.device, context.stream);
  check_launch(status, context, instance, p.batch_size * p.num_heads_kv * p.num_m_blocks);
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& kv_start, const std::optional<Tensor>& seqlens_kv,
    double softmax_scale, double softcap, int64_t causal, int64_t window_left, int64_t window_right,
    const std::optional<double>& phi, const std::optional<Tensor>& phi_heads,
    bool /*deterministic*/, const std::optional<Tensor>& alibi_slopes) {
  CudaAttentionParams p;
  set_cuda_params(p, {q, k, v, mask, kv_start, seqlens_kv, softmax_scale, softcap, causal,
                      window_left, window_right, kNoTensor, alibi_slopes});
  set_softmax(p, {phi, phi_heads}, q);
  Outputs outputs = new_outputs(q, p);
  run_forward(q, p, outputs);
  return {outputs.out, outputs.lse};
}

// The gradient of a mask is added up by atomics: where several rows share an element of it, in any
// order.
void check_deterministic(const Gradients& gradients, const AttentionParams& p) {
  const int64_t full[4] = {p.batch_size, p.num_heads_q, p.seqlen_q, p.seqlen_kv};
  const Tensor& dmask = gradients.dmask;
  bool own = true;
  for (int64_t i = 0; i < 4; ++i) own = own && dmask.size(i) == full[i];
  check(own, "deterministic: expected a mask of shape [", full[0], ", ", full[1], ", ", full[2],
        ", ", full[3], "] where wants_dmask is True, got ", shape_text(dmask));
}

// p, complete but for its working memory.
void run_backward(const Tensor& q, CudaAttentionBwdParams& p, bool deterministic) {
  const CudaContext context(q);
  const cuda::Instance& instance =
      cuda::choose_attention("attention_bwd", cuda_element_type(q.scalar_type()), p.head_dim,
                             p.head_dim_v, context.device);
  const cuda::BackwardMemory memory = cuda::backward_memory(p, instance);
  const Tensor row_stats = new_tensor(q, {memory.row_stats}, ScalarType::Float);
  const Tensor dq_accum = new_tensor(q, {deterministic ? 0 : memory.dq_accum}, ScalarType::Float);
  p.row_stats = static_cast<float*>(row_stats.data_ptr());
  if (!deterministic) p.dq_accum = static_cast<float*>(dq_accum.data_ptr());
  const Status status = cuda::run_attention_bwd(p, instance, context.device, context.stream);
  check_launch(status, context, instance, p.batch_size * p.num_heads_kv * p.num_m_blocks);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& kv_start, const std::optional<Tensor>& seqlens_kv,
    double softmax_scale, double softcap, int64_t causal, int64_t window_left, int64_t window_right,
    bool wants_dmask, bool deterministic, const std::optional<Tensor>& alibi_slopes) {
  const AttentionArgs args{
      q,       k,      v,           mask,         kv_start,  seqlens_kv,  softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes};
  CudaAttentionBwdParams p;
  set_cuda_params(p, args);
  set_results(p, {dout, dlse, out, lse}, args);
  Gradients gradients = new_gradients(p, args, wants_dmask);
  if (wants_dmask && deterministic) check_deterministic(gradients, p);
  set_strided(p.dq, gradients.dq);
  set_strided(p.dk, gradients.dk);
  set_strided(p.dv, gradients.dv);
  count_cuda_call();
  if (gradients.finished(p, lse)) return gradients.tuple();

  if (wants_dmask) {
    p.dmask = {static_cast<float*>(gradients.dmask.data_ptr()), gradients.dmask_stride(0),
               gradients.dmask_stride(1), gradients.dmask_stride(2), gradients.dmask_stride(3)};
  }
  run_backward(q, p, deterministic);
  return gradients.tuple();
}

// The offsets, which only the device reads, unless they and the lengths are to be checked.
void set_ragged(CudaAttentionParams& p, const RaggedArgs& r, const AttentionArgs& args) {
  p.ragged = {lengths_view(r.cu_seqlens_q), lengths_view(r.cu_seqlens_kv), args.batch_size()};
  if (!wants_value_checks(args.q)) return;
  const std::optional<Tensor> cu_seqlens_q = on_host(r.cu_seqlens_q),
                              cu_seqlens_kv = on_host(r.cu_seqlens_kv),
                              kv_start = on_host(args.kv_start),
                              seqlens_kv = on_host(args.seqlens_kv);
  const AttentionArgs host{args.q,
                           args.k,
                           args.v,
                           args.mask,
                           kv_start,
                           seqlens_kv,
                           args.softmax_scale,
                           args.softcap,
                           args.causal,
                           args.window_left,
                           args.window_right};
  const Ragged checked({*cu_seqlens_q, *cu_seqlens_kv, r.max_seqlen_q, r.max_seqlen_kv}, host, p);
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_kv, const std::optional<Tensor>& kv_start,
    const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap, int64_t causal,
    int64_t window_left, int64_t window_right, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_kv, const std::optional<double>& phi,
    const std::optional<Tensor>& phi_heads, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& alibi_slopes, bool /*deterministic*/) {
  check(!block_table,
        "block_table: expected none on CUDA, where Python's attention_varlen joins the pages");
  const RaggedArgs ragged{cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv};
  const AttentionArgs args{
      q,       k,      v,           kNoTensor,    kv_start,  seqlens_kv,   softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes, check_ragged(ragged, q)};
  CudaAttentionParams p;
  set_cuda_params(p, args);
  set_softmax(p, {phi, phi_heads}, q);
  set_ragged(p, ragged, args);
  Outputs outputs = new_outputs(q, p, true);
  run_forward(q, p, outputs);
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_kv, const std::optional<Tensor>& kv_start,
    const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap, int64_t causal,
    int64_t window_left, int64_t window_right, const std::optional<Tensor>& alibi_slopes,
    bool deterministic) {
  const RaggedArgs ragged{cu_seqlens_q, cu_seqlens_kv, {}, {}};
  const AttentionArgs args{
      q,       k,      v,           kNoTensor,    kv_start,  seqlens_kv,   softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes, check_ragged(ragged, q)};
  CudaAttentionBwdParams p;
  set_cuda_params(p, args);
  set_results(p, {dout, dlse, out, lse}, args);
  set_ragged(p, ragged, args);
  const ScalarType type = q.scalar_type();
  Gradients gradients{new_tensor(q, {p.seqlen_q, p.num_heads_q, p.head_dim}, type),
                      new_tensor(k, {p.seqlen_kv, p.num_heads_kv, p.head_dim}, type),
                      new_tensor(v, {p.seqlen_kv, p.num_heads_kv, p.head_dim_v}, type),
                      {}};
  set_strided(p.dq, gradients.dq);
  set_strided(p.dk, gradients.dk);
  set_strided(p.dv, gradients.dv);
  count_cuda_call();
  if (!gradients.finished(p, lse)) run_backward(q, p, deterministic);
  return {gradients.dq, gradients.dk, gradients.dv};
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CUDA, m) {
  m.impl("attention_fwd", FIL_BOX(flashinfer_lite::attention_fwd));
  m.impl("attention_bwd", FIL_BOX(flashinfer_lite::attention_bwd));
  m.impl("attention_varlen_fwd", FIL_BOX(flashinfer_lite::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", FIL_BOX(flashinfer_lite::attention_varlen_bwd));
}
