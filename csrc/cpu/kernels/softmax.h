// One row of scores becomes unnormalised probabilities: a step of the softmax, online or with a
// unified maximum.
#pragma once

#include "cpu/isa/math.h"
#include "cpu/kernels/row_state.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// row_sum = row_sum factor + e.
template <class Acc>
FIL_INLINE void add_to_sum(Vector<Acc> e, Acc factor, int64_t r, const RowState<Acc>& t) {
  Acc* const sum = t.row_sum + r * kWidth<Acc>;
  store<Acc>(sum, load(sum) * factor + e);
}

// The base is raised, and the accumulator rescaled, only when the maximum grew by more than 2^8:
// until then probabilities up to 2^8 are as exact, and the factor is exactly 1.
template <class Acc, class Put>
FIL_INLINE void raise_base(Acc new_max, int64_t r, const RowState<Acc>& t, const Put& put) {
  if (!(new_max > t.row_max[r] + 8)) return;
  put.settle();
  const Acc factor = exp2<Acc>(broadcast<Acc>(t.row_max[r] - new_max))[0];
  add_to_sum<Acc>(Vector<Acc>{}, factor, r, t);
  Acc* acc_o = t.acc_o + r * t.o_row;
  for (int64_t c = 0; c < t.o_row; c += kWidth<Acc>)
    store<Acc>(acc_o + c, load(acc_o + c) * factor);
  t.row_max[r] = new_max;
}

// x[padded] raw scores, of which scale makes units of log2. put.power(x, scale, base) are their
// probabilities, put(c, probabilities) takes them a vector at a time, put.from(c) is a put that
// counts from there, and put.settle() is called before acc_o changes.
template <class Acc, class Put>
FIL_INLINE void softmax_step(const Acc* x, int64_t padded, Acc scale, int64_t r,
                             const RowState<Acc>& t, const Put& put) {
  Vector<Acc> block_max = load(x);
  for (int64_t c = kWidth<Acc>; c < padded; c += kWidth<Acc>)
    block_max = max(block_max, load(x + c));
  if (any_above(block_max * scale, t.row_max[r] + 8)) {
    raise_base(reduce_max<Acc>(block_max) * scale, r, t, put);
  }
  // No key seen so far: all scores are -inf, and any finite base keeps them at probability 0.
  const Acc base = t.row_max[r] == Acc(-__builtin_inf()) ? Acc(0) : t.row_max[r];
  Vector<Acc> sum = {};
  for (int64_t c = 0; c < padded; c += kWidth<Acc>) {
    const Vector<Acc> e = put.power(load(x + c), scale, base);
    put(c, e);
    sum += e;
  }
  add_to_sum<Acc>(sum, 1, r, t);
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
    const Vector<Acc> e = put.power(at, scale, phi);
    put(c, e);
    sum += e;
  }
  t.row_max[r] = max_of(t.row_max[r], reduce_max<Acc>(block_max) * scale);
  add_to_sum<Acc>(sum, 1, r, t);
}

template <class Acc, class Put>
FIL_INLINE void step(const AttentionFwdParams& p, const Acc* x, int64_t padded, Acc scale,
                     int64_t r, const RowState<Acc>& t, const Put& put) {
  if (p.unified) {
    unified_step(x, padded, scale, r, t, put);
  } else {
    softmax_step(x, padded, scale, r, t, put);
  }
}

// Where the probabilities of a row go whose accumulator holds all that came before.
template <class Element>
struct InPlace {
  using Acc = Accumulator<Element>;
  Acc* s;
  FIL_INLINE void operator()(int64_t c, Vector<Acc> e) const { store<Acc>(s + c, e); }
  static FIL_INLINE Vector<Acc> power(Vector<Acc> x, Acc scale, Acc base) {
    // Not fused: exactly 0 for the largest score, however large.
    const Vector<Acc> exponent = x * scale - base;
    if constexpr (sizeof(Element) == 2) return exp2_short(exponent);
    return exp2<Acc>(exponent);
  }
  FIL_INLINE InPlace from(int64_t c) const { return {s + c}; }
  FIL_INLINE void settle() const {}
};

// Of x[count], a whole number of vectors, [begin, end) stays, which begins in the first vector and
// ends in the last; the others become -inf.
template <class Acc>
FIL_INLINE void hide_ends(Acc* x, int64_t count, int64_t begin, int64_t end) {
  constexpr int width = kWidth<Acc>;
  const Vector<Acc> hidden = broadcast<Acc>(Acc(-__builtin_inf()));
  Vector<Acc> lane;
  for (int i = 0; i < width; ++i) lane[i] = Acc(i);
  if (begin > 0) store<Acc>(x, lane < Acc(begin) ? hidden : load(x));
  if (end == count) return;
  x += count - width;
  store<Acc>(x, lane < Acc(end - (count - width)) ? load(x) : hidden);
}

// Raw products s of row r with the keys of a block -> probabilities, up to a whole vector. Returns
// whether a key of the block is hidden from the row. `bias` as in finish_scores.
template <class Acc, class Put>
FIL_INLINE bool row_probabilities(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                                  int64_t r, const RowState<Acc>& t, Acc* s, Acc* bias,
                                  bool bias_is_loaded, const Put& put) {
  const KeyRange visible = t.rows[r].visible;
  const int64_t padded = round_up(keys.count, kWidth<Acc>);
  const bool side_by_side = keys.apart == 1;
  const int64_t begin = side_by_side ? max_of<int64_t>(visible.begin - keys.first, 0) : 0;
  const int64_t end = side_by_side ? min_of(visible.end - keys.first, keys.count) : keys.count;
  const Acc scale = Acc(p.softmax_scale * kLog2e);
  // Most rows see some keys of a block side by side and change their scores by the scale alone,
  // which needs no pass of its own. A scale that turned their order, or made them 0, would.
  const bool plain = p.softcap == 0 && p.alibi.slopes == nullptr &&
                     p.mask.type == MaskType::kNone && scale > 0 &&
                     (side_by_side ? begin < end : keys.within(visible));
  if (!plain) {
    const bool hides =
        finish_scores<Acc>(p, batch, t.rows[r], keys, s, bias, bias_is_loaded, nullptr);
    step<Acc>(p, s, padded, 1, r, t, put);
    return hides;
  }
  const int64_t first = begin / kWidth<Acc> * kWidth<Acc>, last = round_up(end, kWidth<Acc>);
  for (int64_t c = 0; c < first; c += kWidth<Acc>) put(c, Vector<Acc>{});
  for (int64_t c = last; c < padded; c += kWidth<Acc>) put(c, Vector<Acc>{});
  hide_ends(s + first, last - first, begin - first, end - first);
  step<Acc>(p, s + first, last - first, scale, r, t, put.from(first));
  return begin > 0 || end < keys.count;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
