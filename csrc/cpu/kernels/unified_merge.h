// Merges the splits of a pass with a unified maximum: numerators and denominators are summed in the
// order of the splits, the row's maximum is the largest, and the guard decides once for the whole
// row. An underflowing split is legal. A task is one row (batch, query, head).
#pragma once

#include "cpu/kernels/unified.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class Element>
int64_t unified_merge_tasks(const AttentionFwdParams& p) {
  return p.batch_size * p.seqlen_q * p.num_heads_q;
}

template <class Element>
int64_t unified_merge_scratch(const AttentionFwdParams& p) {
  return p.head_dim_v * int64_t{sizeof(Accumulator<Element>)};
}

template <class Element>
void unified_merge(const AttentionFwdParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  const Row at{task / p.num_heads_q % p.seqlen_q, task % p.num_heads_q, {}};
  const int64_t batch = task / p.num_heads_q / p.seqlen_q;
  const int64_t rows = unified_merge_tasks<Element>(p);
  const int64_t row = p.row_index(batch, at.head, at.query);

  Acc* numerator = static_cast<Acc*>(scratch);
  for (int64_t c = 0; c < p.head_dim_v; ++c) numerator[c] = 0;
  UnifiedRow<Acc> total{numerator, Acc(-__builtin_inf()), 0, phi_log2<Acc>(p, at.head)};
  for (int64_t split = 0; split < p.kv_splits; ++split) {
    total.row_sum += static_cast<const Acc*>(p.lse_partial)[split * rows + row];
    total.row_max =
        max_of(total.row_max, static_cast<const Acc*>(p.row_max_partial)[split * rows + row]);
    const Acc* partial =
        static_cast<const Acc*>(p.out_partial) + (split * rows + task) * p.head_dim_v;
    for (int64_t c = 0; c < p.head_dim_v; ++c) numerator[c] += partial[c];
  }
  store_unified<Element>(p, batch, at, total);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
