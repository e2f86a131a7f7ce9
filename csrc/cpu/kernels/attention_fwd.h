// FlashAttention-2 forward and Flash-Decoding on one core (Dao, arXiv 2307.08691; Dao et al.,
// "Flash-Decoding", 2023).
//
//   out = softmax(scale q k^T + masks) v        lse = log sum exp of the row's scores
//
// A task is (split, row block, KV head, batch). Its rows are the queries of all the heads that
// share the KV head, so each key is read once per group; its keys are the row block's visible
// range within the split. Keys stream in blocks:
//
//   S = q k^T -> finish_scores (scale, softcap, mask, range) -> online softmax -> acc_o += P v
//
// Many rows: K is packed transposed and V in panels, one block each, and tile_gemm multiplies.
// Few rows (decode): tile_dot and tile_gemm_direct read K and V in place, once.
//
// Blocks are counted from the first visible slot of the sequence, so that left padding does not
// move a row's block boundaries and with them its rounding.
#pragma once

#include "cpu/isa/tile_gemm.h"
#include "cpu/kernels/score.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class Element>
struct ForwardScratch {
  using Acc = Accumulator<Element>;

  ForwardScratch(const AttentionParams& p, void* base) : arena(base) {
    tile = cpu_forward_tile(p.head_dim, p.head_dim_v);
    tile.block_m = min_of(tile.block_m, p.rows_per_kv_head());
    pack = p.rows_per_kv_head() >= kCpuPackRows;
    q_row = round_up(p.head_dim, kWidth<Acc>);
    s_row = round_up(tile.block_n, kPanel<Acc>);
    o_row = round_up(p.head_dim_v, kPanel<Acc>);
    q = arena.take<Acc>(tile.block_m * q_row);
    s = arena.take<Acc>(tile.block_m * s_row);
    acc_o = arena.take<Acc>(tile.block_m * o_row);
    bias = arena.take<Acc>(s_row);
    row_max = arena.take<Acc>(tile.block_m);
    row_sum = arena.take<Acc>(tile.block_m);
    rows = arena.take<Row>(tile.block_m);
    if (pack) {
      k_panels = arena.take<Acc>(p.head_dim * s_row);
      v_panels = arena.take<Acc>(tile.block_n * o_row);
      staging = arena.take<Acc>(kPanel<Acc> * q_row);
    }
  }

  Arena arena;
  Tile tile;
  bool pack;
  int64_t q_row, s_row, o_row;  // strides
  Acc *q, *s, *acc_o, *bias, *row_max, *row_sum;
  Row* rows;
  Acc *k_panels = nullptr, *v_panels = nullptr, *staging = nullptr;
};

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

template <class Acc, class T>
bool has_non_finite(int64_t rows, int64_t cols, const T* x, int64_t stride) {
  Vector<Acc> probe = {};  // 0 * x is 0 for finite x and NaN otherwise
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kWidth<Acc>) {
      const T* p = x + r * stride + c;
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
template <class Acc, class T>
void accumulate_visible(const AttentionParams& p, int64_t batch, KeyBlock keys, int64_t step,
                        int64_t rows, const Row* row, const Acc* s, int64_t s_row, const T* v,
                        Acc* acc_o, int64_t o_row) {
  constexpr int width = kWidth<Acc>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < keys.count; first += step) {
      const int64_t last = min_of(first + step, keys.count);
      for (int64_t c = 0; c < p.head_dim_v; c += width) {
        Vector<Acc> sum = {};
        for (int64_t key = first; key < last; ++key) {
          if (!sees(p, batch, row[r], keys.first + key)) continue;
          const T* at = v + key * p.v.seqlen + c;
          const Vector<Acc> x = p.head_dim_v - c >= width ? load_as<Acc>(at)
                                                          : load_part_as<Acc>(at, p.head_dim_v - c);
          sum = fma(broadcast<Acc>(s[r * s_row + key]), x, sum);
        }
        store<Acc>(acc_o + r * o_row + c, load(acc_o + r * o_row + c) + sum);
      }
    }
  }
}

template <class Element, class Acc = Accumulator<Element>>
void attend_block(const AttentionParams& p, int64_t batch, int64_t head_kv, KeyBlock keys,
                  int64_t next_count, int64_t rows, const ForwardScratch<Element>& t) {
  const Element* k = element_of<Element>(p.k, batch, keys.first, head_kv);
  const Element* v = element_of<Element>(p.v, batch, keys.first, head_kv);
  const int64_t padded = round_up(keys.count, kWidth<Acc>);

  if (t.pack) {
    pack_transposed(keys.count, p.head_dim, k, p.k.seqlen, t.k_panels, t.staging);
    tile_gemm(rows, keys.count, p.head_dim, t.q, t.q_row, 1, packed(t.k_panels, p.head_dim), t.s,
              t.s_row, false);
  } else {
    tile_dot(rows, keys.count, p.head_dim, t.q, t.q_row, k, p.k.seqlen, t.s, t.s_row,
             {v, p.v.seqlen, keys.count, p.head_dim_v});
  }

  bool hides = false;
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  for (int64_t r = 0; r < rows; ++r) {
    hides |= finish_scores<Acc>(p, batch, t.rows[r], keys, t.s + r * t.s_row, t.bias,
                                mask_is_shared && r > 0, nullptr);
    softmax_step(t.s + r * t.s_row, padded, t.row_max[r], t.row_sum[r], t.acc_o + r * t.o_row,
                 t.o_row);
  }

  if (hides && has_non_finite<Acc>(keys.count, p.head_dim_v, v, p.v.seqlen)) {
    const int64_t step = t.pack ? keys.count : kRowsInL1;
    accumulate_visible(p, batch, keys, step, rows, t.rows, t.s, t.s_row, v, t.acc_o, t.o_row);
  } else if (t.pack) {
    pack_rows(keys.count, p.head_dim_v, v, p.v.seqlen, t.v_panels);
    tile_gemm(rows, p.head_dim_v, keys.count, t.s, t.s_row, 1, packed(t.v_panels, keys.count),
              t.acc_o, t.o_row, true);
  } else {
    tile_gemm_direct(rows, p.head_dim_v, keys.count, t.s, t.s_row, v, p.v.seqlen, t.acc_o, t.o_row,
                     {k + keys.count * p.k.seqlen, p.k.seqlen, next_count, p.head_dim});
  }
}

