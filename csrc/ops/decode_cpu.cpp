// decode (Flash-Decoding) and merge_states on the CPU.
#include <tuple>

#include "common/heuristics.h"
#include "ops/decode.h"
#include "ops/forward_cpu.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

// Splits of the longest sequence, and their length in keys: whole key blocks.
void choose_splits(AttentionFwdParams& p, const CpuForwardPlan& plan, int64_t longest,
                   int64_t kv_splits, bool batch_invariant) {
  const int64_t threads = p.threads;
  const int64_t row_blocks = p.batch_size * ceil_div(p.rows_per_kv_head(), plan.tile.block_m);
  const int64_t most_splits = batch_invariant ? ceil_div(longest, kBatchInvariantSplit)
                              : kv_splits > 0 ? kv_splits
                                              : longest / kMinKeysPerSplit;
  // Heads that may walk together do, if splits can occupy the threads instead.
  const int64_t groups = row_blocks * ceil_div(p.num_heads_kv, plan.heads_together);
  p.heads_per_task = groups * most_splits >= threads
                         ? plan.heads_together
                         : cpu_heads_per_task(plan, row_blocks * p.num_heads_kv, threads);
  if (batch_invariant) {
    p.keys_per_split = kBatchInvariantSplit;
    p.kv_splits = std::max<int64_t>(most_splits, 1);
    return;
  }
  if (kv_splits == 0) {
    const int64_t tasks = row_blocks * ceil_div(p.num_heads_kv, p.heads_per_task);
    kv_splits = cpu_kv_splits(tasks, threads, longest);
  }
  const int64_t block_n = plan.tile.block_n;
  p.keys_per_split =
      std::max<int64_t>(ceil_div(ceil_div(longest, kv_splits), block_n), 1) * block_n;
  p.kv_splits = kv_splits;
}

int64_t longest_sequence(const AttentionParams& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch_size; ++b) {
    const Visibility visibility = p.visibility(b);
    longest = std::max(longest, visibility.kv_end - visibility.kv_begin);
  }
  return longest;
}

void decode_into(const AttentionArgs& args, int64_t kv_splits, bool batch_invariant,
                 const Outputs& outputs, AttentionFwdParams& p) {
  const cpu::Kernels& kernels = cpu_kernels(args.q.scalar_type());
  check_kv_splits(kv_splits);
  set_outputs(p, outputs);
  count_call();
  if (outputs.lse.numel() == 0) return;
  p.threads = torch::stable::get_num_threads();
  const CpuForwardPlan plan = kernels.forward_plan(p);
  choose_splits(p, plan, longest_sequence(p), kv_splits, batch_invariant);

  run_forward(args.q, kernels, p);
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
  AttentionFwdParams p;
  Lengths lengths;
  set_params(p, args, DeviceType::CPU);
  set_lengths(p, lengths, kv_start, seqlens_kv);
  set_pages(p, lengths, block_table);
  set_softmax(p, {phi, phi_heads}, q);
  const Outputs outputs = new_outputs(q, p);
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
  AttentionFwdParams p;
  Lengths lengths;
  set_params(p, args, DeviceType::CPU);
  set_lengths(p, lengths, kv_start, seqlens_kv);
  set_pages(p, lengths, block_table);
  set_softmax(p, {phi, phi_heads}, q);
  const Outputs outputs{out, lse};
  check_outputs(outputs, q, p);
  decode_into(args, kv_splits, batch_invariant, outputs, p);
}

// What attention_fwd or decode would choose for these tensors and a longest sequence of `longest`
// keys, for explain(): int64 [block_m, block_n, kv_splits, instance].
Tensor plan(const Tensor& q, const Tensor& k, const Tensor& v, std::string kernel, int64_t longest,
            int64_t kv_splits, bool batch_invariant) {
  AttentionFwdParams p;
  const bool is_decode = prepare_plan(p, q, k, v, kernel, longest, kv_splits, DeviceType::CPU);
  if (p.num_heads_kv == 0) return plan_result(0, 0, 1, -1);
  p.threads = torch::stable::get_num_threads();
  const CpuForwardPlan plan = cpu_kernels(q.scalar_type()).forward_plan(p);
  if (is_decode) choose_splits(p, plan, longest, kv_splits, batch_invariant);
  return plan_result(plan.tile.block_m, plan.tile.block_n, p.kv_splits, -1);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  CombineParams c;
  const Outputs outputs = prepare_merge(c, outs, lses, DeviceType::CPU);
  const cpu::Kernels& kernels = cpu_kernels(outs.scalar_type());
  count_call();
  if (outputs.lse.numel() > 0) run_tasks(kernels.combine, c, double(outs.numel()), 16);
  return {outputs.out, outputs.lse};
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("plan", FIL_BOX(flashinfer_lite::plan));
  m.impl("decode", FIL_BOX(flashinfer_lite::decode));
  m.impl("decode.out", FIL_BOX(flashinfer_lite::decode_out));
  m.impl("merge_states", FIL_BOX(flashinfer_lite::merge_states));
}
