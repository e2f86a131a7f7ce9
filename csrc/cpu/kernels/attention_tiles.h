// The forward of many bfloat16 rows with both products on AMX tiles; all else as in
// attention_fwd.h.
//
// A block of keys is packed once, for all rows of the task, which come in chunks of 32: S = q k^T,
// its softmax step in fp32, P rounded to bfloat16, acc_o += P v. The tile products of the next
// chunk's S and of the last one's acc_o run beside the softmax of the one between, in other units
// of the core. The row sums are of P before it is rounded. Rows up to a multiple of 16 behind the
// last are computed too, on whatever lies there, and never read.
#pragma once

#include "cpu/isa/amx_gemm.h"
#include "cpu/kernels/attention_fwd.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

struct TileScratch : RowState<float> {
  using Element = BFloat16;
  using Acc = float;
  static constexpr bool matrix_tiles = true;

  TileScratch(const AttentionFwdParams& params, void* base) : arena(base) {
    plan = forward_plan<TileScratch>(params);
    const int64_t block_m = round_up(plan.tile.block_m, kMatrixRows), block_n = plan.tile.block_n;
    head_dim = params.head_dim;
    head_dim_v = params.head_dim_v;
    q_row = round_up(params.head_dim, kAmxDepth);
    s_row = round_up(block_n, kAmxDepth);
    take(arena, block_m, round_up(params.head_dim_v, 2 * kAmxRows));
    q = arena.take<BFloat16>(block_m * q_row);
    s = arena.take<float>(2 * kMatrixRows * s_row);
    p = arena.take<BFloat16>(2 * kMatrixRows * s_row);
    bias = arena.take<float>(s_row);
    k_tiles = arena.take<BFloat16>(s_row * q_row);
    v_tiles = arena.take<BFloat16>(s_row * o_row);
    staging = arena.take<BFloat16>(kAmxRows * q_row);
  }

  // The same scratch from that row on.
  TileScratch from(int64_t row) const {
    TileScratch t = *this;
    t.skip(row);
    t.q += row * q_row;
    return t;
  }
  // The same scratch with that one of the buffers for S and P.
  TileScratch turned(int64_t turn) const {
    TileScratch t = *this;
    t.s += turn * kMatrixRows * s_row;
    t.p += turn * kMatrixRows * s_row;
    return t;
  }
  const TileScratch& head(int64_t) const { return *this; }  // a packed task has one

  Arena arena;
  CpuForwardPlan plan;
  int64_t head_dim, head_dim_v, q_row, s_row;  // the last two are strides
  float *s, *bias;                             // two of 32 rows, as are
  BFloat16 *p, *q, *k_tiles, *v_tiles, *staging;
};

FIL_INLINE void load_query(const BFloat16* q, int64_t head_dim, int64_t r, const TileScratch& t) {
  BFloat16* row = t.q + r * t.q_row;
  __builtin_memcpy(row, q, head_dim * sizeof *q);
  __builtin_memset(row + head_dim, 0, (t.q_row - head_dim) * sizeof *q);
}

// Rows of a task whose products run together, and the keys of a block that they see, rounded up.
struct TileChunk {
  TileScratch t;
  int64_t rows, cols;
  bool finite_only = false;  // the V that they meet has zeros for NaN and inf

  FIL_INLINE AmxProduct scores() const {
    return {rows, cols, t.head_dim, t.q, t.q_row, t.k_tiles, t.q_row, t.s, t.s_row, false};
  }
  FIL_INLINE AmxProduct values(const KeyBlock& keys) const {
    const int64_t depth = round_up(keys.count, kAmxDepth);
    return {rows, t.head_dim_v, cols, t.p, t.s_row, t.v_tiles, depth, t.acc_o, t.o_row, true};
  }
};

// The chunk of the first rows from `first` on that see a key of the block; without rows if none do.
// Queries ascend with the rows.
FIL_INLINE TileChunk chunk_from(int64_t first, int64_t rows, const KeyBlock& keys,
                                const TileScratch& all) {
  for (; first < rows; first += kMatrixRows) {
    const int64_t count = min_of(rows - first, kMatrixRows);
    if (all.rows[first].visible.begin >= keys.first + keys.count) break;
    const int64_t seen = all.rows[first + count - 1].visible.end - keys.first;
    if (seen <= 0) continue;
    return {all.from(first), count, min_of(round_up(seen, kAmxDepth), keys.count)};
  }
  return {all, 0, 0};
}

