// The backward of bfloat16 with its five products on AMX tiles; all else as in attention_bwd.h.
//
// Rows come by 32, keys by 64: their S = q k^T and dP = dO v^T stay in the first-level cache, and
// one pass makes of them P and dS in bfloat16. dS lies there twice: in rows, the left factor of dQ
// += dS k, and like P with two rows interleaved, as the right factors of
//
//   dV^T += dO^T P      dK^T += q^T dS
//
// over all rows of the block. These want q and dO transposed, which is less work than P and dS: a
// block has more keys than a head has dimensions. dV^T and dK^T are transposed when the keys are
// done.
//
// Rows behind the last up to a multiple of 32 have q, dO, P and dS of zero. The dS of keys behind
// the last meets zeros of k.
#pragma once

#include "cpu/isa/amx_gemm.h"
#include "cpu/kernels/attention_bwd.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int64_t kChunkKeys = 64;       // of S and dP, 8 KB each
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
    s = arena.take<float>(kMatrixRows * kChunkKeys);
    dp = arena.take<float>(kMatrixRows * kChunkKeys);
    bias = arena.take<float>(kChunkKeys);
    slope = arena.take<float>(kChunkKeys);
    p_pairs = arena.take<BFloat16>(m * n);
    ds_pairs = arena.take<BFloat16>(m * n);
    ds_rows = arena.take<BFloat16>(kMatrixRows * n);
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
  float *s, *dp, *bias, *slope;
  BFloat16 *p_pairs, *ds_pairs, *ds_rows;
  float *dk, *dv, *dq, *untransposed;  // dk and dv transposed
};

// out[count] <- scale x, rounded.
FIL_INLINE void round_row(const float* x, int64_t count, float scale, BFloat16* out) {
  constexpr int width = kWidth<float>;
  int64_t c = 0;
  for (; c + width <= count; c += width) store_bfloat16(out + c, load(x + c) * scale);
  if (c == count) return;
  BFloat16 last[width];
  store_bfloat16(last, load(x + c) * scale);
  __builtin_memcpy(out + c, last, (count - c) * sizeof *out);
}

// out[count] <- x, zeros up to `padded`.
FIL_INLINE void copy_row(const BFloat16* x, int64_t count, int64_t padded, BFloat16* out) {
  int64_t c = 0;
  for (; c + kAmxDepth <= count; c += kAmxDepth) __builtin_memcpy(out + c, x + c, 64);
  if (c == padded) return;
  __builtin_memcpy(out + c, x + c, (count - c) * sizeof *x);
  __builtin_memset(out + count, 0, (padded - count) * sizeof *x);
}

// out[cols][rows] <- x [rows, cols], multiples of 32: with two rows interleaved, a transpose of
// words.
inline void transpose_rows(int64_t rows, int64_t cols, const BFloat16* x, BFloat16* staging,
                           BFloat16* out, int64_t out_row) {
  pack_values<false>(rows, cols, x, cols, staging, 0);
  for (int64_t c = 0; c < cols; c += kAmxRows) {
    // Words as floats, which are only moved.
    transpose(rows / 2, kAmxRows, reinterpret_cast<const float*>(staging + c * rows), kAmxRows,
              reinterpret_cast<float*>(out + c * out_row), out_row / 2);
  }
}

inline float dot_product(int64_t count, const BFloat16* x, const BFloat16* y,
                         const TileBackwardScratch&) {
  constexpr int width = kWidth<float>;
  Vector<float> sum = {};
  for (int64_t c = 0; c < count; c += width) {
    const int64_t left = count - c;
    sum = left >= width
              ? fma(load_as<float>(x + c), load_as<float>(y + c), sum)
              : fma(load_part_as<float>(x + c, left), load_part_as<float>(y + c, left), sum);
  }
  return reduce_sum<float>(sum);
}

