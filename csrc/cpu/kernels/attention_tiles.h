// The forward of many bfloat16 rows with both products on AMX tiles; all else as in
// attention_fwd.h.
//
// A long block of keys is packed once, for all rows of the task. These come by 32 and pass along
// the block in units of kMatrixKeys keys: S = q k^T, its softmax step in fp32, P rounded to
// bfloat16, acc_o += P v. The tile products of the next unit's S and of the last one's acc_o run
// beside the softmax of the one between, in another part of the core. The row sums are of P before
// it is rounded. Rows up to a multiple of 16 behind the last are computed too, on whatever lies
// there, and never read.
#pragma once

#include "cpu/isa/amx_gemm.h"
#include "cpu/kernels/attention_fwd.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

struct TileScratch : RowState<float> {
  using Element = BFloat16;
  using Acc = float;
  static constexpr int64_t least_tile_rows = kLeastTileRows;
  static constexpr int64_t first_keys = kMatrixKeys;

  TileScratch(const AttentionFwdParams& params, void* base) : arena(base) {
    plan = forward_plan<TileScratch>(params);
    const int64_t block_m = round_up(plan.tile.block_m, kMatrixRows), block_n = plan.tile.block_n;
    head_dim = params.head_dim;
    head_dim_v = params.head_dim_v;
    q_row = round_up(params.head_dim, kAmxDepth);
    s_row = kMatrixKeys;
    take(arena, block_m, round_up(params.head_dim_v, 2 * kAmxRows));
    q = arena.take<BFloat16>(block_m * q_row);
    s = arena.take<float>(2 * kMatrixRows * s_row);
    p = arena.take<BFloat16>(2 * kMatrixRows * s_row);
    bias = arena.take<float>(s_row);
    k_tiles = arena.take<BFloat16>(round_up(block_n, kAmxDepth) * q_row);
    v_tiles = arena.take<BFloat16>(round_up(block_n, kAmxDepth) * o_row);
    staging = arena.take<BFloat16>(kAmxRows * q_row);
    offset = arena.take<int64_t>(params.block_table.pages ? 2 * block_n : 0);
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
  int64_t v_depth = 0;                         // keys of the block, as V is packed
  float *s, *bias;                             // two of 32 rows, as are
  BFloat16 *p, *q, *k_tiles, *v_tiles, *staging;
  int64_t* offset;  // of a block's keys in a paged cache: in k, then in v
};

FIL_INLINE void load_query(const BFloat16* q, int64_t head_dim, int64_t r, const TileScratch& t) {
  BFloat16* row = t.q + r * t.q_row;
  __builtin_memcpy(row, q, head_dim * sizeof *q);
  __builtin_memset(row + head_dim, 0, (t.q_row - head_dim) * sizeof *q);
}

// 32 rows of a task and up to kMatrixKeys keys of a packed block: the unit of work, whose products
// run beside the softmax of its neighbours.
struct TileUnit {
  TileScratch t;  // from its first row on
  int64_t first_row;
  int64_t rows;              // 0: there is none
  int64_t first_key;         // in the block
  KeyBlock keys;             // from there on, that its rows see, rounded up
  bool finite_only = false;  // the V that they meet has zeros for NaN and inf

