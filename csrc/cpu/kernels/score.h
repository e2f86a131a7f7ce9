// Every feature that changes a score acts here, at run time, on one row of an fp32 score tile.
#pragma once

#include "cpu/isa/math.h"
#include "cpu/isa/tile_gemm.h"
#include "cpu/kernels/arena.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr double kLog2e = 1.44269504088896340735992;
constexpr double kLn2 = 0.693147180559945309417232;

// One row of a tile: a query of one head, and the keys its sequence, causal and window leave it.
struct Row {
  int64_t query;
  int64_t head;
  KeyRange visible;
};

// Keys of the tile at hand, in steps of kStepRows: side by side, or one of each of as many streams.
struct KeyBlock {
  int64_t first;
  int64_t count;
  int64_t apart = 1;         // keys from one stream to the next; 1: they lie side by side
  int64_t step = kStepRows;  // keys from one step to the next

  FIL_INLINE int64_t at(int64_t c) const {
    return first + c % kStepRows * apart + c / kStepRows * step;
  }
  FIL_INLINE bool within(const KeyRange& range) const {
    return range.begin <= first && at(count - 1) < range.end;
  }
};

FIL_INLINE void describe_rows(const AttentionParams& p, const Visibility& visibility,
                              int64_t head_kv, int64_t first_row, int64_t count, Row* rows) {
  const int64_t group = p.group_size();
  for (int64_t r = 0; r < count; ++r) {
    rows[r].query = (first_row + r) / group;
    rows[r].head = head_kv * group + (first_row + r) % group;
    rows[r].visible = visibility.row(rows[r].query);
  }
}

template <class T>
FIL_INLINE const T* element_of(const Strided<const void*>& x, int64_t batch, int64_t seq,
                               int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + seq * x.seqlen + head * x.head;
}
template <class T>
FIL_INLINE T* element_of(const Strided<void*>& x, int64_t batch, int64_t seq, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + seq * x.seqlen + head * x.head;
}

// Of a slot in x, which is k or v.
FIL_INLINE int64_t slot_offset(const AttentionParams& p, const Strided<const void*>& x,
                               int64_t batch, int64_t key) {
  const PageTable::Slot at = p.block_table.at(batch, key);
  return at.page * x.batch + at.slot * x.seqlen;
}
template <class T>
FIL_INLINE const T* slot_of(const AttentionParams& p, const Strided<const void*>& x, int64_t batch,
                            int64_t key, int64_t head) {
  return static_cast<const T*>(x.data) + slot_offset(p, x, batch, key) + head * x.head;
}

// The rows of a block's keys in x, which is k or v. A paged cache needs room for their offsets.
template <class T>
FIL_INLINE Rows<T> rows_of(const AttentionParams& p, const Strided<const void*>& x, int64_t batch,
                           const KeyBlock& keys, int64_t head, int64_t* offset) {
  if (p.block_table.pages == nullptr) {
    return {element_of<T>(x, batch, keys.first, head), x.seqlen};
  }
  for (int64_t c = 0; c < keys.count; ++c) offset[c] = slot_offset(p, x, batch, keys.first + c);
  return {static_cast<const T*>(x.data) + head * x.head, x.seqlen, offset};
}

FIL_INLINE int64_t mask_offset(const MaskView& m, int64_t batch, const Row& row, int64_t key) {
  return batch * m.batch + row.head * m.head + row.query * m.row + key * m.col;
}

template <class Acc>
constexpr Acc kLargest = sizeof(Acc) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;

// Finite stays finite in log2 units: finfo.min means "very unlikely", only -inf means hidden.
template <class Acc>
FIL_INLINE Acc bias_log2(double x) {
  constexpr double largest = kLargest<Acc>;
  const double scaled = x * kLog2e;
  if (x == __builtin_inf() || x == -__builtin_inf()) return Acc(x);
  return Acc(scaled < -largest ? -largest : scaled > largest ? largest : scaled);
}

template <class Acc, class M>
FIL_INLINE void load_bias(const M* p, int64_t stride, int64_t count, Acc* bias, int64_t every) {
  for (int64_t c = 0; c < count; ++c) bias[c * every] = bias_log2<Acc>(to_float(p[c * stride]));
}

// bias[count] <- the mask as an addend in log2 units, -inf where it hides the key. The elements lie
// `stride` apart in the mask and `every` in bias.
template <class Acc>
FIL_INLINE void load_mask(const MaskView& m, int64_t offset, int64_t stride, int64_t count,
                          Acc* bias, int64_t every) {
  switch (m.type) {
    case MaskType::kNone:
      return;
    case MaskType::kBool: {
      const uint8_t* p = static_cast<const uint8_t*>(m.data) + offset;
      for (int64_t c = 0; c < count; ++c) {
        bias[c * every] = p[c * stride] ? Acc(0) : Acc(-__builtin_inf());
      }
      return;
    }
    case MaskType::kFloat64:
      return load_bias(static_cast<const double*>(m.data) + offset, stride, count, bias, every);
    case MaskType::kFloat32:
      return load_bias(static_cast<const float*>(m.data) + offset, stride, count, bias, every);
    case MaskType::kBFloat16:
      return load_bias(static_cast<const BFloat16*>(m.data) + offset, stride, count, bias, every);
    case MaskType::kFloat16:
      return load_bias(static_cast<const Float16*>(m.data) + offset, stride, count, bias, every);
  }
}

