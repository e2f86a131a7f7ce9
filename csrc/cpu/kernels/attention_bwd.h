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

template <class Element>
struct BackwardScratch {
  using Acc = Accumulator<Element>;

  BackwardScratch(const AttentionParams& p, void* base) : arena(base) {
    tile = cpu_backward_tile();
    s_row = round_up(tile.block_n, kPanel<Acc>);
    d_row = round_up(p.head_dim, kPanel<Acc>);
    dv_row = round_up(p.head_dim_v, kPanel<Acc>);
    q = arena.take<Acc>(tile.block_m * d_row);
    dout = arena.take<Acc>(tile.block_m * dv_row);
    p_tile = arena.take<Acc>(tile.block_m * s_row);
    ds_tile = arena.take<Acc>(tile.block_m * s_row);
    bias = arena.take<Acc>(s_row);
    slope = arena.take<Acc>(s_row);
    lse_log2 = arena.take<Acc>(tile.block_m);
    delta = arena.take<Acc>(tile.block_m);
    rows = arena.take<Row>(tile.block_m);
    k = arena.take<Acc>(tile.block_n * d_row);
    k_panels = arena.take<Acc>(p.head_dim * s_row);
    v_panels = arena.take<Acc>(p.head_dim_v * s_row);
    staging = arena.take<Acc>(kPanel<Acc> * max_of(d_row, dv_row));
    dk = arena.take<Acc>(tile.block_n * d_row);
    dv = arena.take<Acc>(tile.block_n * dv_row);
    dq = arena.take<Acc>(tile.block_m * d_row);
  }

  Arena arena;
  Tile tile;
  int64_t s_row, d_row, dv_row;  // strides
  Acc *q, *dout, *p_tile, *ds_tile, *bias, *slope, *lse_log2, *delta;
  Row* rows;
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

// q, dO, lse and delta of one row block. A row that saw no key keeps nothing of its q and dO, which
// may be NaN (a loss that divides by the zero output): it gives and gets gradients of 0.
template <class Element, class Acc = Accumulator<Element>>
void load_rows(const AttentionBwdParams& p, int64_t batch, int64_t rows,
               const BackwardScratch<Element>& t) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto [query, head, visible] = t.rows[r];
    const int64_t at = (batch * p.num_heads_q + head) * p.seqlen_q + query;
    const Acc lse = static_cast<const Acc*>(p.lse)[at];
    Acc* dout = t.dout + r * t.dv_row;
    if (lse == Acc(-__builtin_inf())) {
      fill_zero(t.q + r * t.d_row, t.d_row);
      fill_zero(dout, t.dv_row);
      t.lse_log2[r] = Acc(__builtin_inf());
      t.delta[r] = 0;
      continue;
    }
    widen_row(element_of<Element>(p.q, batch, query, head), p.head_dim, t.d_row, t.q + r * t.d_row);
    widen_row(element_of<Element>(p.dout, batch, query, head), p.head_dim_v, t.dv_row, dout);
    const Element* out = element_of<Element>(p.out, batch, query, head);
    Acc delta = 0;
    for (int64_t c = 0; c < p.head_dim_v; ++c) delta += dout[c] * Acc(to_float(out[c]));
    t.delta[r] = p.dlse ? delta - static_cast<const Acc*>(p.dlse)[at] : delta;
    t.lse_log2[r] = lse * Acc(kLog2e);
  }
}

template <class Element, class Acc = Accumulator<Element>>
void load_keys(const AttentionBwdParams& p, int64_t batch, int64_t head_kv, KeyBlock keys,
               const BackwardScratch<Element>& t) {
  const Element* k = element_of<Element>(p.k, batch, keys.first, head_kv);
  const Element* v = element_of<Element>(p.v, batch, keys.first, head_kv);
  for (int64_t j = 0; j < keys.count; ++j) {
    widen_row(k + j * p.k.seqlen, p.head_dim, t.d_row, t.k + j * t.d_row);
  }
  pack_transposed(keys.count, p.head_dim, t.k, t.d_row, t.k_panels, t.staging);
  pack_transposed(keys.count, p.head_dim_v, v, p.v.seqlen, t.v_panels, t.staging);
}

