// P and dS of the backward on AMX tiles: from products in fp32 to factors in bfloat16, in one pass.
#pragma once

#include "cpu/isa/amx_gemm.h"
#include "cpu/kernels/attention_bwd.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int64_t kChunkKeys = 64;  // S and dP of 32 rows: 8 KB each
constexpr int64_t kChunkElements = kMatrixRows * kChunkKeys;
constexpr int64_t kKeptBytes = 4 << 20;  // most that rows may take to be packed once per task

struct TileBackwardScratch : BackwardRows<float> {
  using Element = BFloat16;
  using Acc = float;

  static Tile tile_of(const AttentionParams& p) { return cpu_backward_matrix_tile(p.seqlen_kv); }

  TileBackwardScratch(const AttentionBwdParams& p, void* base) : arena(base) {
    tile = tile_of(p);
    take(arena, p);
    const auto [m, n] = tile;
    d_row = round_up(p.head_dim, kAmxDepth);
    dv_row = round_up(p.head_dim_v, kAmxDepth);
    const int64_t widest = max_of(d_row, dv_row), all_rows = round_up(p.rows_per_kv_head(), m);
    keeps_rows = p.pass == BwdPass::kFused && all_rows * (d_row + dv_row) * 4 <= kKeptBytes;
    const int64_t kept = keeps_rows ? all_rows : m;
    q = arena.take<BFloat16>(kept * d_row);
    dout = arena.take<BFloat16>(kept * dv_row);
    q_transposed = arena.take<BFloat16>(kept * d_row);
    dout_transposed = arena.take<BFloat16>(kept * dv_row);
    k_columns = arena.take<BFloat16>(n * d_row);
    v_columns = arena.take<BFloat16>(n * dv_row);
    k_rows = arena.take<BFloat16>(n * d_row);
    staging = arena.take<BFloat16>(m * widest);
    for (float*& s : products) s = arena.take<float>(2 * kChunkElements);
    bias = arena.take<float>(kChunkKeys);
    slope = arena.take<float>(kChunkKeys);
    p_pairs = arena.take<BFloat16>(m * n);
    ds_pairs = arena.take<BFloat16>(m * n);
    ds_rows = arena.take<BFloat16>(2 * kMatrixRows * n);
    dk = arena.take<float>(n * d_row);
    dv = arena.take<float>(n * dv_row);
    dq = arena.take<float>(dq_scratch(p, tile));
    untransposed = arena.take<float>(n * widest);
  }

  // The same scratch with the row block at `at`.
  TileBackwardScratch block(int64_t at) const {
    TileBackwardScratch t = *this;
    t.lse_log2 += at;
    t.delta += at;
    if (!keeps_rows) return t;
    t.q += at * d_row;
    t.dout += at * dv_row;
    t.q_transposed += at * d_row;
    t.dout_transposed += at * dv_row;
    return t;
  }

  Arena arena;
  int64_t d_row, dv_row;  // strides
  bool keeps_rows;        // q and dO of all rows, else of a block
  BFloat16 *q, *dout, *q_transposed, *dout_transposed, *k_columns, *v_columns, *k_rows, *staging;
  float* products[2];  // S and dP of a chunk each
  float *bias, *slope;
  BFloat16 *p_pairs, *ds_pairs, *ds_rows;
  float *dk, *dv, *dq, *untransposed;  // dk and dv transposed
};

// Rows and keys of one call of add_gradients.
struct TileBlock {
  const AttentionBwdParams& p;
  int64_t batch;
  KeyBlock keys;
  int64_t rows, depth;  // depth: rows up to a multiple of 32, elements of a column of P and dS
  TileBackwardScratch t;
};

// 32 rows of a block and up to 64 of its keys. Ascending: all keys of the first rows come first.
struct Chunk {
  int64_t row = -kMatrixRows;
  int64_t key = 0;
  KeyRange seen;  // keys of the block that some of the rows see, whole chunks

  // dS in rows: those of the 32 rows before stay until their dQ is done. Rows that see any key of a
  // block lie side by side, so the next ones are the next.
  BFloat16* ds_rows(const TileBlock& b) const {
    return b.t.ds_rows + row % (2 * kMatrixRows) * b.t.tile.block_n;
  }
  KeyBlock keys(const TileBlock& b) const {
    return {b.keys.first + key, min_of(kChunkKeys, b.keys.count - key)};
  }
};

// P and dS of the chunk's rows and some keys that they do not see.
FIL_INLINE void zero_pairs(const TileBlock& b, int64_t row, int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; key += kAmxRows) {
    const int64_t at = key * b.depth + row * kAmxRows;
    __builtin_memset(b.t.p_pairs + at, 0, kMatrixRows * kAmxRows * sizeof(BFloat16));
    __builtin_memset(b.t.ds_pairs + at, 0, kMatrixRows * kAmxRows * sizeof(BFloat16));
  }
}

// Moves on to the next chunk whose rows see any of its keys; false if there is none.
inline bool advance(const TileBlock& b, Chunk& chunk) {
  const int64_t padded = round_up(b.keys.count, kAmxDepth);
  for (chunk.key += kChunkKeys; chunk.key >= chunk.seen.end; chunk.key = chunk.seen.begin) {
    chunk.row += kMatrixRows;
    if (chunk.row >= b.rows) return false;
    // Queries ascend with the rows, and with them both ends of what they see.
    const int64_t last = min_of(chunk.row + kMatrixRows, b.rows) - 1;
    const int64_t begin = max_of<int64_t>(b.t.rows[chunk.row].visible.begin - b.keys.first, 0);
    const int64_t end = min_of(b.t.rows[last].visible.end - b.keys.first, b.keys.count);
    if (begin >= end) {
      chunk.seen = {};
      zero_pairs(b, chunk.row, 0, padded);
      continue;
    }
    chunk.seen = {begin / kChunkKeys * kChunkKeys, min_of(round_up(end, kChunkKeys), padded)};
    zero_pairs(b, chunk.row, 0, chunk.seen.begin);
    zero_pairs(b, chunk.row, chunk.seen.end, padded);
  }
  return true;
}

