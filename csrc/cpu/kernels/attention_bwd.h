// FlashAttention-2 backward on one core (Dao, arXiv 2307.08691, algorithm 2).
//
// With S the scaled scores, P = exp(S - lse), dP = dO v^T and delta = rowsum(dO out) - dlse:
//
//   dS = P (dP - delta)      dV = P^T dO      dK = scale dS^T q      dQ = scale dS k
//
// An additive mask gets dS itself; a softcap multiplies dS by its slope before dK and dQ. Rows are
// packed as in the forward, so dK and dV sum over the heads of a group without expanding K or V.
// See BwdPass for what a task is; within one, KV blocks are outermost and everything adds in
// ascending order, so the gradients are bitwise repeatable at any number of threads.
#pragma once

#include "cpu/isa/tile_gemm.h"
#include "cpu/kernels/score.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// What a task keeps of its rows while keys stream.
template <class Acc>
struct BackwardRows {
  void take(Arena& arena, const AttentionBwdParams& p) {
    const bool all = p.pass != BwdPass::kQueries;
    const int64_t count = all ? round_up(p.rows_per_kv_head(), kMatrixRows) : tile.block_m;
    lse_log2 = arena.take<Acc>(count);
    delta = arena.take<Acc>(count);
    rows = arena.take<Row>(tile.block_m);
  }

  Tile tile;
  Acc *lse_log2, *delta;  // of all rows of the task
  Row* rows;              // of a block
};

// Whether dQ of a task's rows is put together by several tasks, in memory that they share.
FIL_INLINE bool shares_dq(const AttentionBwdParams& p) {
  return p.pass == BwdPass::kSum || (p.pass == BwdPass::kFused && p.key_parts() > 1);
}

// Otherwise a task has dQ of its rows to itself, by each part of the keys.
FIL_INLINE int64_t dq_scratch(const AttentionBwdParams& p, const Tile& tile) {
  if (p.pass == BwdPass::kKeys || shares_dq(p)) return 0;
  const int64_t rows = p.pass == BwdPass::kFused ? p.dq_accum_rows() : tile.block_m;
  return p.key_parts() * rows * round_up(p.head_dim, kAccumulatorAlign);
}

template <class Element_>
struct BackwardScratch : BackwardRows<Accumulator<Element_>> {
  using Element = Element_;
  using Acc = Accumulator<Element>;
  using BackwardRows<Acc>::tile;

  static Tile tile_of(const AttentionParams&) { return cpu_backward_tile(); }

  BackwardScratch(const AttentionBwdParams& p, void* base) : arena(base) {
    tile = tile_of(p);
    this->take(arena, p);
    s_row = round_up(tile.block_n, kPanel<Acc>);
    d_row = round_up(p.head_dim, kPanel<Acc>);
    dv_row = round_up(p.head_dim_v, kPanel<Acc>);
    q = arena.take<Acc>(tile.block_m * d_row);
    dout = arena.take<Acc>(tile.block_m * dv_row);
    p_tile = arena.take<Acc>(tile.block_m * s_row);
    ds_tile = arena.take<Acc>(tile.block_m * s_row);
    bias = arena.take<Acc>(s_row);
    slope = arena.take<Acc>(s_row);
    k = arena.take<Acc>(tile.block_n * d_row);
    k_panels = arena.take<Acc>(p.head_dim * s_row);
    v_panels = arena.take<Acc>(p.head_dim_v * s_row);
    staging = arena.take<Acc>(kPanel<Acc> * max_of(d_row, dv_row));
    dk = arena.take<Acc>(tile.block_n * d_row);
    dv = arena.take<Acc>(tile.block_n * dv_row);
    dq = arena.take<Acc>(dq_scratch(p, tile));
  }

  Arena arena;
  int64_t s_row, d_row, dv_row;  // strides
  Acc *q, *dout, *p_tile, *ds_tile, *bias, *slope;
  Acc *k, *k_panels, *v_panels, *staging, *dk, *dv, *dq;
};

// out[count] <- x, zeros up to `padded`.
template <class Acc, class T>
FIL_INLINE void widen_row(const T* x, int64_t count, int64_t padded, Acc* out) {
  for (int64_t c = 0; c < count; ++c) out[c] = Acc(to_float(x[c]));
  for (int64_t c = count; c < padded; ++c) out[c] = 0;
}

template <class Acc, class T>
FIL_INLINE void store_scaled(const Acc* x, int64_t count, Acc scale, T* out) {
  for (int64_t c = 0; c < count; ++c) out[c] = from_float<T>(x[c] * scale);
}