  FIL_INLINE AmxProduct scores() const {
    return {rows,    keys.count, t.head_dim, t.q,  t.q_row, t.k_tiles + first_key * t.q_row,
            t.q_row, t.s,        t.s_row,    false};
  }
  FIL_INLINE AmxProduct values() const {
    return {rows,      t.head_dim_v, keys.count, t.p, t.s_row, t.v_tiles + first_key * kAmxRows,
            t.v_depth, t.acc_o,      t.o_row,    true};
  }
};

// The unit of the rows from first_row on and the keys from first_key on, or the next behind it.
// Queries ascend with the rows: causal or window hide the first or last units of each 32, and the
// first or last keys of the units that are left.
FIL_INLINE TileUnit unit_from(int64_t first_row, int64_t first_key, int64_t rows,
                              const KeyBlock& block, const TileScratch& all) {
  for (; first_row < rows; first_row += kMatrixRows, first_key = 0) {
    const int64_t count = min_of(rows - first_row, kMatrixRows);
    const int64_t begin = all.rows[first_row].visible.begin - block.first;
    const int64_t end =
        min_of(all.rows[first_row + count - 1].visible.end - block.first, block.count);
    first_key = max_of(first_key, begin / kMatrixKeys * kMatrixKeys);
    if (first_key >= end) continue;
    const int64_t seen_end =
        min_of(min_of(round_up(end, kAmxDepth), block.count), first_key + kMatrixKeys);
    first_key = max_of(first_key, begin / kAmxDepth * kAmxDepth);
    const KeyBlock keys{block.first + first_key, seen_end - first_key};
    return {all.from(first_row), first_row, count, first_key, keys};
  }
  return {all, 0, 0, 0, block};
}

// Where P of a row goes: rounded to bfloat16. settle() finishes the products that are on their way
// to the row's accumulator.
struct RoundedRow {
  BFloat16* to;
  AmxQueue* pending;  // or none
  FIL_INLINE void operator()(int64_t c, Vector<float> e) const { store_bfloat16(to + c, e); }
  static FIL_INLINE Vector<float> power(Vector<float> x, float scale, float base) {
    return exp2_short(x * scale - base);
  }
  FIL_INLINE RoundedRow from(int64_t c) const { return {to + c, pending}; }
  FIL_INLINE void settle() const {
    if (pending != nullptr) pending->finish();
  }
};

// P of row r, zero behind the last key. Returns whether a key is hidden from it.
template <class Scratch>
FIL_INLINE bool tile_row(const AttentionFwdParams& p, int64_t batch, const KeyBlock& keys,
                         int64_t r, const Scratch& t, bool bias_is_loaded, AmxQueue* pending) {
  const int64_t padded = round_up(keys.count, kWidth<float>);
  BFloat16* to = t.p + r * t.s_row;
  const bool hides = row_probabilities<float>(p, batch, keys, r, t, t.s + r * t.s_row, t.bias,
                                              bias_is_loaded, RoundedRow{to, pending});
  __builtin_memset(to + padded, 0, (round_up(keys.count, kAmxDepth) - padded) * sizeof *to);
  return hides;
}

// acc_o += P v of the elements of v that are NaN or inf, for the rows that see their keys: with the
// products of the finite ones, what the products of all would be.
template <class Scratch>
void add_non_finite(const AttentionFwdParams& p, int64_t batch, int64_t head_kv,
                    const KeyBlock& keys, int64_t rows, const Scratch& t) {
  for (int64_t key = 0; key < keys.count; ++key) {
    const BFloat16* v = slot_of<BFloat16>(p, p.v, batch, keys.at(key), head_kv);
    if (!has_non_finite<float>(1, p.head_dim_v, Rows<BFloat16>{v, 0})) continue;
    for (int64_t r = 0; r < rows; ++r) {
      if (!sees(p, batch, t.rows[r], keys.at(key))) continue;
      const float probability = to_float(t.p[r * t.s_row + key]);
      for (int64_t c = 0; c < p.head_dim_v; ++c) {
        const float x = to_float(v[c]);
        if (x - x != 0) t.acc_o[r * t.o_row + c] += probability * x;
      }
    }
  }
}

// A packed task has one head.
inline void attend(const AttentionFwdParams& p, int64_t batch, int64_t head_kv, int64_t,
                   const KeyBlock& block, int64_t rows, TileScratch all) {
  const Rows<BFloat16> k = rows_of<BFloat16>(p, p.k, batch, block, head_kv, all.offset);
  const Rows<BFloat16> v =
      rows_of<BFloat16>(p, p.v, batch, block, head_kv, all.offset + all.plan.tile.block_n);
  pack_keys(block.count, p.head_dim, k, all.k_tiles, all.staging);
  pack_values<false>(block.count, p.head_dim_v, v, all.v_tiles);
  all.v_depth = round_up(block.count, kAmxDepth);
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  bool probed = false, poisoned = false;  // V, once a row does not see all of it
  Tiles tiles(kFullTiles);  // per block: nanoseconds, and no configuration outlives its use
  AmxQueue queue(tiles);
  int64_t turn = 0;  // of two buffers for S and P
  TileUnit before{all, 0, 0, 0, block}, now = unit_from(0, 0, rows, block, all);
  const auto finish = [&] {
    queue.finish();
    if (before.rows == 0 || !before.finite_only) return;
    add_non_finite(p, batch, head_kv, before.keys, before.rows, before.t);
  };
  if (now.rows > 0) queue.add(now.scores());
  queue.finish();
  while (now.rows > 0) {
    const TileUnit next =
        unit_from(now.first_row, now.first_key / kMatrixKeys * kMatrixKeys + kMatrixKeys, rows,
                  block, all.turned(turn ^= 1));
    if (next.rows > 0) queue.add(next.scores());
    if (before.rows > 0) queue.add(before.values());
    const bool same_rows = before.rows > 0 && before.first_row == now.first_row;
    const int64_t steps = queue.steps();
    bool hides = false;
    for (int64_t r = 0; r < now.rows; ++r) {
      while (queue.steps() > 0 && (steps - queue.steps()) * now.rows <= r * steps) queue.step();
      hides |= tile_row(p, batch, now.keys, r, now.t, mask_is_shared && r > 0,
                        same_rows ? &queue : nullptr);
    }
    finish();
    if (hides && !probed) {
      probed = true;
      poisoned = has_non_finite<float>(block.count, p.head_dim_v, v);
      if (poisoned) pack_values<true>(block.count, p.head_dim_v, v, all.v_tiles);
    }
    before = now;
    before.finite_only = poisoned;
    now = next;
  }
  if (before.rows > 0) queue.add(before.values());
  finish();
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