inline void load_keys(const AttentionBwdParams& p, int64_t batch, int64_t head_kv,
                      const KeyBlock& keys, const TileBackwardScratch& t) {
  const BFloat16* k = element_of<BFloat16>(p.k, batch, keys.first, head_kv);
  const BFloat16* v = element_of<BFloat16>(p.v, batch, keys.first, head_kv);
  pack_keys(keys.count, p.head_dim, k, p.k.seqlen, t.k_columns, t.staging);
  pack_keys(keys.count, p.head_dim_v, v, p.v.seqlen, t.v_columns, t.staging);
  pack_values<false>(keys.count, p.head_dim, k, p.k.seqlen, t.k_rows, 0);
}

inline void load_rows(const AttentionBwdParams& p, int64_t batch, int64_t rows, int64_t at,
                      bool first_time, const TileBackwardScratch& all) {
  const TileBackwardScratch t = all.block(at);
  const int64_t padded = round_up(rows, kMatrixRows);
  for (int64_t r = rows; r < padded; ++r) {
    t.rows[r] = {};  // sees nothing
    t.lse_log2[r] = t.delta[r] = 0;
  }
  if (t.keeps_rows && !first_time) return;
  for (int64_t r = 0; r < padded; ++r) {
    const Row& row = t.rows[r];
    const bool used = r < rows && !saw_no_key(lse_of<float>(p, batch, row));
    copy_row(element_of<BFloat16>(p.q, batch, row.query, row.head), used ? p.head_dim : 0, t.d_row,
             t.q + r * t.d_row);
    copy_row(element_of<BFloat16>(p.dout, batch, row.query, row.head), used ? p.head_dim_v : 0,
             t.dv_row, t.dout + r * t.dv_row);
  }
  if (p.pass == BwdPass::kQueries) return;
  transpose_rows(padded, t.d_row, t.q, t.staging, t.q_transposed, t.tile.block_m);
  transpose_rows(padded, t.dv_row, t.dout, t.staging, t.dout_transposed, t.tile.block_m);
}

// Two rows from r on of the 32 at hand, and where their P and dS go.
struct RowPair {
  int64_t r;
  const Row* rows;
  const float *lse_log2, *delta;
  BFloat16 *p_pairs, *ds_pairs, *ds_even, *ds_odd;
  int64_t depth;  // rows of the block: elements of a column of p_pairs
};

enum class Scores { kVisible, kPartlyHidden, kFinished };

