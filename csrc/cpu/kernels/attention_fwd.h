// FlashAttention-2 forward and Flash-Decoding on one core (Dao, arXiv 2307.08691; Dao et al.,
// "Flash-Decoding", 2023).
//
//   out = softmax(scale q k^T + masks) v        lse = log sum exp of the row's scores
//
// A task is (row block, split, batch, KV heads). Its rows are the queries of all the heads that
// share a KV head, so each key is read once per group; its keys are the row block's visible range
// within the split. Keys stream in blocks:
//
//   S = q k^T -> finish_scores (scale, softcap, ALiBi, mask, range) -> softmax -> acc_o += P v
//
// Many rows: K is packed transposed and V in panels, one block each, and tile_gemm multiplies.
// Few rows (decode): tile_dot and tile_gemm_direct read K and V in place, once, in steps of
// kStepRows keys. The task's range is as many streams, and a step takes one key from each: the
// hardware's prefetchers follow them side by side, where one alone leaves half of the memory's
// speed. Heads that lie side by side take each step in turn.
//
// Blocks are counted from the first visible slot of the sequence, streams from the first of the
// range, so that left padding does not move a row's block boundaries and with them its rounding.
#pragma once

#include "cpu/isa/tile_gemm.h"
#include "cpu/kernels/row_state.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/softmax.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class Scratch>
CpuForwardPlan forward_plan(const AttentionParams& p) {
  return cpu_forward_plan(
      p.cpu_problem(sizeof(typename Scratch::Element), Scratch::least_tile_rows));
}

// Of a level that multiplies on vectors. Another scratch that is to serve attention_fwd<> has what
// is used of this one there, and overloads load_query and attend.
template <class E>
struct ForwardScratch : RowState<Accumulator<E>> {
  using Element = E;
  using Acc = Accumulator<Element>;
  static constexpr int64_t least_tile_rows = 0;  // more: on a matrix unit, in blocks side by side
  static constexpr int64_t first_keys = kPanel<Acc>;  // a first block leaves out multiples of it

  ForwardScratch(const AttentionFwdParams& p, void* base) : arena(base) {
    plan = forward_plan<ForwardScratch>(p);
    const auto [block_m, block_n] = plan.tile;
    q_row = round_up(p.head_dim, kWidth<Acc>);
    s_row = round_up(block_n, kPanel<Acc>);
    const int64_t o_row = round_up(p.head_dim_v, kPanel<Acc>);
    const int64_t all_rows = p.heads_per_task * block_m;
    q = arena.take<Acc>(all_rows * q_row);
    this->take(arena, all_rows, o_row);
    s = arena.take<Acc>((plan.pack ? 1 : p.heads_per_task) * block_m * s_row);
    bias = arena.take<Acc>(s_row);
    if (plan.pack) {
      k_panels = arena.take<Acc>(p.head_dim * s_row);
      v_panels = arena.take<Acc>(block_n * o_row);
      staging = arena.take<Acc>(kPanel<Acc> * q_row);
      offset = arena.take<int64_t>(p.block_table.pages ? block_n : 0);
    }
  }

  // The same scratch with the row state of the task's KV head number `i`.
  ForwardScratch head(int64_t i) const {
    ForwardScratch t = *this;
    const int64_t first = i * plan.tile.block_m;
    t.skip(first);
    t.q += first * q_row;
    if (!plan.pack) t.s += first * s_row;
    return t;
  }

  Arena arena;
  CpuForwardPlan plan;
  int64_t q_row, s_row;  // strides
  Acc *q, *s, *bias;
  Acc *k_panels = nullptr, *v_panels = nullptr, *staging = nullptr;
  int64_t* offset = nullptr;  // of a block's keys in a paged cache
};

template <class Acc, class T>
bool has_non_finite(int64_t rows, int64_t cols, Rows<T> x) {
  Vector<Acc> probe = {};  // 0 * x is 0 for finite x and NaN otherwise
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kWidth<Acc>) {
      const T* p = x[r] + c;
      const Vector<Acc> v =
          cols - c >= kWidth<Acc> ? load_as<Acc>(p) : load_part_as<Acc>(p, cols - c);
      probe += v * Acc(0);
    }
  }
  const Acc sum = reduce_sum<Acc>(probe);
  return sum != sum;
}

