// One row of scores becomes unnormalised probabilities: a step of the softmax, online or with a
// unified maximum.
#pragma once

#include "cpu/isa/math.h"
#include "cpu/kernels/row_state.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// The base is raised, and the accumulator rescaled, only when the maximum grew by more than 2^8:
// until then probabilities up to 2^8 are as exact, and the factor is exactly 1.
template <class Acc, class Put>
FIL_INLINE void raise_base(Acc new_max, int64_t r, const RowState<Acc>& t, const Put& put) {
  if (!(new_max > t.row_max[r] + 8)) return;
  put.settle();
  const Acc factor = exp2<Acc>(broadcast<Acc>(t.row_max[r] - new_max))[0];
  t.row_sum[r] *= factor;
  Acc* acc_o = t.acc_o + r * t.o_row;
  for (int64_t c = 0; c < t.o_row; c += kWidth<Acc>)
    store<Acc>(acc_o + c, load(acc_o + c) * factor);
  t.row_max[r] = new_max;
}

// x[padded] raw scores, of which scale makes units of log2. put(c, probabilities) takes them a
// vector at a time, in order; put.settle() is called before acc_o changes.
template <class Acc, class Put>
FIL_INLINE void softmax_step(const Acc* x, int64_t padded, Acc scale, int64_t r,
                             const RowState<Acc>& t, const Put& put) {
  Vector<Acc> block_max = load(x);
  for (int64_t c = kWidth<Acc>; c < padded; c += kWidth<Acc>)
    block_max = max(block_max, load(x + c));
  raise_base(reduce_max<Acc>(block_max) * scale, r, t, put);
  // No key seen so far: all scores are -inf, and any finite base keeps them at probability 0.
  const Acc base = t.row_max[r] == Acc(-__builtin_inf()) ? Acc(0) : t.row_max[r];
  Vector<Acc> sum = {};
  for (int64_t c = 0; c < padded; c += kWidth<Acc>) {
    const Vector<Acc> e = exp2<Acc>(load(x + c) * scale - base);
    put(c, e);
    sum += e;
  }
  t.row_sum[r] += reduce_sum<Acc>(sum);
}

// The same on a phi that never moves. A score so high that the exponential has no value gives an
// arbitrary one: row_max will tell.
template <class Acc, class Put>
FIL_INLINE void unified_step(const Acc* x, int64_t padded, Acc scale, int64_t r,
                             const RowState<Acc>& t, const Put& put) {
  const Acc phi = t.phi[r];
  Vector<Acc> block_max = load(x);
  Vector<Acc> sum = {};
  for (int64_t c = 0; c < padded; c += kWidth<Acc>) {
    const Vector<Acc> at = load(x + c);
    block_max = max(block_max, at);
    const Vector<Acc> e = exp2<Acc>(at * scale - phi);
    put(c, e);
    sum += e;
  }
  t.row_max[r] = max_of(t.row_max[r], reduce_max<Acc>(block_max) * scale);
  t.row_sum[r] += reduce_sum<Acc>(sum);
}

// Where the probabilities of a row go whose accumulator holds all that came before.
template <class Acc>
struct InPlace {
  Acc* s;
  FIL_INLINE void operator()(int64_t c, Vector<Acc> e) const { store<Acc>(s + c, e); }
  FIL_INLINE void settle() const {}
};

// Raw products s of row r with the keys of a block -> probabilities, up to a whole vector. Returns
// whether a key of the block is hidden from the row. `bias` as in finish_scores.
template <class Acc, class Put>
FIL_INLINE bool row_probabilities(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                                  int64_t r, const RowState<Acc>& t, Acc* s, Acc* bias,
                                  bool bias_is_loaded, const Put& put) {
  const KeyRange visible = t.rows[r].visible;
  const int64_t padded = round_up(keys.count, kWidth<Acc>);
  // Most rows see some keys of a block side by side and change their scores by the scale alone,
  // which needs no pass of its own. A scale that turned their order would.
  const bool sees_some = visible.begin < keys.first + keys.count && visible.end > keys.first;
  const bool plain = p.softcap == 0 && p.alibi.slopes == nullptr &&
                     p.mask.type == MaskType::kNone && p.softmax_scale > 0 &&
                     (keys.apart == 1 ? sees_some : keys.within(visible));
  bool hides;
  Acc scale = 1;
  if (plain) {
    const bool whole = keys.apart != 1;
    const int64_t begin = whole ? 0 : max_of<int64_t>(visible.begin - keys.first, 0);
    const int64_t end = whole ? keys.count : min_of(visible.end - keys.first, keys.count);
    for (int64_t c = 0; c < begin; ++c) s[c] = Acc(-__builtin_inf());
    for (int64_t c = end; c < padded; ++c) s[c] = Acc(-__builtin_inf());
    hides = begin > 0 || end < keys.count;
    scale = Acc(p.softmax_scale * kLog2e);
  } else {
    hides = finish_scores<Acc>(p, batch, t.rows[r], keys, s, bias, bias_is_loaded, nullptr);
  }
  if (p.unified) {
    unified_step(s, padded, scale, r, t, put);
  } else {
    softmax_step(s, padded, scale, r, t, put);
  }
  return hides;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
