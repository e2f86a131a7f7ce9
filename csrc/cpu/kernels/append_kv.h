// Writes new keys and values into a cache, the keys rotated (Su et al., arXiv 2104.09864):
//
//   slot = seqlens_kv[batch] + t      (x, y) -> (x cos - y sin, x sin + y cos)
//
// with the cosine and sine of the slot. A task is one token of one sequence.
#pragma once

#include "cpu/kernels/score.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

inline int64_t append_kv_tasks(const AppendKvParams& p) { return p.batch_size * p.seqlen_new; }
inline int64_t append_kv_scratch(const AppendKvParams&) { return 0; }

template <class Element, class Table>
FIL_INLINE void rotate(const RotaryTable& rotary, int64_t position, const Element* in,
                       Element* out) {
  using Acc = Accumulator<Element>;
  const Table* cosines = static_cast<const Table*>(rotary.cos) + position * rotary.cos_row;
  const Table* sines = static_cast<const Table*>(rotary.sin) + position * rotary.sin_row;
  const int64_t half = rotary.dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = rotary.interleaved ? 2 * i : i;
    const int64_t second = rotary.interleaved ? first + 1 : i + half;
    const Acc x = to_float(in[first]), y = to_float(in[second]);
    const Acc cos = to_float(cosines[i]), sin = to_float(sines[i]);
    out[first] = from_float<Element>(x * cos - y * sin);
    out[second] = from_float<Element>(x * sin + y * cos);
  }
}

template <class Element>
void append_kv(const AppendKvParams& p, int64_t task, void*) {
  const int64_t batch = task / p.seqlen_new, t = task % p.seqlen_new;
  const int64_t position = p.seqlens_kv[batch] + t;
  const PageTable::Slot at = p.block_table.at(batch, position);
  for (int64_t head = 0; head < p.num_heads_kv; ++head) {
    const Element* k = element_of<Element>(p.k, batch, t, head);
    Element* k_slot = element_of<Element>(p.k_cache, at.page, at.slot, head);
    int64_t rotated = 0;
    if (p.rotary.cos != nullptr) {
      rotated = p.rotary.dim;
      if (p.rotary.in_accumulator) {
        rotate<Element, Accumulator<Element>>(p.rotary, position, k, k_slot);
      } else {
        rotate<Element, Element>(p.rotary, position, k, k_slot);
      }
    }
    __builtin_memcpy(k_slot + rotated, k + rotated, (p.head_dim - rotated) * sizeof *k);
    __builtin_memcpy(element_of<Element>(p.v_cache, at.page, at.slot, head),
                     element_of<Element>(p.v, batch, t, head), p.head_dim_v * sizeof *k);
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