// acc_o += P v, leaving out what a row does not see, where 0 * NaN would be NaN. Sums as the
// products do, in steps of `step` keys: the bits are those of a v with zeros there.
template <class Element, class Acc = Accumulator<Element>>
void accumulate_visible(const AttentionParams& p, int64_t batch, int64_t head_kv,
                        const KeyBlock& keys, int64_t step, int64_t rows,
                        const ForwardScratch<Element>& t) {
  constexpr int width = kWidth<Acc>;
  const Acc* const s = t.s;
  for (int64_t r = 0; r < rows; ++r) {
    Acc* const acc_o = t.acc_o + r * t.o_row;
    for (int64_t first = 0; first < keys.count; first += step) {
      const int64_t last = min_of(first + step, keys.count);
      for (int64_t c = 0; c < p.head_dim_v; c += width) {
        Vector<Acc> sum = {};
        for (int64_t key = first; key < last; ++key) {
          if (!sees(p, batch, t.rows[r], keys.at(key))) continue;
          const Element* at = slot_of<Element>(p, p.v, batch, keys.at(key), head_kv) + c;
          const Vector<Acc> x = p.head_dim_v - c >= width ? load_as<Acc>(at)
                                                          : load_part_as<Acc>(at, p.head_dim_v - c);
          sum = fma(broadcast<Acc>(s[r * t.s_row + key]), x, sum);
        }
        store<Acc>(acc_o + c, load(acc_o + c) + sum);
      }
    }
  }
}

// Columns of a block that one of kTileRows rows from `row` on sees; queries ascend with the rows.
FIL_INLINE Part visible_part(const Row* rows, int64_t row, int64_t count, const KeyBlock& keys) {
  const Row &first = rows[row], &last = rows[min_of<int64_t>(row + kTileRows, count) - 1];
  const int64_t begin = min_of(max_of<int64_t>(first.visible.begin - keys.first, 0), keys.count);
  return {begin, max_of(min_of(last.visible.end - keys.first, keys.count), begin)};
}

// The scores of a block, of the keys in part_of(row), become probabilities. Returns whether a row
// does not see every one of them.
template <class Scratch, class PartOf>
bool softmax_block(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys, int64_t rows,
                   const Scratch& t, const PartOf& part_of) {
  using Acc = typename Scratch::Acc;
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  bool hides = false;
  Part loaded{-1, -1};  // of the mask
  for (int64_t r = 0; r < rows; ++r) {
    const Part part = part_of(r);
    const int64_t skipped = part.begin / kWidth<Acc> * kWidth<Acc>;  // whole vectors
    if (part.begin == part.end) continue;
    KeyBlock seen = keys;
    seen.first += skipped;  // a part of a block whose keys lie side by side, or all of it
    seen.count = part.end - skipped;
    const bool bias_is_loaded =
        mask_is_shared && loaded.begin == part.begin && loaded.end == part.end;
    loaded = part;
    Acc* s = t.s + r * t.s_row + skipped;
    hides |= row_probabilities<Acc>(p, batch, seen, r, t, s, t.bias, bias_is_loaded,
                                    InPlace<typename Scratch::Element>{s});
  }
  return hides;
}

// One block of keys of many rows. The corner of it that causal or window hide is left out.
template <class Element, class Acc = Accumulator<Element>>
void attend_packed(const AttentionFwdParams& p, int64_t batch, int64_t head_kv,
                   const KeyBlock& keys, int64_t rows, const ForwardScratch<Element>& t) {
  const auto visible = [&](int64_t row) __attribute__((always_inline)) {
    return visible_part(t.rows, row / kTileRows * kTileRows, rows, keys);
  };
  pack_transposed(keys.count, p.head_dim, rows_of<Element>(p, p.k, batch, keys, head_kv, t.offset),
                  t.k_panels, t.staging);
  tile_gemm_parts(rows, keys.count, t.q, t.q_row, 1, packed(t.k_panels, p.head_dim), t.s, t.s_row,
                  false, visible, Whole{p.head_dim});
  const bool hides = softmax_block(p, batch, keys, rows, t, visible);
  const Rows<Element> v = rows_of<Element>(p, p.v, batch, keys, head_kv, t.offset);
  if (hides && has_non_finite<Acc>(keys.count, p.head_dim_v, v)) {
    accumulate_visible(p, batch, head_kv, keys, keys.count, rows, t);
    return;
  }
  pack_rows(keys.count, p.head_dim_v, v, t.v_panels);
  tile_gemm_parts(rows, p.head_dim_v, t.s, t.s_row, 1, packed(t.v_panels, keys.count), t.acc_o,
                  t.o_row, true, Whole{p.head_dim_v}, visible);
}