template <class Acc>
FIL_INLINE void fill_zero(Acc* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

template <class Acc>
FIL_INLINE Acc lse_of(const AttentionBwdParams& p, int64_t batch, const Row& row) {
  return static_cast<const Acc*>(p.lse)[p.row_index(batch, row.head, row.query)];
}

// A row that saw no key keeps nothing of its q and dO, which may be NaN (a loss that divides by the
// zero output): it gives and gets gradients of 0.
template <class Acc>
FIL_INLINE bool saw_no_key(Acc lse) {
  return lse == Acc(-__builtin_inf());
}

// In the order of dP's sums: of a row that sees one key, dP - delta is 0.
template <class Element, class Acc = Accumulator<Element>>
Acc dot_product(int64_t count, const Element* x, const Element* y,
                const BackwardScratch<Element>&) {
  Acc sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += Acc(to_float(x[c])) * Acc(to_float(y[c]));
  return sum;
}

// lse and delta of the rows in t.rows, the first of which is the task's row `at`.
template <class Scratch>
void prepare_rows(const AttentionBwdParams& p, int64_t batch, int64_t rows, int64_t at,
                  const Scratch& t) {
  using Element = typename Scratch::Element;
  using Acc = typename Scratch::Acc;
  for (int64_t r = 0; r < rows; ++r) {
    const Row& row = t.rows[r];
    const Acc lse = lse_of<Acc>(p, batch, row);
    t.lse_log2[at + r] = saw_no_key(lse) ? Acc(__builtin_inf()) : lse * Acc(kLog2e);
    t.delta[at + r] = 0;
    if (saw_no_key(lse)) continue;
    const Element* dout = element_of<Element>(p.dout, batch, row.query, row.head);
    const Element* out = element_of<Element>(p.out, batch, row.query, row.head);
    const Acc dot = dot_product(p.head_dim_v, dout, out, t);
    const int64_t index = p.row_index(batch, row.head, row.query);
    t.delta[at + r] = p.dlse ? dot - static_cast<const Acc*>(p.dlse)[index] : dot;
  }
}

// q and dO of one row block.
template <class Element, class Acc = Accumulator<Element>>
void load_rows(const AttentionBwdParams& p, int64_t batch, int64_t rows, int64_t, bool,
               const BackwardScratch<Element>& t) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto [query, head, visible] = t.rows[r];
    if (saw_no_key(lse_of<Acc>(p, batch, t.rows[r]))) {
      fill_zero(t.q + r * t.d_row, t.d_row);
      fill_zero(t.dout + r * t.dv_row, t.dv_row);
      continue;
    }
    widen_row(element_of<Element>(p.q, batch, query, head), p.head_dim, t.d_row, t.q + r * t.d_row);
    widen_row(element_of<Element>(p.dout, batch, query, head), p.head_dim_v, t.dv_row,
              t.dout + r * t.dv_row);
  }
}

template <class Element, class Acc = Accumulator<Element>>
void load_keys(const AttentionBwdParams& p, int64_t batch, int64_t head_kv, const KeyBlock& keys,
               const BackwardScratch<Element>& t) {
  const Element* k = element_of<Element>(p.k, batch, keys.first, head_kv);
  const Element* v = element_of<Element>(p.v, batch, keys.first, head_kv);
  for (int64_t j = 0; j < keys.count; ++j) {
    widen_row(k + j * p.k.seqlen, p.head_dim, t.d_row, t.k + j * t.d_row);
  }
  pack_transposed(keys.count, p.head_dim, Rows<Acc>{t.k, t.d_row}, t.k_panels, t.staging);
  pack_transposed(keys.count, p.head_dim_v, Rows<Element>{v, p.v.seqlen}, t.v_panels, t.staging);
}

// One row: its products s become P, and its products ds with v become d loss / d (scale q k^T).
template <class Acc>
FIL_INLINE void row_gradients(const AttentionBwdParams& p, int64_t batch, const Row& row,
                              const KeyBlock& keys, Acc lse_log2, Acc delta, Acc* s, Acc* ds,
                              Acc* bias, bool bias_is_loaded, Acc* slope) {
  constexpr int width = kWidth<Acc>;
  finish_scores<Acc>(p, batch, row, keys, s, bias, bias_is_loaded, slope);
  for (int64_t c = 0; c < keys.count; c += width) {
    // P <= 1; rounding of a huge lse must not push it over.
    const Vector<Acc> exponent = load(s + c) - lse_log2;
    const Vector<Acc> prob = exp2<Acc>(exponent > Acc(0) ? Vector<Acc>{} : exponent);
    store<Acc>(s + c, prob);
    store<Acc>(ds + c, prob * (load(ds + c) - delta));
  }
  if (p.dmask && p.pass != BwdPass::kQueries) {
    Acc* dmask = static_cast<Acc*>(p.dmask) + batch * p.dmask_batch + row.head * p.dmask_head +
                 row.query * p.dmask_row + keys.first * p.dmask_col;
    for (int64_t c = 0; c < keys.count; ++c) dmask[c * p.dmask_col] += ds[c];
  }
  for (int64_t c = 0; p.softcap > 0 && c < keys.count; c += width) {
    store<Acc>(ds + c, load(ds + c) * load(slope + c));
  }
}