// One row of the mask for the keys of a block.
template <class Acc>
FIL_INLINE void load_mask_row(const MaskView& m, int64_t batch, const Row& row,
                              const KeyBlock& keys, Acc* bias) {
  if (keys.apart == 1) {
    load_mask(m, mask_offset(m, batch, row, keys.first), m.col, keys.count, bias, 1);
    return;
  }
  for (int64_t stream = 0; stream < kStepRows; ++stream) {
    load_mask(m, mask_offset(m, batch, row, keys.at(stream)), m.col * keys.step,
              keys.count / kStepRows, bias + stream, kStepRows);
  }
}

// s[padded] -= slope |position - key|, in units of log2.
template <class Acc>
FIL_INLINE void add_alibi(Acc slope_log2, int64_t position, const KeyBlock& keys, int64_t padded,
                          Acc* s) {
  constexpr int width = kWidth<Acc>;
  if (keys.apart > 1) {
    for (int64_t c = 0; c < keys.count; ++c) {
      const int64_t ahead = position - keys.at(c);
      s[c] -= slope_log2 * Acc(ahead < 0 ? -ahead : ahead);
    }
    return;
  }
  Vector<Acc> lanes;
  for (int i = 0; i < width; ++i) lanes[i] = Acc(i);
  for (int64_t c = 0; c < padded; c += width) {
    // Of integers: what is near is exact, and what is far is rounded once or twice.
    const Vector<Acc> ahead = Acc(position - keys.first - c) - lanes;
    store<Acc>(s + c, load(s + c) - slope_log2 * max(ahead, -ahead));
  }
}

// Turns raw products q.k of one row into scores in log2 units, -inf where the key is hidden and
// behind the last key up to a whole vector. `bias` holds the row of the mask and is refilled unless
// `bias_is_loaded`. `softcap_slope`, if not null, receives d(capped score) / d(scaled product).
// Returns whether a key of the block is hidden from this row.
template <class Acc>
FIL_INLINE bool finish_scores(const AttentionParams& p, int64_t batch, const Row& row,
                              const KeyBlock& keys, Acc* s, Acc* bias, bool bias_is_loaded,
                              Acc* softcap_slope) {
  constexpr int width = kWidth<Acc>;
  const Acc minus_inf = Acc(-__builtin_inf());
  const int64_t padded = round_up(keys.count, width);
  bool hides = false;

  if (p.softcap > 0) {
    const Acc inner = Acc(p.softmax_scale / p.softcap), outer = Acc(p.softcap * kLog2e);
    for (int64_t c = 0; c < padded; c += width) {
      Vector<Acc> slope;
      store<Acc>(s + c, tanh<Acc>(load(s + c) * inner, slope) * outer);
      if (softcap_slope) store<Acc>(softcap_slope + c, slope);
    }
  } else {
    const Acc scale_log2 = Acc(p.softmax_scale * kLog2e);
    for (int64_t c = 0; c < padded; c += width) store<Acc>(s + c, load(s + c) * scale_log2);
  }

  if (p.alibi.slopes != nullptr) {
    const float slope = p.alibi.slopes[batch * p.alibi.batch + row.head * p.alibi.head];
    const int64_t position = row.query + p.visibility(batch).diagonal;
    add_alibi(Acc(slope * kLog2e), position, keys, padded, s);
  }

  if (p.mask.type != MaskType::kNone) {
    if (!bias_is_loaded) {
      load_mask_row(p.mask, batch, row, keys, bias);
      for (int64_t c = keys.count; c < padded; ++c) bias[c] = minus_inf;
    }
    // Selected, not added: a hidden key's score may be NaN.
    for (int64_t c = 0; c < padded; c += width) {
      const Vector<Acc> b = load(bias + c);
      store<Acc>(s + c, b == minus_inf ? b : load(s + c) + b);
    }
    for (int64_t c = 0; c < keys.count; ++c) hides |= bias[c] == minus_inf;
  }

  for (int64_t c = keys.count; c < padded; ++c) s[c] = minus_inf;
  if (keys.within(row.visible)) return hides;
  for (int64_t c = 0; c < keys.count; ++c) {
    const int64_t key = keys.at(c);
    if (key < row.visible.begin || key >= row.visible.end) s[c] = minus_inf;
  }
  return true;
}

// Whether the row sees the key: the slow, exact question behind finish_scores.
FIL_INLINE bool sees(const AttentionParams& p, int64_t batch, const Row& row, int64_t key) {
  if (key < row.visible.begin || key >= row.visible.end) return false;
  if (p.mask.type == MaskType::kNone) return true;
  double bias = 0;
  load_mask(p.mask, mask_offset(p.mask, batch, row, key), 1, 1, &bias, 1);
  return bias != -__builtin_inf();
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
