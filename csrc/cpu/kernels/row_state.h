// What a task of attention_fwd.h keeps of each row while keys stream, and what becomes of it.
#pragma once

#include "cpu/kernels/unified.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// The state of a task's rows, KV head by KV head. With a unified maximum, phi in units of log2 is
// the base of P and row_max the largest score; otherwise row_max is the base.
template <class Acc>
struct RowState {
  void take(Arena& arena, int64_t count, int64_t stride) {
    o_row = stride;
    acc_o = arena.take<Acc>(count * o_row);
    row_max = arena.take<Acc>(count);
    row_sum = arena.take<Acc>(count * kWidth<Acc>);
    phi = arena.take<Acc>(count);
    rows = arena.take<Row>(count);
  }

  void skip(int64_t count) {
    acc_o += count * o_row;
    row_max += count;
    row_sum += count * kWidth<Acc>;
    phi += count;
    rows += count;
  }

  FIL_INLINE Acc sum_of(int64_t r) const {
    return reduce_sum<Acc>(load(row_sum + r * kWidth<Acc>));
  }

  int64_t o_row;
  Acc *acc_o, *row_max, *phi;
  Acc* row_sum;  // a vector for each row, whose lanes are summed in the end
  Row* rows;
};

template <class Acc, class Out>
FIL_INLINE void store_row(const Acc* acc_o, Acc row_max, Acc row_sum, int64_t head_dim_v, Out* out,
                          Acc* lse) {
  // row_sum is 0 for a row without keys (or whose every score is -inf), NaN where a score was NaN.
  const bool empty = row_sum == 0;
  const Acc inverse = empty ? Acc(0) : 1 / row_sum;
  for (int64_t c = 0; c < head_dim_v; ++c) {
    out[c] = from_float<Out>(empty ? Acc(0) : acc_o[c] * inverse);
  }
  *lse = empty ? Acc(-__builtin_inf()) : (row_max + Acc(__builtin_log2(row_sum))) * Acc(kLn2);
}

// Row r of one split: a normalised state, or with a unified maximum sums.
template <class Acc>
void store_partial(const AttentionFwdParams& p, int64_t batch, int64_t split, int64_t r,
                   const RowState<Acc>& t) {
  const auto [query, head, visible] = t.rows[r];
  const Acc* acc_o = t.acc_o + r * t.o_row;
  const int64_t out_at =
      ((split * p.batch_size + batch) * p.seqlen_q + query) * p.num_heads_q + head;
  const int64_t rows = p.batch_size * p.num_heads_q * p.seqlen_q;
  const int64_t row_at = split * rows + p.row_index(batch, head, query);
  Acc* out = static_cast<Acc*>(p.out_partial) + out_at * p.head_dim_v;
  Acc* lse = static_cast<Acc*>(p.lse_partial) + row_at;
  if (!p.unified) {
    store_row(acc_o, t.row_max[r], t.sum_of(r), p.head_dim_v, out, lse);
    return;
  }
  for (int64_t c = 0; c < p.head_dim_v; ++c) out[c] = acc_o[c];
  *lse = t.sum_of(r);
  static_cast<Acc*>(p.row_max_partial)[row_at] = t.row_max[r];
}

// Whether the pass is for some of the task's rows.
template <class Acc>
bool wants_rows(const AttentionFwdParams& p, int64_t batch, int64_t rows, const RowState<Acc>& t) {
  bool any = p.only == nullptr;
  for (int64_t r = 0; !any && r < rows; ++r) {
    any = p.only[p.row_index(batch, t.rows[r].head, t.rows[r].query)] == RowVerdict::kViolated;
  }
  return any;
}

// out and lse of one KV head's rows: the final ones, or this split's partial ones.
template <class Element, class Acc = Accumulator<Element>>
void finish_rows(const AttentionFwdParams& p, int64_t batch, int64_t split, int64_t rows,
                 const RowState<Acc>& t) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto [query, head, visible] = t.rows[r];
    const Acc* acc_o = t.acc_o + r * t.o_row;
    const int64_t row_at = p.row_index(batch, head, query);
    if (p.only && p.only[row_at] != RowVerdict::kViolated) continue;
    if (p.kv_splits > 1) {
      store_partial<Acc>(p, batch, split, r, t);
    } else if (p.unified) {
      const UnifiedRow<Acc> row{acc_o, t.row_max[r], t.sum_of(r), t.phi[r]};
      store_unified<Element>(p, batch, t.rows[r], row);
    } else {
      store_row(acc_o, t.row_max[r], t.sum_of(r), p.head_dim_v,
                element_of<Element>(p.out, batch, query, head), static_cast<Acc*>(p.lse) + row_at);
    }
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
