// decode (Flash-Decoding) and merge_states on the CPU.
#include <tuple>

#include "common/heuristics.h"
#include "ops/attention.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

// Splits of the longest sequence, and their length in keys: whole key blocks.
void choose_splits(AttentionFwdParams& p, const CpuForwardPlan& plan, int64_t longest,
                   int64_t kv_splits, bool batch_invariant) {
  const int64_t threads = torch::stable::get_num_threads();
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

void decode_into(const AttentionArgs& args, int64_t kv_splits, bool batch_invariant, Tensor& out,
                 Tensor& lse, AttentionFwdParams& p) {
  const ScalarType type = args.q.scalar_type(), accumulator = accumulator_type(type);
  const cpu::Kernels& kernels = cpu_kernels(type);
  check(kv_splits >= 0 && kv_splits <= 4096, "kv_splits: expected 0 (automatic) to 4096, got ",
        kv_splits);
  set_strided(p.out, out);
  p.lse = lse.data_ptr();
  count_call();
  if (lse.numel() == 0) return;
  const CpuForwardPlan plan = cpu_forward_plan(p.cpu_problem(args.q.element_size()));
  choose_splits(p, plan, longest_sequence(p), kv_splits, batch_invariant);

  if (p.kv_splits == 1) {
    run_tasks(kernels.attention_fwd, p, forward_work(p));
    return;
  }
  Tensor out_partial = torch::stable::new_empty(
      args.q, {p.kv_splits, p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v}, accumulator);
  Tensor lse_partial = torch::stable::new_empty(
      args.q, {p.kv_splits, p.batch_size, p.num_heads_q, p.seqlen_q}, accumulator);
  p.out_partial = out_partial.data_ptr();
  p.lse_partial = lse_partial.data_ptr();
  run_tasks(kernels.attention_fwd, p, forward_work(p));

  CombineParams c;
  c.num_states = p.kv_splits;
  c.batch_size = p.batch_size;
  c.seqlen_q = p.seqlen_q;
  c.num_heads_q = p.num_heads_q;
  c.head_dim_v = p.head_dim_v;
  c.out_partial = {p.out_partial, out_partial.stride(1), out_partial.stride(2),
                   out_partial.stride(3)};
  c.out_partial_state = out_partial.stride(0);
  c.lse_partial = p.lse_partial;
  c.lse_partial_state = lse_partial.stride(0);
  c.lse_partial_batch = lse_partial.stride(1);
  c.lse_partial_head = lse_partial.stride(2);
  c.lse_partial_seqlen = lse_partial.stride(3);
  c.out = p.out;
  c.lse = p.lse;
  run_tasks(kernels.combine, c, double(out_partial.numel()), 16);
}

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& kv_start,
                                  const std::optional<Tensor>& seqlens_kv, double softmax_scale,
                                  double softcap, int64_t causal, int64_t window_left,
                                  int64_t window_right, int64_t kv_splits, bool batch_invariant) {
  AttentionFwdParams p;
  Lengths lengths;
  const AttentionArgs args{q,        k_cache,     v_cache,       mask,
                           kv_start, seqlens_kv,  softmax_scale, softcap,
                           causal,   window_left, window_right};
  set_params(p, lengths, args);
  Tensor out = torch::stable::new_empty(q, {p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v},
                                        q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {p.batch_size, p.num_heads_q, p.seqlen_q},
                                        accumulator_type(q.scalar_type()));
  decode_into(args, kv_splits, batch_invariant, out, lse, p);
  return {out, lse};
}

void decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& kv_start,
                const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap,
                int64_t causal, int64_t window_left, int64_t window_right, int64_t kv_splits,
                bool batch_invariant, Tensor out, Tensor lse) {
  AttentionFwdParams p;
  Lengths lengths;
  const AttentionArgs args{q,        k_cache,     v_cache,       mask,
                           kv_start, seqlens_kv,  softmax_scale, softcap,
                           causal,   window_left, window_right};
  set_params(p, lengths, args);
  const int64_t rows[3] = {p.batch_size, p.seqlen_q, p.num_heads_q};
  check_cpu("out", out);
  check_dtype("out", out, q.scalar_type());
  check_shape("out", out, {rows[0], rows[1], rows[2], p.head_dim_v});
  check_last_stride("out", out);
  for (int64_t i = 0; i < 3; ++i) {
    check(rows[i] <= 1 || out.stride(i) != 0,
          "out: expected its own memory for every element, "
          "got stride 0 in dimension ",
          i);
  }
  check_cpu("lse", lse);
  check_dtype("lse", lse, accumulator_type(q.scalar_type()));
  check_shape("lse", lse, {p.batch_size, p.num_heads_q, p.seqlen_q});
  check(lse.is_contiguous(), "lse: expected a contiguous tensor, got other strides");
  decode_into(args, kv_splits, batch_invariant, out, lse, p);
}