// run(first, count, offset, head) for the steps of a block and, in each, for all heads: a step's
// keys have rows `offset` behind the head's first in x, which is k or v.
template <class Run>
FIL_INLINE void for_steps(const AttentionParams& p, const Strided<const void*>& x, int64_t batch,
                          const KeyBlock& keys, int64_t heads, const Run& run) {
  const PageTable& table = p.block_table;
  int64_t offset[kStepRows] = {}, slot[kStepRows] = {};
  for (int64_t c = 0; c < keys.count; c += kStepRows) {
    const int64_t count = min_of(keys.count - c, kStepRows);
    if (table.pages == nullptr) {
      const int64_t first = slot_offset(p, x, batch, keys.at(c)), apart = keys.apart * x.seqlen;
      for (int64_t j = 0; j < kStepRows; ++j) offset[j] = first + j * apart;
    } else {
      for (int64_t j = 0; j < count; ++j) {
        slot[j] += keys.step;
        offset[j] += keys.step * x.seqlen;
        if (c > 0 && slot[j] < table.page_size) continue;  // still on the stream's page
        const PageTable::Slot at = table.at(batch, keys.at(c + j));
        slot[j] = at.slot;
        offset[j] = at.page * x.batch + at.slot * x.seqlen;
      }
    }
    for (int64_t h = 0; h < heads; ++h) run(c, count, offset, h);
  }
}

// Whether V of a block has NaN or inf.
template <class Element, class Acc = Accumulator<Element>>
bool is_poisoned(const AttentionFwdParams& p, int64_t batch, int64_t head_kv,
                 const KeyBlock& keys) {
  for (int64_t c = 0; c < keys.count; ++c) {
    const Element* v = slot_of<Element>(p, p.v, batch, keys.at(c), head_kv);
    if (has_non_finite<Acc>(1, p.head_dim_v, Rows<Element>{v, 0})) return true;
  }
  return false;
}

// One block of keys of few rows, for all KV heads of the task.
template <class Element, class Acc = Accumulator<Element>>
void attend_in_place(const AttentionFwdParams& p, int64_t batch, int64_t first_head, int64_t heads,
                     const KeyBlock& keys, int64_t rows, const ForwardScratch<Element>& all) {
  const Element* const k = element_of<Element>(p.k, 0, 0, first_head);
  const Element* const v = element_of<Element>(p.v, 0, 0, first_head);
  for_steps(p, p.k, batch, keys, heads,
            [&](int64_t c, int64_t count, const int64_t* offset, int64_t h)
                __attribute__((always_inline)) {
                  const ForwardScratch<Element> t = all.head(h);
                  tile_dot(rows, count, p.head_dim, t.q, t.q_row, k + h * p.k.head, offset, t.s + c,
                           t.s_row);
                });
  bool hides = false;
  for (int64_t h = 0; h < heads; ++h) {
    hides |= softmax_block(p, batch, keys, rows, all.head(h), Whole{keys.count});
  }
  uint64_t done = 0;  // a bit for each head
  for (int64_t h = 0; hides && h < heads; ++h) {
    if (!is_poisoned<Element>(p, batch, first_head + h, keys)) continue;
    accumulate_visible(p, batch, first_head + h, keys, kStepRows, rows, all.head(h));
    done |= uint64_t{1} << h;
  }
  for_steps(p, p.v, batch, keys, heads,
            [&](int64_t c, int64_t count, const int64_t* offset, int64_t h)
                __attribute__((always_inline)) {
                  if (done >> h & 1) return;
                  const ForwardScratch<Element> t = all.head(h);
                  tile_gemm_direct(rows, p.head_dim_v, count, t.s + c, t.s_row, v + h * p.v.head,
                                   offset, t.acc_o, t.o_row);
                });
}

// One block of keys for all KV heads of the task.
template <class Element>
FIL_INLINE void attend(const AttentionFwdParams& p, int64_t batch, int64_t first_head,
                       int64_t heads, const KeyBlock& keys, int64_t rows,
                       const ForwardScratch<Element>& t) {
  if (t.plan.pack) return attend_packed(p, batch, first_head, keys, rows, t);
  attend_in_place(p, batch, first_head, heads, keys, rows, t);
}

template <class Element>
FIL_INLINE void load_query(const Element* q, int64_t head_dim, int64_t r,
                           const ForwardScratch<Element>& t) {
  using Acc = Accumulator<Element>;
  for (int64_t c = 0; c < t.q_row; ++c) {
    t.q[r * t.q_row + c] = c < head_dim ? Acc(to_float(q[c])) : Acc(0);
  }
}