// P of one row in bfloat16, zero behind the last key. Returns whether a key is hidden from it.
FIL_INLINE bool tile_row(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                         int64_t r, const TileScratch& t, bool bias_is_loaded) {
  BFloat16* to = t.p + r * t.s_row;
  const bool hides =
      row_probabilities<float>(p, batch, keys, r, t, t.s + r * t.s_row, t.bias, bias_is_loaded,
                               [&](int64_t c, Vector<float> e)
                                   __attribute__((always_inline)) { store_bfloat16(to + c, e); });
  const int64_t padded = round_up(keys.count, kWidth<float>);
  __builtin_memset(to + padded, 0, (round_up(keys.count, kAmxDepth) - padded) * sizeof *to);
  return hides;
}

// acc_o += P v of the elements of v that are NaN or inf, for the rows that see their keys: with the
// products of the finite ones, what the products of all would be.
inline void add_non_finite(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                           const BFloat16* v, const TileChunk& chunk) {
  const TileScratch& t = chunk.t;
  for (int64_t key = 0; key < chunk.cols; ++key, v += p.v.seqlen) {
    if (!has_non_finite<float>(1, p.head_dim_v, v, 0)) continue;
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (!sees(p, batch, t.rows[r], keys.at(key))) continue;
      const float probability = to_float(t.p[r * t.s_row + key]);
      for (int64_t c = 0; c < p.head_dim_v; ++c) {
        const float x = to_float(v[c]);
        if (x - x != 0) t.acc_o[r * t.o_row + c] += probability * x;
      }
    }
  }
}

inline void attend_packed(const AttentionFwdParams& p, int64_t batch, int64_t head_kv,
                          const KeyBlock& keys, int64_t rows, const TileScratch& all) {
  const BFloat16* k = element_of<BFloat16>(p.k, batch, keys.first, head_kv);
  const BFloat16* v = element_of<BFloat16>(p.v, batch, keys.first, head_kv);
  pack_keys(keys.count, p.head_dim, k, p.k.seqlen, all.k_tiles, all.staging);
  pack_values<false>(keys.count, p.head_dim_v, v, p.v.seqlen, all.v_tiles);
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  bool probed = false, poisoned = false;  // V, once a row does not see all of it
  Tiles tiles(kFullTiles);  // per block: nanoseconds, and no configuration outlives its use
  AmxQueue queue(tiles);
  TileChunk before{all, 0, 0}, now = chunk_from(0, rows, keys, all);
  int64_t first = 0, turn = 0;  // of two buffers for S and P
  const auto finish_values = [&] {
    queue.finish();
    if (before.finite_only) add_non_finite(p, batch, keys, v, before);
  };
  if (now.rows > 0) queue.add(now.scores());
  queue.finish();
  while (now.rows > 0) {
    first = now.t.rows - all.rows;
    TileChunk next = chunk_from(first + kMatrixRows, rows, keys, all.turned(turn ^= 1));
    if (next.rows > 0) queue.add(next.scores());
    if (before.rows > 0) queue.add(before.values(keys));
    const int64_t steps = ceil_div(queue.steps(), now.rows);
    const KeyBlock seen{keys.first, now.cols};
    bool hides = false;
    for (int64_t r = 0; r < now.rows; ++r) {
      for (int64_t i = 0; i < steps; ++i) queue.step();
      hides |= tile_row(p, batch, seen, r, now.t, mask_is_shared && r > 0);
    }
    finish_values();
    if (hides && !probed) {
      probed = true;
      poisoned = has_non_finite<float>(keys.count, p.head_dim_v, v, p.v.seqlen);
      if (poisoned) pack_values<true>(keys.count, p.head_dim_v, v, p.v.seqlen, all.v_tiles);
    }
    now.finite_only = poisoned;
    before = now;
    now = next;
  }
  if (before.rows > 0) queue.add(before.values(keys));
  finish_values();
}

// Few rows read K and V in place, on vectors: the level below does.
template <const KernelTable* (*below)()>
struct TileForward {
  static const Kernel<AttentionFwdParams>& few() { return below()->bfloat16.attention_fwd; }

  static int64_t scratch(const AttentionFwdParams& p) {
    return forward_plan<TileScratch>(p).pack ? attention_fwd_scratch<TileScratch>(p)
                                             : few().scratch(p);
  }
  static void run(const AttentionFwdParams& p, int64_t task, void* scratch) {
    if (!forward_plan<TileScratch>(p).pack) return few().run(p, task, scratch);
    attention_fwd<TileScratch>(p, task, scratch);
  }
};

// The kernels of the level below, but for that forward.
template <const KernelTable* (*below)()>
KernelTable with_tiles() {
  KernelTable table = *below();
  table.bfloat16.forward_plan = forward_plan<TileScratch>;
  table.bfloat16.attention_fwd = {attention_fwd_tasks<TileScratch>, TileForward<below>::scratch,
                                  TileForward<below>::run};
  return table;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
