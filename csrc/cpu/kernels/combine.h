// Merges attention states of the same rows over disjoint keys:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
// States are added in order. A state with lse = -inf is empty: its out is not read.
// A task is one row (batch, query, head).
#pragma once

#include "cpu/kernels/score.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class Element>
int64_t combine_tasks(const CombineParams& p) {
  return p.batch_size * p.seqlen_q * p.num_heads_q;
}

template <class Element>
int64_t combine_scratch(const CombineParams& p) {
  return round_up(p.head_dim_v, kWidth<Accumulator<Element>>) *
         int64_t{sizeof(Accumulator<Element>)};
}

template <class Acc, class T>
FIL_INLINE void add_scaled(const T* x, Acc weight, int64_t count, Acc* sum) {
  for (int64_t c = 0; c < count; ++c) sum[c] += weight * Acc(to_float(x[c]));
}

template <class Element>
void combine(const CombineParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  const int64_t head = task % p.num_heads_q;
  const int64_t query = task / p.num_heads_q % p.seqlen_q;
  const int64_t batch = task / p.num_heads_q / p.seqlen_q;
  const int64_t row_index = (batch * p.num_heads_q + head) * p.seqlen_q + query;
  if (p.only && p.only[row_index] != RowVerdict::kViolated) return;
  const Acc minus_inf = Acc(-__builtin_inf());
  const Acc* lse_partial = static_cast<const Acc*>(p.lse_partial) + batch * p.lse_partial_batch +
                           head * p.lse_partial_head + query * p.lse_partial_seqlen;

  Acc largest = minus_inf;
  for (int64_t s = 0; s < p.num_states; ++s) {
    const Acc lse = lse_partial[s * p.lse_partial_state];
    largest = lse > largest || lse != lse ? lse : largest;
  }
  Acc* sum = static_cast<Acc*>(scratch);
  for (int64_t c = 0; c < p.head_dim_v; ++c) sum[c] = 0;
  Acc weights = 0;
  for (int64_t s = 0; s < p.num_states; ++s) {
    const Acc lse = lse_partial[s * p.lse_partial_state];
    if (lse == minus_inf) continue;
    const Acc weight = Acc(__builtin_exp(lse - largest));
    weights += weight;
    const int64_t at = s * p.out_partial_state;
    if (p.partial_in_accumulator) {
      add_scaled(element_of<Acc>(p.out_partial, batch, query, head) + at, weight, p.head_dim_v,
                 sum);
    } else {
      add_scaled(element_of<Element>(p.out_partial, batch, query, head) + at, weight, p.head_dim_v,
                 sum);
    }
  }

  const bool empty = weights == 0;
  Element* out = element_of<Element>(p.out, batch, query, head);
  for (int64_t c = 0; c < p.head_dim_v; ++c) {
    out[c] = from_float<Element>(empty ? Acc(0) : sum[c] / weights);
  }
  static_cast<Acc*>(p.lse)[row_index] = empty ? minus_inf : largest + Acc(__builtin_log(weights));
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