// The row state of one KV head before the first key.
template <class Scratch>
void start_rows(const AttentionFwdParams& p, int64_t batch, int64_t rows, const Scratch& t) {
  using Acc = typename Scratch::Acc;
  for (int64_t r = 0; r < rows; ++r) {
    const auto [query, head, visible] = t.rows[r];
    load_query(element_of<typename Scratch::Element>(p.q, batch, query, head), p.head_dim, r, t);
    t.row_max[r] = Acc(-__builtin_inf());
    store<Acc>(t.row_sum + r * kWidth<Acc>, Vector<Acc>{});
    t.phi[r] = phi_log2<Acc>(p, t.rows[r].head);
    for (int64_t c = 0; c < t.o_row; ++c) t.acc_o[r * t.o_row + c] = 0;
  }
}

// attend(keys) for the blocks of a task's range.
template <class Scratch, class Attend>
FIL_INLINE void for_blocks(const CpuForwardPlan& plan, const Visibility& visibility,
                           const KeyRange& range, const Attend& attend) {
  if (range.empty()) return;  // no block is read for rows without keys
  const int64_t block_n = plan.tile.block_n;
  int64_t key = range.begin, block_end = key + block_n;
  if (plan.pack || Scratch::least_tile_rows > 0) {
    // Blocks begin where they do for other rows, and so do the sums of a row; but what no row of
    // these sees of the first one, in whole panels, would add zeros.
    const int64_t ahead = (range.begin - visibility.kv_begin) % block_n;
    block_end -= ahead;
    key -= ahead % Scratch::first_keys;
  } else {
    const int64_t length = (range.end - range.begin) / kStepRows, steps = block_n / kStepRows;
    for (int64_t i = 0; length >= steps && i < length; i += steps) {
      attend(KeyBlock{range.begin + i, min_of(steps, length - i) * kStepRows, length, 1});
      key = range.begin + length * kStepRows;
      block_end = key + block_n;
    }
  }
  for (; key < range.end; key = block_end, block_end += block_n) {
    attend(KeyBlock{key, min_of(block_end, range.end) - key});
  }
}

template <class Scratch>
int64_t attention_fwd_tasks(const AttentionFwdParams& p) {
  const CpuForwardPlan plan = forward_plan<Scratch>(p);
  return p.kv_splits * p.batch_size * ceil_div(p.rows_per_kv_head(), plan.tile.block_m) *
         ceil_div(p.num_heads_kv, p.heads_per_task);
}

template <class Scratch>
int64_t attention_fwd_scratch(const AttentionFwdParams& p) {
  return Scratch(p, nullptr).arena.used();
}

template <class Scratch>
void attention_fwd(const AttentionFwdParams& p, int64_t task, void* scratch) {
  using Element = typename Scratch::Element;
  const Scratch t(p, scratch);
  const auto [block_m, block_n] = t.plan.tile;
  const int64_t m_blocks = ceil_div(p.rows_per_kv_head(), block_m);
  const int64_t head_groups = ceil_div(p.num_heads_kv, p.heads_per_task);

  // The last row blocks see the most keys when causal: they go first.
  const int64_t first_head = task % head_groups * p.heads_per_task;
  const int64_t batch = task / head_groups % p.batch_size;
  const int64_t split = task / head_groups / p.batch_size % p.kv_splits;
  const int64_t m_block = m_blocks - 1 - task / head_groups / p.batch_size / p.kv_splits;
  const int64_t first_row = m_block * block_m;
  const int64_t rows = min_of(block_m, p.rows_per_kv_head() - first_row);
  const int64_t heads = min_of(p.heads_per_task, p.num_heads_kv - first_head);

  const Visibility visibility = p.visibility(batch);
  bool wanted = false;
  for (int64_t h = 0; h < heads; ++h) {
    describe_rows(p, visibility, first_head + h, first_row, rows, t.head(h).rows);
    wanted |= wants_rows<typename Scratch::Acc>(p, batch, rows, t.head(h));
    start_rows(p, batch, rows, t.head(h));
  }
  if (!wanted) return;

  KeyRange range = visibility.rows(t.rows[0].query, t.rows[rows - 1].query);
  if (p.kv_splits > 1) {
    const int64_t split_begin = visibility.kv_begin + split * p.keys_per_split;
    range.begin = max_of(range.begin, split_begin);
    range.end = min_of(range.end, split_begin + p.keys_per_split);
  }
  for_blocks<Scratch>(t.plan, visibility, range,
                      [&](const KeyBlock& keys) __attribute__((always_inline)) {
                        attend(p, batch, first_head, heads, keys, rows, t);
                      });
  for (int64_t h = 0; h < heads; ++h) finish_rows<Element>(p, batch, split, rows, t.head(h));
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
