// The forward of many bfloat16 rows with both products on AMX tiles; all else as in
// attention_fwd.h.
//
// A block of keys is packed once, for all rows of the task, which come by 32: S = q k^T of those,
// 16 KB that stay in the first-level cache, their softmax step in fp32, P rounded to bfloat16, and
// acc_o
// += P v. The row sums are of P before it is rounded. Rows up to a multiple of 16 behind the last
// are computed too, on whatever lies there, and never read.
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
    q_row = round_up(params.head_dim, kAmxDepth);
    s_row = round_up(block_n, kAmxDepth);
    take(arena, block_m, round_up(params.head_dim_v, 2 * kAmxRows));
    q = arena.take<BFloat16>(block_m * q_row);
    s = arena.take<float>(kMatrixRows * s_row);
    p = arena.take<BFloat16>(kMatrixRows * s_row);
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
  const TileScratch& head(int64_t) const { return *this; }  // a packed task has one

  Arena arena;
  CpuForwardPlan plan;
  int64_t q_row, s_row;  // strides
  float *s, *bias;       // of 32 rows, as is
  BFloat16 *p, *q, *k_tiles, *v_tiles, *staging;
};

FIL_INLINE void load_query(const BFloat16* q, int64_t head_dim, int64_t r, const TileScratch& t) {
  BFloat16* row = t.q + r * t.q_row;
  __builtin_memcpy(row, q, head_dim * sizeof *q);
  __builtin_memset(row + head_dim, 0, (t.q_row - head_dim) * sizeof *q);
}

// P of some rows in bfloat16, zero behind the last key.
FIL_INLINE void round_probabilities(int64_t rows, int64_t count, const TileScratch& t) {
  const int64_t padded = round_up(count, kWidth<float>), depth = round_up(count, kAmxDepth);
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = t.s + r * t.s_row;
    BFloat16* p = t.p + r * t.s_row;
    for (int64_t c = 0; c < padded; c += kWidth<float>) store_bfloat16(p + c, load(s + c));
    __builtin_memset(p + padded, 0, (depth - padded) * sizeof *p);
  }
}

// acc_o += P v of the elements of v that are NaN or inf, for the rows that see their keys: with the
// products of the finite ones, what the products of all would be.
inline void add_non_finite(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                           int64_t rows, const BFloat16* v, const TileScratch& t) {
  for (int64_t key = 0; key < keys.count; ++key, v += p.v.seqlen) {
    if (!has_non_finite<float>(1, p.head_dim_v, v, 0)) continue;
    for (int64_t r = 0; r < rows; ++r) {
      if (!sees(p, batch, t.rows[r], keys.at(key))) continue;
      for (int64_t c = 0; c < p.head_dim_v; ++c) {
        const float x = to_float(v[c]);
        if (x - x != 0) t.acc_o[r * t.o_row + c] += t.s[r * t.s_row + key] * x;
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
  bool probed = false, poisoned = false;  // V, once a row does not see all of it
  Tiles tiles(kFullTiles);  // per block: nanoseconds, and no configuration outlives its use
  for (int64_t first = 0; first < rows; first += kMatrixRows) {
    const TileScratch t = all.from(first);
    const int64_t count = min_of(rows - first, kMatrixRows);
    // Queries ascend with the rows: causal or window may hide the block from all of these.
    if (t.rows[count - 1].visible.end <= keys.first) continue;
    if (t.rows[0].visible.begin >= keys.first + keys.count) break;
    amx_gemm(tiles, count, keys.count, p.head_dim, t.q, t.q_row, t.k_tiles, t.s, t.s_row, false);
    const bool hides = softmax_block(p, batch, keys, count, t, Whole{keys.count});
    if (hides && !probed) {
      probed = true;
      poisoned = has_non_finite<float>(keys.count, p.head_dim_v, v, p.v.seqlen);
      if (poisoned) pack_values<true>(keys.count, p.head_dim_v, v, p.v.seqlen, t.v_tiles);
    }
    round_probabilities(count, keys.count, t);
    amx_gemm(tiles, count, p.head_dim_v, keys.count, t.p, t.s_row, t.v_tiles, t.acc_o, t.o_row,
             true);
    if (poisoned) add_non_finite(p, batch, keys, count, v, t);
  }
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