template <class Acc, class Out>
FIL_INLINE void store_row(const Acc* acc_o, Acc row_max, Acc row_sum, int64_t head_dim_v, Out* out,
                          Acc* lse) {
  // row_sum is 0 only for a row without keys, and NaN where a visible score was.
  const bool empty = row_sum == 0;
  const Acc inverse = empty ? Acc(0) : 1 / row_sum;
  for (int64_t c = 0; c < head_dim_v; ++c) {
    out[c] = from_float<Out>(empty ? Acc(0) : acc_o[c] * inverse);
  }
  *lse = empty ? Acc(-__builtin_inf()) : (row_max + Acc(__builtin_log2(row_sum))) * Acc(kLn2);
}

template <class Element>
int64_t attention_fwd_tasks(const AttentionFwdParams& p) {
  const int64_t block_m = cpu_forward_tile(p.head_dim, p.head_dim_v).block_m;
  const int64_t m_blocks = (p.rows_per_kv_head() + block_m - 1) / block_m;
  return p.kv_splits * m_blocks * p.num_heads_kv * p.batch_size;
}

template <class Element>
int64_t attention_fwd_scratch(const AttentionFwdParams& p) {
  return ForwardScratch<Element>(p, nullptr).arena.used();
}

template <class Element>
void attention_fwd(const AttentionFwdParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  const ForwardScratch<Element> t(p, scratch);
  const int64_t total_rows = p.rows_per_kv_head();
  const int64_t m_blocks = (total_rows + t.tile.block_m - 1) / t.tile.block_m;

  // The last row blocks see the most keys when causal: they go first.
  const int64_t head_kv = task % p.num_heads_kv;
  const int64_t batch = task / p.num_heads_kv % p.batch_size;
  const int64_t split = task / p.num_heads_kv / p.batch_size % p.kv_splits;
  const int64_t m_block = m_blocks - 1 - task / p.num_heads_kv / p.batch_size / p.kv_splits;
  const int64_t first_row = m_block * t.tile.block_m;
  const int64_t rows = min_of(t.tile.block_m, total_rows - first_row);

  const Visibility visibility = p.visibility(batch);
  describe_rows(p, visibility, head_kv, first_row, rows, t.rows);
  for (int64_t r = 0; r < rows; ++r) {
    const Element* q = element_of<Element>(p.q, batch, t.rows[r].query, t.rows[r].head);
    for (int64_t c = 0; c < t.q_row; ++c) {
      t.q[r * t.q_row + c] = c < p.head_dim ? Acc(to_float(q[c])) : Acc(0);
    }
    t.row_max[r] = Acc(-__builtin_inf());
    t.row_sum[r] = 0;
    for (int64_t c = 0; c < t.o_row; ++c) t.acc_o[r * t.o_row + c] = 0;
  }

  KeyRange keys = visibility.rows(t.rows[0].query, t.rows[rows - 1].query);
  if (p.kv_splits > 1) {
    const int64_t split_begin = visibility.kv_begin + split * p.keys_per_split;
    keys.begin = max_of(keys.begin, split_begin);
    keys.end = min_of(keys.end, split_begin + p.keys_per_split);
  }
  if (!keys.empty()) {
    const int64_t skipped = (keys.begin - visibility.kv_begin) / t.tile.block_n * t.tile.block_n;
    for (int64_t key = visibility.kv_begin + skipped; key < keys.end; key += t.tile.block_n) {
      const int64_t count = min_of(t.tile.block_n, keys.end - key);
      const int64_t next_count = min_of(t.tile.block_n, keys.end - key - count);
      attend_block<Element>(p, batch, head_kv, {key, count}, next_count, rows, t);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const auto [query, head, visible] = t.rows[r];
    const Acc* acc_o = t.acc_o + r * t.o_row;
    const int64_t lse_at = (batch * p.num_heads_q + head) * p.seqlen_q + query;
    if (p.kv_splits == 1) {
      store_row(acc_o, t.row_max[r], t.row_sum[r], p.head_dim_v,
                element_of<Element>(p.out, batch, query, head), static_cast<Acc*>(p.lse) + lse_at);
    } else {
      const int64_t row_at =
          ((split * p.batch_size + batch) * p.seqlen_q + query) * p.num_heads_q + head;
      const int64_t lse_size = p.batch_size * p.num_heads_q * p.seqlen_q;
      store_row(acc_o, t.row_max[r], t.row_sum[r], p.head_dim_v,
                static_cast<Acc*>(p.out_partial) + row_at * p.head_dim_v,
                static_cast<Acc*>(p.lse_partial) + split * lse_size + lse_at);
    }
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
