// attention_varlen_fwd and attention_varlen_bwd on the CPU: each sequence is a problem of batch
// size 1, so that its results are bit for bit those of attention, and all of their tasks share the
// threads.
#include <cstring>
#include <limits>
#include <tuple>

#include "common/heuristics.h"
#include "ops/attention_varlen.h"
#include "ops/backward_cpu.h"
#include "ops/forward_cpu.h"
#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

const void* moved(const void* data, int64_t bytes) {
  return static_cast<const char*>(data) + bytes;
}
void* moved(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

// Rows of a ragged batch, from one sequence's first on.
template <class Pointer>
void move_to(Strided<Pointer>& x, int64_t row, int64_t element_size) {
  x.data = moved(x.data, row * x.seqlen * element_size);
}

// Makes of the parameters of a whole ragged batch those of sequence b.
void move_to_sequence(AttentionParams& p, const Ragged& ragged, int64_t b, int64_t element_size) {
  p.seqlen_q = ragged.q[b + 1] - ragged.q[b];
  p.seqlen_kv = ragged.kv[b + 1] - ragged.kv[b];
  move_to(p.q, ragged.q[b], element_size);
  if (p.block_table.pages != nullptr) {
    p.block_table.pages += b * p.block_table.row;
  } else {
    move_to(p.k, ragged.kv[b], element_size);
    move_to(p.v, ragged.kv[b], element_size);
  }
  p.alibi.slopes += b * p.alibi.batch;
  const Lengths& lengths = ragged.lengths;
  if (!lengths.kv_start.empty()) p.kv_start = &lengths.kv_start[b];
  if (!lengths.seqlens_kv.empty()) p.seqlens_kv = &lengths.seqlens_kv[b];
}

// The pages of keys that some row sees, of all sequences.
void set_ragged_pages(AttentionParams& whole, Ragged& ragged, const Tensor& block_table,
                      int64_t element_size) {
  std::vector<KeyRange> seen(ragged.batch_size());
  for (int64_t b = 0; b < ragged.batch_size(); ++b) {
    AttentionParams p = whole;
    move_to_sequence(p, ragged, b, element_size);
    if (p.seqlen_q > 0) seen[b] = p.visibility(0).rows(0, p.seqlen_q - 1);
  }
  read_pages(whole.block_table, ragged.lengths.pages, block_table, seen);
}

// Rows [begin, end) of a contiguous tensor become 0.
void zero_rows(const Tensor& x, int64_t begin, int64_t end) {
  if (begin >= end || x.numel() == 0) return;
  const int64_t row = x.numel() / x.size(0) * x.element_size();
  std::memset(static_cast<char*>(x.data_ptr()) + begin * row, 0, (end - begin) * row);
}

template <class Acc>
void fill_tails_of_lse(const Tensor& lse, int64_t first, int64_t last) {
  const int64_t total = lse.size(1);
  for (int64_t h = 0; h < lse.size(0); ++h) {
    Acc* row = static_cast<Acc*>(lse.data_ptr()) + h * total;
    std::fill(row, row + first, -std::numeric_limits<Acc>::infinity());
    std::fill(row + last, row + total, -std::numeric_limits<Acc>::infinity());
  }
}

// What rows without a key have, for those before the first sequence and behind the last.
void fill_tails(const Outputs& outputs, const Ragged& ragged) {
  const int64_t first = ragged.q.front(), last = ragged.q.back();
  zero_rows(outputs.out, 0, first);
  zero_rows(outputs.out, last, outputs.out.size(0));
  if (outputs.lse.scalar_type() == ScalarType::Double) {
    fill_tails_of_lse<double>(outputs.lse, first, last);
  } else {
    fill_tails_of_lse<float>(outputs.lse, first, last);
  }
}

// KV heads may walk together as far as there are tasks for every thread in all sequences.
void choose_heads_per_task(const cpu::Kernels& kernels, std::vector<AttentionFwdParams>& problems) {
  int64_t tasks = 0;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<CpuForwardPlan> plans;
  plans.reserve(problems.size());
  for (AttentionFwdParams& p : problems) {
    p.threads = threads;
    plans.push_back(kernels.forward_plan(p));
    tasks += p.num_heads_kv * ceil_div(p.rows_per_kv_head(), plans.back().tile.block_m);
  }
  for (size_t i = 0; i < problems.size(); ++i) {
    problems[i].heads_per_task = cpu_heads_per_task(plans[i], tasks, threads);
  }
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_kv, const std::optional<Tensor>& kv_start,
    const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap, int64_t causal,
    int64_t window_left, int64_t window_right, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_kv, const std::optional<double>& phi,
    const std::optional<Tensor>& phi_heads, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& alibi_slopes, bool /*deterministic*/) {
  const RaggedArgs ragged_args{cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv};
  const int64_t batch_size = check_ragged(ragged_args, q);
  const AttentionArgs args{
      q,       k,      v,           kNoTensor,    kv_start,    seqlens_kv,   softmax_scale,
      softcap, causal, window_left, window_right, block_table, alibi_slopes, batch_size};
  AttentionFwdParams whole;
  set_params(whole, args, DeviceType::CPU);
  set_softmax(whole, {phi, phi_heads}, q);
  Ragged ragged(ragged_args, args, whole);
  if (block_table) set_ragged_pages(whole, ragged, *block_table, q.element_size());
  const cpu::Kernels& kernels = cpu_kernels(q.scalar_type());
  Outputs outputs = new_outputs(q, whole, true);
  set_outputs(whole, outputs);
  count_call();
  if (outputs.lse.numel() == 0) return {outputs.out, outputs.lse};
  fill_tails(outputs, ragged);

  std::vector<RowVerdict> verdict(whole.unified ? outputs.lse.numel() : 0);
  std::vector<AttentionFwdParams> problems;
  for (int64_t b = 0; b < ragged.batch_size(); ++b) {
    const int64_t first = ragged.q[b];
    if (first == ragged.q[b + 1]) continue;
    AttentionFwdParams& p = problems.emplace_back(whole);
    move_to_sequence(p, ragged, b, q.element_size());
    move_to(p.out, first, q.element_size());
    p.lse = moved(p.lse, first * outputs.lse.element_size());
    if (whole.unified) p.verdict = verdict.data() + first;
  }
  choose_heads_per_task(kernels, problems);
  run_forward(kernels, problems, verdict);
  return {outputs.out, outputs.lse};
}

// Bitwise repeatable whether or not that is asked for.
std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_kv, const std::optional<Tensor>& kv_start,
    const std::optional<Tensor>& seqlens_kv, double softmax_scale, double softcap, int64_t causal,
    int64_t window_left, int64_t window_right, const std::optional<Tensor>& alibi_slopes,
    bool /*deterministic*/) {
  const RaggedArgs ragged_args{cu_seqlens_q, cu_seqlens_kv, {}, {}};
  const int64_t batch_size = check_ragged(ragged_args, q);
  const AttentionArgs args{
      q,       k,      v,           kNoTensor,    kv_start,  seqlens_kv,   softmax_scale,
      softcap, causal, window_left, window_right, kNoTensor, alibi_slopes, batch_size};
  AttentionBwdParams whole;
  set_params(whole, args, DeviceType::CPU);
  set_results(whole, {dout, dlse, out, lse}, args);
  const Ragged ragged(ragged_args, args, whole);
  const ScalarType type = q.scalar_type();
  const Tensor dq = new_tensor(q, {whole.seqlen_q, whole.num_heads_q, whole.head_dim}, type);
  const Tensor dk = new_tensor(k, {whole.seqlen_kv, whole.num_heads_kv, whole.head_dim}, type);
  const Tensor dv = new_tensor(v, {whole.seqlen_kv, whole.num_heads_kv, whole.head_dim_v}, type);
  set_strided(whole.dq, dq);
  set_strided(whole.dk, dk);
  set_strided(whole.dv, dv);
  count_call();

  // Rows that no problem writes: tails, and sequences that lack queries or keys.
  const auto zero = [&](int64_t q_begin, int64_t q_end, int64_t kv_begin, int64_t kv_end) {
    zero_rows(dq, q_begin, q_end);
    zero_rows(dk, kv_begin, kv_end);
    zero_rows(dv, kv_begin, kv_end);
  };
  if (lse.numel() == 0) {
    zero(0, whole.seqlen_q, 0, whole.seqlen_kv);
    return {dq, dk, dv};
  }
  zero(0, ragged.q.front(), 0, ragged.kv.front());
  zero(ragged.q.back(), whole.seqlen_q, ragged.kv.back(), whole.seqlen_kv);

  const int64_t size = q.element_size(), lse_size = lse.element_size();
  std::vector<AttentionBwdParams> problems;
  for (int64_t b = 0; b < ragged.batch_size(); ++b) {
    const int64_t first = ragged.q[b], first_key = ragged.kv[b];
    if (first == ragged.q[b + 1] || first_key == ragged.kv[b + 1]) {
      zero(first, ragged.q[b + 1], first_key, ragged.kv[b + 1]);
      continue;
    }
    AttentionBwdParams& p = problems.emplace_back(whole);
    move_to_sequence(p, ragged, b, size);
    move_to(p.out, first, size);
    move_to(p.dout, first, size);
    move_to(p.dq, first, size);
    move_to(p.dk, first_key, size);
    move_to(p.dv, first_key, size);
    p.lse = moved(p.lse, first * lse_size);
    if (p.dlse) p.dlse = moved(p.dlse, first * lse_size);
  }
  run_backward(q, cpu_kernels(type), std::move(problems));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CPU, m) {
  m.impl("attention_varlen_fwd", FIL_BOX(flashinfer_lite::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", FIL_BOX(flashinfer_lite::attention_varlen_bwd));
}
