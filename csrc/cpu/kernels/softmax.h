// The online softmax of one row of scores.
#pragma once

#include "cpu/isa/math.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// x[count] <- 2^(x - base); returns the sum.
template <class Acc>
FIL_INLINE Acc exp2_row(Acc* x, int64_t padded, Acc base) {
  Vector<Acc> sum = {};
  for (int64_t c = 0; c < padded; c += kWidth<Acc>) {
    const Vector<Acc> e = exp2<Acc>(load(x + c) - base);
    store(x + c, e);
    sum += e;
  }
  return reduce_sum<Acc>(sum);
}

// One online softmax step of one row: s becomes the unnormalised probabilities. The accumulator is
// rescaled only when the maximum grew by more than 2^8; until then probabilities up to 2^8 are as
// exact, and the factor is exactly 1.
template <class Acc>
FIL_INLINE void softmax_step(Acc* s, int64_t padded, Acc& row_max, Acc& row_sum, Acc* acc_o,
                             int64_t o_row) {
  Vector<Acc> block_max = load(s);
  for (int64_t c = kWidth<Acc>; c < padded; c += kWidth<Acc>)
    block_max = max(block_max, load(s + c));
  const Acc new_max = reduce_max<Acc>(block_max);
  if (new_max > row_max + 8) {
    const Acc factor = exp2<Acc>(broadcast<Acc>(row_max - new_max))[0];
    row_sum *= factor;
    for (int64_t c = 0; c < o_row; c += kWidth<Acc>)
      store<Acc>(acc_o + c, load(acc_o + c) * factor);
    row_max = new_max;
  }
  // No key seen so far: all scores are -inf, and any finite base keeps them at probability 0.
  const Acc base = row_max == Acc(-__builtin_inf()) ? Acc(0) : row_max;
  row_sum += exp2_row(s, padded, base);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