// P and dS of two rows and whole vectors of keys. kFinished: row_gradients has been there.
template <Scores scores>
FIL_INLINE void round_gradients(float scale_log2, const KeyBlock& keys, int64_t cols,
                                const RowPair& pair, const TileBackwardScratch& t) {
  constexpr int width = kWidth<float>;
  constexpr int32_t counting[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int32_t begin[2], end[2];
  for (int i = 0; i < 2; ++i) {
    const KeyRange& visible = pair.rows[i].visible;
    const int64_t last = min_of(visible.end - keys.first, keys.count);
    begin[i] = static_cast<int32_t>(max_of<int64_t>(visible.begin - keys.first, 0));
    end[i] = static_cast<int32_t>(max_of<int64_t>(last, 0));
  }
  const Vector<float> lse[] = {broadcast(pair.lse_log2[0]), broadcast(pair.lse_log2[1])};
  const Vector<float> delta[] = {broadcast(pair.delta[0]), broadcast(pair.delta[1])};
  const float* s = t.s + pair.r * kChunkKeys;
  const float* dp = t.dp + pair.r * kChunkKeys;
  for (int64_t c = 0; c < cols; c += width) {
    Vector<float> prob[2], ds[2];
    for (int i = 0; i < 2; ++i) {
      prob[i] = load(s + i * kChunkKeys + c);
      ds[i] = load(dp + i * kChunkKeys + c);
      if constexpr (scores == Scores::kFinished) continue;
      // P <= 1; rounding of a huge lse must not push it over.
      const Vector<float> x = min(Vector<float>{}, fma(prob[i], broadcast(scale_log2), -lse[i]));
      prob[i] = exp2_short(max(broadcast(BitsOf<float>::kMinExponent), x));
      ds[i] = prob[i] * (ds[i] - delta[i]);
      if constexpr (scores == Scores::kVisible) continue;
      const Vector<int32_t> key = load(counting) + static_cast<int32_t>(c);
      const Vector<int32_t> hidden = (key < begin[i]) | (key >= end[i]);
      prob[i] = hidden ? Vector<float>{} : prob[i];
      ds[i] = hidden ? Vector<float>{} : ds[i];
    }
    const int64_t to = c / kAmxRows * kAmxRows * pair.depth + c % kAmxRows * 2;
    store_pairs(pair.p_pairs + to, prob[0], prob[1]);
    store_pairs(pair.ds_pairs + to, pair.ds_even + c, pair.ds_odd + c, ds[0], ds[1]);
  }
}

// P and dS of 32 rows, of which `rows` are there, and some keys, from their products s and dp.
inline void round_block(const AttentionBwdParams& p, int64_t batch, const KeyBlock& keys,
                        int64_t rows, RowPair pair, const TileBackwardScratch& t) {
  const int64_t cols = round_up(keys.count, kAmxDepth);
  const bool in_rows = p.softcap > 0 || p.mask.type != MaskType::kNone;
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  const float scale_log2 = static_cast<float>(p.softmax_scale * kLog2e);
  for (; pair.r < kMatrixRows; pair.r += 2) {
    if (in_rows) {
      for (int64_t i = 0; i < 2; ++i) {
        float* s = t.s + (pair.r + i) * kChunkKeys;
        float* dp = t.dp + (pair.r + i) * kChunkKeys;
        if (pair.r + i < rows) {
          row_gradients(p, batch, pair.rows[i], keys, pair.lse_log2[i], pair.delta[i], s, dp,
                        t.bias, mask_is_shared && pair.r + i > 0, t.slope);
        } else {
          fill_zero(s, cols);
          fill_zero(dp, cols);
        }
      }
      round_gradients<Scores::kFinished>(scale_log2, keys, cols, pair, t);
    } else if (keys.within(pair.rows[0].visible) && keys.within(pair.rows[1].visible)) {
      round_gradients<Scores::kVisible>(scale_log2, keys, cols, pair, t);
    } else {
      round_gradients<Scores::kPartlyHidden>(scale_log2, keys, cols, pair, t);
    }
    pair.rows += 2;
    pair.lse_log2 += 2;
    pair.delta += 2;
    pair.p_pairs += 2 * kAmxRows;
    pair.ds_pairs += 2 * kAmxRows;
    pair.ds_even += 2 * t.tile.block_n;
    pair.ds_odd += 2 * t.tile.block_n;
  }
}

// P and dS of 32 rows where they see none of some keys.
FIL_INLINE void zero_block(int64_t cols, const RowPair& pair, const TileBackwardScratch& t) {
  constexpr int64_t tile_bytes = kMatrixRows * kAmxRows * sizeof(BFloat16);
  for (int64_t c = 0; c < cols; c += kAmxRows) {
    __builtin_memset(pair.p_pairs + c * pair.depth, 0, tile_bytes);
    __builtin_memset(pair.ds_pairs + c * pair.depth, 0, tile_bytes);
  }
  for (int64_t r = 0; r < kMatrixRows; ++r) {
    __builtin_memset(pair.ds_even + r * t.tile.block_n, 0, cols * sizeof(BFloat16));
  }
}

// P and dS of 32 rows from `first` on and all keys of the block.
inline void differentiate_scores(Tiles& tiles, const AttentionBwdParams& p, int64_t batch,
                                 const KeyBlock& keys, int64_t first, int64_t rows,
                                 const TileBackwardScratch& t) {
  const int64_t n = t.tile.block_n, depth = round_up(rows, kAmxDepth);
  // Queries ascend with the rows, and with them both ends of what they see.
  const int64_t begin = t.rows[first].visible.begin;
  const int64_t end = t.rows[min_of(first + kMatrixRows, rows) - 1].visible.end;
  for (int64_t col = 0; col < keys.count; col += kChunkKeys) {
    const KeyBlock chunk{keys.first + col, min_of(kChunkKeys, keys.count - col)};
    const int64_t cols = round_up(chunk.count, kAmxDepth);
    const int64_t to = col * depth + first * kAmxRows;
    const RowPair pair{0,
                       t.rows + first,
                       t.lse_log2 + first,
                       t.delta + first,
                       t.p_pairs + to,
                       t.ds_pairs + to,
                       t.ds_rows + col,
                       t.ds_rows + n + col,
                       depth};
    if (end <= chunk.first || begin >= chunk.first + chunk.count) {
      zero_block(cols, pair, t);
      continue;
    }
    amx_gemm(tiles, kMatrixRows, cols, p.head_dim, t.q + first * t.d_row, t.d_row,
             t.k_columns + col * t.d_row, t.s, kChunkKeys, false);
    amx_gemm(tiles, kMatrixRows, cols, p.head_dim_v, t.dout + first * t.dv_row, t.dv_row,
             t.v_columns + col * t.dv_row, t.dp, kChunkKeys, false);
    round_block(p, batch, chunk, rows - first, pair, t);
  }
}

inline void add_gradients(const AttentionBwdParams& p, int64_t batch, const KeyBlock& keys,
                          int64_t rows, int64_t at, float* dq, int64_t dq_row,
                          const TileBackwardScratch& all) {
  const TileBackwardScratch t = all.block(at);
  const auto [m, n] = t.tile;
  const int64_t depth = round_up(rows, kAmxDepth);
  Tiles tiles(kFullTiles);  // per block: nanoseconds, and no configuration outlives its use
  for (int64_t first = 0; first < rows; first += kMatrixRows) {
    differentiate_scores(tiles, p, batch, keys, first, rows, t);
    if (p.pass == BwdPass::kKeys) continue;
    amx_gemm(tiles, kMatrixRows, p.head_dim, keys.count, t.ds_rows, n, t.k_rows,
             dq + first * dq_row, dq_row, true);
  }
  if (p.pass == BwdPass::kQueries) return;
  const int64_t seen = min_of(t.rows[rows - 1].visible.end - keys.first, keys.count);
  const auto add = [&, m = m, n = n](int64_t col, int64_t width, const BFloat16* left,
                                     const BFloat16* right, float* sum) {
    for (int64_t d = 0; d < width; d += kMatrixRows) {
      amx_gemm(tiles, kMatrixRows, 2 * kAmxRows, depth, left + d * m, m, right + col * depth,
               sum + d * n + col, n, true);
    }
  };
  for (int64_t col = 0; col < seen; col += 2 * kAmxRows) {
    add(col, p.head_dim_v, t.dout_transposed, t.p_pairs, t.dv);
    add(col, p.head_dim, t.q_transposed, t.ds_pairs, t.dk);
  }
}

inline void start_keys(const TileBackwardScratch& t) {
  fill_zero(t.dk, t.tile.block_n * t.d_row);
  fill_zero(t.dv, t.tile.block_n * t.dv_row);
}

inline void store_keys(const AttentionBwdParams& p, int64_t batch, int64_t head_kv,
                       const KeyBlock& keys, const TileBackwardScratch& t) {
  const auto store = [&](const float* sum, int64_t stride, int64_t width, double scale,
                         const Strided<void*>& out) {
    transpose(stride, t.tile.block_n, sum, t.tile.block_n, t.untransposed, stride);
    for (int64_t j = 0; j < keys.count; ++j) {
      round_row(t.untransposed + j * stride, width, static_cast<float>(scale),
                element_of<BFloat16>(out, batch, keys.first + j, head_kv));
    }
  };
  store(t.dk, t.d_row, p.head_dim, p.softmax_scale, p.dk);
  store(t.dv, t.dv_row, p.head_dim_v, 1, p.dv);
}

inline void store_query(const AttentionBwdParams& p, const float* dq, BFloat16* out,
                        const TileBackwardScratch&) {
  round_row(dq, p.head_dim, static_cast<float>(p.softmax_scale), out);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
