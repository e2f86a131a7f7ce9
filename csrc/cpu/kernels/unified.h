// Softmax with a unified maximum (FlashDecoding++, arXiv 2311.01282): exp(score - phi), no base to
// move, sums that add up over splits, and the guard of common/unified.h.
#pragma once

#include "common/unified.h"
#include "cpu/kernels/score.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// A phi that is not finite here would make NaN of a hidden key's -inf, and a row without keys look
// like one to compute again: any number as useless stands in for it.
template <class Acc>
FIL_INLINE Acc phi_log2(const AttentionFwdParams& p, int64_t head) {
  const Acc phi = Acc((p.phi_heads ? double(p.phi_heads[head]) : p.phi) * kLog2e);
  return phi - phi == 0 ? phi : kLargest<Acc>;
}

// A row after its last key.
template <class Acc>
struct UnifiedRow {
  const Acc* numerator;  // [head_dim_v]
  Acc row_max;           // units of log2, as phi
  Acc row_sum;
  Acc phi;
};

template <class Element, class Acc>
FIL_INLINE RowVerdict judge(const UnifiedRow<Acc>& row, int64_t head_dim_v) {
  // NaN scores leave no trace in row_max, but one in the sum.
  if (row.row_sum == 0 && row.row_max == Acc(-__builtin_inf())) return RowVerdict::kNoKey;
  constexpr UnifiedGuard guard = kUnifiedGuard<Element>;
  const Acc above = row.row_max - row.phi;
  if (!(above > Acc(guard.low * kLog2e) && above < Acc(guard.high * kLog2e))) {
    return RowVerdict::kViolated;
  }
  // Quotients are probed too: near the largest number one may round beyond it.
  const Acc inverse = 1 / row.row_sum;
  Acc probe = row.row_sum * Acc(0);  // 0 * x is 0 for finite x and NaN otherwise
  for (int64_t c = 0; c < head_dim_v; ++c) probe += row.numerator[c] * inverse * Acc(0);
  return probe == 0 ? RowVerdict::kGood : RowVerdict::kViolated;
}

// The row's verdict, and out and lse unless it is violated.
template <class Element, class Acc>
FIL_INLINE void store_unified(const AttentionFwdParams& p, int64_t batch, const Row& at,
                              const UnifiedRow<Acc>& row) {
  const int64_t index = p.row_index(batch, at.head, at.query);
  const RowVerdict verdict = judge<Element>(row, p.head_dim_v);
  p.verdict[index] = verdict;
  if (verdict == RowVerdict::kViolated) return;
  const bool empty = verdict == RowVerdict::kNoKey;
  const Acc inverse = empty ? Acc(0) : 1 / row.row_sum;
  Element* out = element_of<Element>(p.out, batch, at.query, at.head);
  for (int64_t c = 0; c < p.head_dim_v; ++c) {
    out[c] = from_float<Element>(empty ? Acc(0) : row.numerator[c] * inverse);
  }
  static_cast<Acc*>(p.lse)[index] =
      empty ? Acc(-__builtin_inf()) : (row.phi + Acc(__builtin_log2(row.row_sum))) * Acc(kLn2);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