// dv += P^T dO and dk += dS^T q of a block of rows and of keys, and dq += dS k.
template <class Element, class Acc = Accumulator<Element>>
void add_gradients(const AttentionBwdParams& p, int64_t batch, const KeyBlock& keys, int64_t rows,
                   int64_t at, Acc* dq, int64_t dq_row, const BackwardScratch<Element>& t) {
  tile_gemm(rows, keys.count, p.head_dim, t.q, t.d_row, 1, packed(t.k_panels, p.head_dim), t.p_tile,
            t.s_row, false);
  tile_gemm(rows, keys.count, p.head_dim_v, t.dout, t.dv_row, 1, packed(t.v_panels, p.head_dim_v),
            t.ds_tile, t.s_row, false);
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  for (int64_t r = 0; r < rows; ++r) {
    row_gradients(p, batch, t.rows[r], keys, t.lse_log2[at + r], t.delta[at + r],
                  t.p_tile + r * t.s_row, t.ds_tile + r * t.s_row, t.bias, mask_is_shared && r > 0,
                  t.slope);
  }
  if (p.pass != BwdPass::kQueries) {
    tile_gemm(keys.count, p.head_dim_v, rows, t.p_tile, 1, t.s_row, row_major(t.dout, t.dv_row),
              t.dv, t.dv_row, true);
    tile_gemm(keys.count, p.head_dim, rows, t.ds_tile, 1, t.s_row, row_major(t.q, t.d_row), t.dk,
              t.d_row, true);
  }
  if (p.pass != BwdPass::kKeys) {
    tile_gemm(rows, p.head_dim, keys.count, t.ds_tile, t.s_row, 1, row_major(t.k, t.d_row), dq,
              dq_row, true);
  }
}

template <class Element>
void start_keys(const BackwardScratch<Element>& t) {
  fill_zero(t.dk, t.tile.block_n * t.d_row);
  fill_zero(t.dv, t.tile.block_n * t.dv_row);
}

template <class Element, class Acc = Accumulator<Element>>
void store_keys(const AttentionBwdParams& p, int64_t batch, int64_t head_kv, const KeyBlock& keys,
                const BackwardScratch<Element>& t) {
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j;
    store_scaled(t.dk + j * t.d_row, p.head_dim, Acc(p.softmax_scale),
                 element_of<Element>(p.dk, batch, key, head_kv));
    store_scaled(t.dv + j * t.dv_row, p.head_dim_v, Acc(1),
                 element_of<Element>(p.dv, batch, key, head_kv));
  }
}

template <class Element, class Acc = Accumulator<Element>>
void store_query(const AttentionBwdParams& p, const Acc* dq, Element* out,
                 const BackwardScratch<Element>&) {
  store_scaled(dq, p.head_dim, Acc(p.softmax_scale), out);
}

template <class Scratch>
int64_t attention_bwd_tasks(const AttentionBwdParams& p) {
  const Tile tile = Scratch::tile_of(p);
  const int64_t blocks = p.pass == BwdPass::kFused  ? p.key_parts()
                         : p.pass == BwdPass::kKeys ? ceil_div(p.seqlen_kv, tile.block_n)
                                                    : ceil_div(p.rows_per_kv_head(), tile.block_m);
  return p.batch_size * p.num_heads_kv * blocks;
}

template <class Scratch>
int64_t attention_bwd_scratch(const AttentionBwdParams& p) {
  return Scratch(p, nullptr).arena.used();
}

