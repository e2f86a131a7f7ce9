#include "ops/forward_cpu.h"

#include <algorithm>
#include <vector>

namespace flashinfer_lite {
namespace {

// Memory of the splits' partial results.
struct Partials {
  Partials(const Tensor& like, AttentionFwdParams& p)
      : out(new_tensor(like, {p.kv_splits, p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v},
                       accumulator_type(like.scalar_type()))),
        // The second half is row_max_partial, of a unified pass.
        rows(new_tensor(like,
                        {p.unified ? 2 : 1, p.kv_splits, p.batch_size, p.num_heads_q, p.seqlen_q},
                        accumulator_type(like.scalar_type()))) {
    p.out_partial = out.data_ptr();
    p.lse_partial = rows.data_ptr();
    if (p.unified) {
      p.row_max_partial = static_cast<char*>(p.lse_partial) + rows.stride(0) * rows.element_size();
    }
  }

  Tensor out, rows;
};

CombineParams combine_of(const AttentionFwdParams& p) {
  CombineParams c;
  c.num_states = p.kv_splits;
  c.batch_size = p.batch_size;
  c.seqlen_q = p.seqlen_q;
  c.num_heads_q = p.num_heads_q;
  c.head_dim_v = p.head_dim_v;
  c.out_partial.data = p.out_partial;
  c.out_partial.head = p.head_dim_v;
  c.out_partial.seqlen = p.num_heads_q * p.head_dim_v;
  c.out_partial.batch = p.seqlen_q * c.out_partial.seqlen;
  c.out_partial_state = p.batch_size * c.out_partial.batch;
  c.lse_partial = p.lse_partial;
  c.lse_partial_seqlen = 1;
  c.lse_partial_head = p.seqlen_q;
  c.lse_partial_batch = p.num_heads_q * p.seqlen_q;
  c.lse_partial_state = p.batch_size * c.lse_partial_batch;
  c.out = p.out;
  c.lse = p.lse;
  c.only = p.only;
  return c;
}

double merge_work(const AttentionFwdParams& p) {
  return double(p.kv_splits) * p.batch_size * p.seqlen_q * p.num_heads_q * p.head_dim_v;
}

void run_online(const cpu::Kernels& kernels, const AttentionFwdParams& p) {
  run_tasks(kernels.attention_fwd, p, forward_work(p));
  if (p.kv_splits > 1) run_tasks(kernels.combine, combine_of(p), merge_work(p), 16);
}

// Counts what a unified pass has said of its rows. Whether some are to be computed again.
bool has_violated_rows(const std::vector<RowVerdict>& verdict) {
  const auto rows_with = [&](RowVerdict wanted) {
    return static_cast<int64_t>(std::count(verdict.begin(), verdict.end(), wanted));
  };
  const int64_t violated = rows_with(RowVerdict::kViolated);
  count_rows(rows_with(RowVerdict::kGood) + violated, violated);
  return violated > 0;
}

// Makes of a unified pass the online one for the rows that it has marked.
void turn_online(AttentionFwdParams& p) {
  p.unified = false;
  p.only = p.verdict;
  p.verdict = nullptr;
}

}  // namespace

void run_forward(const Tensor& like, const cpu::Kernels& kernels, AttentionFwdParams& p) {
  std::optional<Partials> partials;
  if (p.kv_splits > 1) partials.emplace(like, p);
  if (!p.unified) return run_online(kernels, p);

  std::vector<RowVerdict> verdict(p.batch_size * p.num_heads_q * p.seqlen_q);
  p.verdict = verdict.data();
  run_tasks(kernels.attention_fwd, p, forward_work(p));
  if (p.kv_splits > 1) run_tasks(kernels.unified_merge, p, merge_work(p), 16);

  if (!has_violated_rows(verdict)) return;
  turn_online(p);
  run_online(kernels, p);
}

void run_forward(const cpu::Kernels& kernels, std::vector<AttentionFwdParams>& problems,
                 const std::vector<RowVerdict>& verdict) {
  double work = 0;
  for (const AttentionFwdParams& p : problems) work += forward_work(p);
  run_tasks(kernels.attention_fwd, problems, work);
  if (!has_violated_rows(verdict)) return;
  for (AttentionFwdParams& p : problems) turn_online(p);
  run_tasks(kernels.attention_fwd, problems, work);
}

}  // namespace flashinfer_lite