// Two rows of a chunk, and where their P and dS go.
struct RowPair {
  const Row* rows;
  const float *lse_log2, *delta;
  float *s, *dp;
  BFloat16 *p_pairs, *ds_pairs, *ds_even, *ds_odd;
};

enum class Scores { kVisible, kPartlyHidden, kFinished };

// P and dS of two rows and whole vectors of keys. kFinished: row_gradients has been there.
template <Scores scores>
FIL_INLINE void round_pair(const TileBlock& b, const KeyBlock& keys, const RowPair& pair) {
  constexpr int width = kWidth<float>;
  constexpr int32_t counting[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vector<float> scale_log2 = broadcast(static_cast<float>(b.p.softmax_scale * kLog2e));
  int32_t begin[2], end[2];
  for (int i = 0; i < 2; ++i) {
    const KeyRange& visible = pair.rows[i].visible;
    const int64_t last = min_of(visible.end - keys.first, keys.count);
    begin[i] = static_cast<int32_t>(max_of<int64_t>(visible.begin - keys.first, 0));
    end[i] = static_cast<int32_t>(max_of<int64_t>(last, 0));
  }
  const Vector<float> lse[] = {broadcast(pair.lse_log2[0]), broadcast(pair.lse_log2[1])};
  const Vector<float> delta[] = {broadcast(pair.delta[0]), broadcast(pair.delta[1])};
  for (int64_t c = 0; c < round_up(keys.count, kAmxDepth); c += width) {
    Vector<float> prob[2], ds[2];
    for (int i = 0; i < 2; ++i) {
      prob[i] = load(pair.s + i * kChunkKeys + c);
      ds[i] = load(pair.dp + i * kChunkKeys + c);
      if constexpr (scores == Scores::kFinished) continue;
      // P <= 1; rounding of a huge lse must not push it over.
      const Vector<float> x = min(Vector<float>{}, fma(prob[i], scale_log2, -lse[i]));
      prob[i] = exp2_short(x);
      ds[i] = prob[i] * (ds[i] - delta[i]);
      if constexpr (scores == Scores::kVisible) continue;
      const Vector<int32_t> key = load(counting) + static_cast<int32_t>(c);
      const Vector<int32_t> hidden = (key < begin[i]) | (key >= end[i]);
      prob[i] = hidden ? Vector<float>{} : prob[i];
      ds[i] = hidden ? Vector<float>{} : ds[i];
    }
    const int64_t to = c / kAmxRows * kAmxRows * b.depth + c % kAmxRows * 2;
    store_pairs(pair.p_pairs + to, prob[0], prob[1]);
    store_pairs(pair.ds_pairs + to, pair.ds_even + c, pair.ds_odd + c, ds[0], ds[1]);
  }
}

// Masks, ALiBi and softcap, in place; rows behind the last become zero.
FIL_INLINE void finish_pair(const TileBlock& b, const KeyBlock& keys, int64_t row, bool first_row,
                            const RowPair& pair) {
  const bool mask_is_shared = b.p.mask.row == 0 && b.p.mask.head == 0;
  for (int64_t i = 0; i < 2; ++i) {
    float *s = pair.s + i * kChunkKeys, *dp = pair.dp + i * kChunkKeys;
    if (row + i < b.rows) {
      row_gradients(b.p, b.batch, pair.rows[i], keys, pair.lse_log2[i], pair.delta[i], s, dp,
                    b.t.bias, mask_is_shared && (i > 0 || !first_row), b.t.slope);
    } else {
      fill_zero(s, kChunkKeys);
      fill_zero(dp, kChunkKeys);
    }
  }
}

// P and dS of a chunk from its products, and before each pair of rows its share of the queue.
FIL_INLINE void round_chunk(const TileBlock& b, const Chunk& chunk, float* products,
                            AmxQueue& queue) {
  const TileBackwardScratch& t = b.t;
  const KeyBlock keys = chunk.keys(b);
  const int64_t steps = queue.steps();
  const bool in_rows =
      b.p.softcap > 0 || b.p.alibi.slopes != nullptr || b.p.mask.type != MaskType::kNone;
  for (int64_t r = 0; r < kMatrixRows; r += 2) {
    while (queue.steps() > 0 && (steps - queue.steps()) * kMatrixRows <= r * steps) queue.step();
    const int64_t row = chunk.row + r, at = chunk.key * b.depth + row * kAmxRows;
    BFloat16* const ds_row = chunk.ds_rows(b) + r * t.tile.block_n + chunk.key;
    const RowPair pair{t.rows + row,
                       t.lse_log2 + row,
                       t.delta + row,
                       products + r * kChunkKeys,
                       products + kChunkElements + r * kChunkKeys,
                       t.p_pairs + at,
                       t.ds_pairs + at,
                       ds_row,
                       ds_row + t.tile.block_n};
    if (in_rows) {
      finish_pair(b, keys, row, r == 0, pair);
      round_pair<Scores::kFinished>(b, keys, pair);
    } else if (keys.within(pair.rows[0].visible) && keys.within(pair.rows[1].visible)) {
      round_pair<Scores::kVisible>(b, keys, pair);
    } else {
      round_pair<Scores::kPartlyHidden>(b, keys, pair);
    }
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