// What decode would choose for these tensors and a longest sequence of `longest` keys, for
// explain(): int64 [block_m, block_n, kv_splits].
Tensor decode_plan(const Tensor& q, const Tensor& k, const Tensor& v, int64_t longest,
                   int64_t kv_splits, bool batch_invariant) {
  AttentionFwdParams p;
  Lengths lengths;
  set_params(p, lengths, {q, k, v, {}, {}, {}, 1.0, 0.0, 0, -1, -1});
  check(longest >= 0, "longest: expected >= 0, got ", longest);
  check(kv_splits >= 0 && kv_splits <= 4096, "kv_splits: expected 0 (automatic) to 4096, got ",
        kv_splits);
  Tensor out = torch::stable::empty({3}, ScalarType::Long);
  int64_t* values = static_cast<int64_t*>(out.data_ptr());
  values[0] = values[1] = 0;
  values[2] = 1;
  if (p.num_heads_kv == 0) return out;
  const CpuForwardPlan plan = cpu_forward_plan(p.cpu_problem(q.element_size()));
  choose_splits(p, plan, longest, kv_splits, batch_invariant);
  values[0] = plan.tile.block_m;
  values[1] = plan.tile.block_n;
  values[2] = p.kv_splits;
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  const ScalarType type = outs.scalar_type();
  check(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
            type == ScalarType::Half,
        "outs: expected dtype float64, float32, bfloat16 or float16, got ", dtype_text(type));
  check_cpu("outs", outs);
  check_cpu("lses", lses);
  check(outs.dim() == 5,
        "outs: expected 5 dimensions [num_states, batch, seqlen_q, num_heads_q, "
        "head_dim_v], got ",
        shape_text(outs));
  check_last_stride("outs", outs);
  CombineParams c;
  c.num_states = outs.size(0);
  c.batch_size = outs.size(1);
  c.seqlen_q = outs.size(2);
  c.num_heads_q = outs.size(3);
  c.head_dim_v = outs.size(4);
  check_dtype("lses", lses, accumulator_type(type));
  check_shape("lses", lses, {c.num_states, c.batch_size, c.num_heads_q, c.seqlen_q});
  const cpu::Kernels& kernels = cpu_kernels(type);
  Tensor out =
      torch::stable::new_empty(outs, {c.batch_size, c.seqlen_q, c.num_heads_q, c.head_dim_v}, type);
  Tensor lse = torch::stable::new_empty(outs, {c.batch_size, c.num_heads_q, c.seqlen_q},
                                        accumulator_type(type));
  c.partial_in_accumulator = false;
  c.out_partial = {outs.data_ptr(), outs.stride(1), outs.stride(2), outs.stride(3)};
  c.out_partial_state = outs.stride(0);
  c.lse_partial = lses.data_ptr();
  c.lse_partial_state = lses.stride(0);
  c.lse_partial_batch = lses.stride(1);
  c.lse_partial_head = lses.stride(2);
  c.lse_partial_seqlen = lses.stride(3);
  set_strided(c.out, out);
  c.lse = lse.data_ptr();
  count_call();
  if (lse.numel() > 0) run_tasks(kernels.combine, c, double(outs.numel()), 16);
  return {out, lse};
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("decode_plan", FIL_BOX(flashinfer_lite::decode_plan));
  m.impl("decode", FIL_BOX(flashinfer_lite::decode));
  m.impl("decode.out", FIL_BOX(flashinfer_lite::decode_out));
  m.impl("merge_states", FIL_BOX(flashinfer_lite::merge_states));
}