template <class Scratch>
void attention_bwd(const AttentionBwdParams& p, int64_t task, void* scratch) {
  using Element = typename Scratch::Element;
  using Acc = typename Scratch::Acc;
  const Scratch t(p, scratch);
  const auto [block_m, block_n] = t.tile;
  const int64_t total_rows = p.rows_per_kv_head();
  const int64_t head_kv = task % p.num_heads_kv;
  const int64_t batch = task / p.num_heads_kv % p.batch_size;
  const int64_t block = task / p.num_heads_kv / p.batch_size;
  const Visibility visibility = p.visibility(batch);

  const bool all_rows = p.pass == BwdPass::kFused || p.pass == BwdPass::kSum;
  const bool wants_keys = p.pass != BwdPass::kQueries;
  int64_t row_begin = 0, row_end = total_rows, key_begin = 0, key_end = p.seqlen_kv;
  if (p.pass == BwdPass::kQueries || p.pass == BwdPass::kSum) {
    row_begin = block * block_m;
    row_end = min_of(row_begin + block_m, total_rows);
    if (p.pass == BwdPass::kSum) key_end = 0;
  } else {
    const int64_t count = p.pass == BwdPass::kKeys ? block_n : p.keys_per_part;
    key_begin = block * count;
    key_end = min_of(key_begin + count, p.seqlen_kv);
  }
  // dQ of the task's rows by the first part of the keys; those by the others lie dq_part apart.
  const int64_t dq_row = round_up(p.head_dim, kAccumulatorAlign);
  const int64_t dq_rows = all_rows ? p.dq_accum_rows() : block_m;
  const int64_t dq_part = dq_rows * dq_row * (shares_dq(p) ? p.batch_size * p.num_heads_kv : 1);
  Acc* dq = t.dq;
  if (shares_dq(p)) {
    const int64_t first = (batch * p.num_heads_kv + head_kv) * dq_rows + row_begin;
    dq = static_cast<Acc*>(p.dq_accum) + first * dq_row;
  }
  if (p.pass == BwdPass::kFused) fill_zero(dq + block * dq_part, dq_rows * dq_row);
  if (p.pass == BwdPass::kQueries) fill_zero(dq, p.key_parts() * dq_part);

  for (int64_t key = key_begin, next; key < key_end; key = next) {
    const int64_t part = key / p.keys_per_part;
    next = min_of(key + block_n, min_of(key_end, (part + 1) * p.keys_per_part));
    const KeyBlock slots{key, next - key};
    // Slots outside the sequence are not even read: they may hold anything.
    const int64_t first = max_of(slots.first, visibility.kv_begin);
    const KeyBlock keys{first, min_of(slots.first + slots.count, visibility.kv_end) - first};
    if (wants_keys) start_keys(t);
    bool keys_are_loaded = false;
    for (int64_t row = row_begin; keys.count > 0 && row < row_end; row += block_m) {
      const int64_t rows = min_of(block_m, row_end - row), at = row - row_begin;
      const KeyRange visible =
          visibility.rows(row / p.group_size(), (row + rows - 1) / p.group_size());
      if (visible.begin >= keys.first + keys.count || visible.end <= keys.first) continue;
      if (!keys_are_loaded) load_keys(p, batch, head_kv, keys, t);
      keys_are_loaded = true;
      describe_rows(p, visibility, head_kv, row, rows, t.rows);
      const bool first_time = key == key_begin || keys.first <= visible.begin;
      if (first_time) prepare_rows(p, batch, rows, at, t);
      load_rows(p, batch, rows, at, first_time, t);
      add_gradients(p, batch, keys, rows, at, dq + part * dq_part + at * dq_row, dq_row, t);
    }
    if (!wants_keys) continue;
    store_keys(p, batch, head_kv, keys, t);
    for (int64_t slot = slots.first; slot < slots.first + slots.count; ++slot) {
      if (slot >= keys.first && slot < keys.first + keys.count) continue;
      Element* dk = element_of<Element>(p.dk, batch, slot, head_kv);
      Element* dv = element_of<Element>(p.dv, batch, slot, head_kv);
      for (int64_t c = 0; c < p.head_dim; ++c) dk[c] = from_float<Element>(0);
      for (int64_t c = 0; c < p.head_dim_v; ++c) dv[c] = from_float<Element>(0);
    }
  }

  if (p.pass == BwdPass::kKeys || (p.pass == BwdPass::kFused && p.key_parts() > 1)) return;
  for (int64_t row = row_begin; row < row_end; ++row, dq += dq_row) {
    for (int64_t i = 1; i < p.key_parts(); ++i) {
      for (int64_t c = 0; c < p.head_dim; ++c) dq[c] += dq[i * dq_part + c];
    }
    const int64_t head = head_kv * p.group_size() + row % p.group_size();
    store_query(p, dq, element_of<Element>(p.dq, batch, row / p.group_size(), head), t);
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