// p_tile <- P and ds_tile <- d loss / d (scale q k^T), row by row.
template <class Element, class Acc = Accumulator<Element>>
void score_gradients(const AttentionBwdParams& p, int64_t batch, KeyBlock keys, int64_t rows,
                     const BackwardScratch<Element>& t) {
  constexpr int width = kWidth<Acc>;
  tile_gemm(rows, keys.count, p.head_dim, t.q, t.d_row, 1, packed(t.k_panels, p.head_dim), t.p_tile,
            t.s_row, false);
  tile_gemm(rows, keys.count, p.head_dim_v, t.dout, t.dv_row, 1, packed(t.v_panels, p.head_dim_v),
            t.ds_tile, t.s_row, false);
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  for (int64_t r = 0; r < rows; ++r) {
    Acc* s = t.p_tile + r * t.s_row;
    Acc* ds = t.ds_tile + r * t.s_row;
    finish_scores<Acc>(p, batch, t.rows[r], keys, s, t.bias, mask_is_shared && r > 0, t.slope);
    for (int64_t c = 0; c < keys.count; c += width) {
      // P <= 1; rounding of a huge lse must not push it over.
      const Vector<Acc> exponent = load(s + c) - t.lse_log2[r];
      const Vector<Acc> prob = exp2<Acc>(exponent > Acc(0) ? Vector<Acc>{} : exponent);
      store<Acc>(s + c, prob);
      store<Acc>(ds + c, prob * (load(ds + c) - t.delta[r]));
    }
    if (p.dmask && p.pass != BwdPass::kQueries) {
      Acc* dmask = static_cast<Acc*>(p.dmask) + batch * p.dmask_batch +
                   t.rows[r].head * p.dmask_head + t.rows[r].query * p.dmask_row +
                   keys.first * p.dmask_col;
      for (int64_t c = 0; c < keys.count; ++c) dmask[c * p.dmask_col] += ds[c];
    }
    if (p.softcap > 0) {
      for (int64_t c = 0; c < keys.count; c += width)
        store<Acc>(ds + c, load(ds + c) * load(t.slope + c));
    }
  }
}

template <class Element>
int64_t attention_bwd_tasks(const AttentionBwdParams& p) {
  const Tile tile = cpu_backward_tile();
  const int64_t n_blocks = (p.seqlen_kv + tile.block_n - 1) / tile.block_n;
  const int64_t m_blocks = (p.rows_per_kv_head() + tile.block_m - 1) / tile.block_m;
  const int64_t blocks = p.pass == BwdPass::kFused  ? 1
                         : p.pass == BwdPass::kKeys ? n_blocks
                                                    : m_blocks;
  return p.batch_size * p.num_heads_kv * blocks;
}

template <class Element>
int64_t attention_bwd_scratch(const AttentionBwdParams& p) {
  return BackwardScratch<Element>(p, nullptr).arena.used();
}

template <class Element>
void attention_bwd(const AttentionBwdParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  const BackwardScratch<Element> t(p, scratch);
  const Acc scale = Acc(p.softmax_scale);
  const int64_t total_rows = p.rows_per_kv_head();
  const int64_t head_kv = task % p.num_heads_kv;
  const int64_t batch = task / p.num_heads_kv % p.batch_size;
  const int64_t block = task / p.num_heads_kv / p.batch_size;
  const Visibility visibility = p.visibility(batch);

  const bool wants_keys = p.pass != BwdPass::kQueries;
  int64_t row_begin = 0, row_end = total_rows, key_begin = 0, key_end = p.seqlen_kv;
  if (p.pass == BwdPass::kKeys) {
    key_begin = block * t.tile.block_n;
    key_end = min_of(key_begin + t.tile.block_n, p.seqlen_kv);
  } else if (p.pass == BwdPass::kQueries) {
    row_begin = block * t.tile.block_m;
    row_end = min_of(row_begin + t.tile.block_m, total_rows);
    fill_zero(t.dq, t.tile.block_m * t.d_row);
  }
  const int64_t accum_row = round_up(p.head_dim, kAccumulatorAlign);
  Acc* dq_accum = nullptr;
  if (p.pass == BwdPass::kFused) {
    dq_accum =
        static_cast<Acc*>(p.dq_accum) + (batch * p.num_heads_kv + head_kv) * total_rows * accum_row;
  }

  for (int64_t key = key_begin; key < key_end; key += t.tile.block_n) {
    const KeyBlock slots{key, min_of(t.tile.block_n, key_end - key)};
    // Slots outside the sequence are not even read: they may hold anything.
    const int64_t first = max_of(slots.first, visibility.kv_begin);
    const KeyBlock keys{first, min_of(slots.first + slots.count, visibility.kv_end) - first};
    fill_zero(t.dk, t.tile.block_n * t.d_row);
    fill_zero(t.dv, t.tile.block_n * t.dv_row);
    bool keys_are_loaded = false;
    for (int64_t row = row_begin; keys.count > 0 && row < row_end; row += t.tile.block_m) {
      const int64_t rows = min_of(t.tile.block_m, row_end - row);
      const KeyRange visible =
          visibility.rows(row / p.group_size(), (row + rows - 1) / p.group_size());
      if (visible.begin >= keys.first + keys.count || visible.end <= keys.first) continue;
      if (!keys_are_loaded) load_keys<Element>(p, batch, head_kv, keys, t);
      keys_are_loaded = true;
      describe_rows(p, visibility, head_kv, row, rows, t.rows);
      load_rows<Element>(p, batch, rows, t);
      score_gradients<Element>(p, batch, keys, rows, t);
      if (wants_keys) {
        tile_gemm(keys.count, p.head_dim_v, rows, t.p_tile, 1, t.s_row, row_major(t.dout, t.dv_row),
                  t.dv, t.dv_row, true);
        tile_gemm(keys.count, p.head_dim, rows, t.ds_tile, 1, t.s_row, row_major(t.q, t.d_row),
                  t.dk, t.d_row, true);
      }
      if (p.pass != BwdPass::kKeys) {
        Acc* dq = dq_accum ? dq_accum + row * accum_row : t.dq;
        tile_gemm(rows, p.head_dim, keys.count, t.ds_tile, t.s_row, 1, row_major(t.k, t.d_row), dq,
                  dq_accum ? accum_row : t.d_row, true);
      }
    }
    for (int64_t slot = slots.first; wants_keys && slot < slots.first + slots.count; ++slot) {
      const bool inside = slot >= keys.first && slot < keys.first + keys.count;
      Element* dk = element_of<Element>(p.dk, batch, slot, head_kv);
      Element* dv = element_of<Element>(p.dv, batch, slot, head_kv);
      if (inside) {
        store_scaled(t.dk + (slot - keys.first) * t.d_row, p.head_dim, scale, dk);
        store_scaled(t.dv + (slot - keys.first) * t.dv_row, p.head_dim_v, Acc(1), dv);
      } else {
        for (int64_t c = 0; c < p.head_dim; ++c) dk[c] = from_float<Element>(0);
        for (int64_t c = 0; c < p.head_dim_v; ++c) dv[c] = from_float<Element>(0);
      }
    }
  }

  for (int64_t row = row_begin; p.pass != BwdPass::kKeys && row < row_end; ++row) {
    const Acc* dq = dq_accum ? dq_accum + row * accum_row : t.dq + (row - row_begin) * t.d_row;
    const int64_t head = head_kv * p.group_size() + row % p.group_size();
    store_scaled(dq, p.head_dim, scale,
                 element_of<Element>(p.dq, batch, row / p.group_size(), head));
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
