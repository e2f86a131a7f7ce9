// The backward of bfloat16 with its five products on AMX tiles; all else as in attention_bwd.h.
//
// Rows come by 32, keys by 64: their S = q k^T and dP = dO v^T stay in the first-level cache, and
// one pass, tile_gradients.h, makes of them P and dS in bfloat16 while the next are multiplied. dS
// lies there twice: in rows, the left factor of dQ
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

#include "cpu/kernels/tile_gradients.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

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
  pack_values<false>(rows, cols, {x, cols}, staging);
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
  const Rows<BFloat16> k{element_of<BFloat16>(p.k, batch, keys.first, head_kv), p.k.seqlen};
  const Rows<BFloat16> v{element_of<BFloat16>(p.v, batch, keys.first, head_kv), p.v.seqlen};
  pack_keys(keys.count, p.head_dim, k, t.k_columns, t.staging);
  pack_keys(keys.count, p.head_dim_v, v, t.v_columns, t.staging);
  pack_values<false>(keys.count, p.head_dim, k, t.k_rows);
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

// S and dP of a chunk.
FIL_INLINE void add_products(const TileBlock& b, const Chunk& chunk, float* products,
                             AmxQueue& queue) {
  const TileBackwardScratch& t = b.t;
  const int64_t count = chunk.keys(b).count;
  queue.add({kMatrixRows, count, b.p.head_dim, t.q + chunk.row * t.d_row, t.d_row,
             t.k_columns + chunk.key * t.d_row, t.d_row, products, kChunkKeys, false});
  queue.add({kMatrixRows, count, b.p.head_dim_v, t.dout + chunk.row * t.dv_row, t.dv_row,
             t.v_columns + chunk.key * t.dv_row, t.dv_row, products + kChunkElements, kChunkKeys,
             false});
}

// dQ of the 32 rows of a chunk that was their last.
FIL_INLINE AmxProduct dq_product(const TileBlock& b, const Chunk& chunk, float* dq,
                                 int64_t dq_row) {
  const auto& [begin, end] = chunk.seen;
  return {kMatrixRows,
          b.p.head_dim,
          end - begin,
          chunk.ds_rows(b) + begin,
          b.t.tile.block_n,
          b.t.k_rows + begin * kAmxRows,
          round_up(b.keys.count, kAmxDepth),
          dq + chunk.row * dq_row,
          dq_row,
          true};
}

// dV^T and dK^T, 32 keys at a time: what they read of P and dS stays in the first-level cache.
inline void add_dk_dv(Tiles& tiles, const TileBlock& b) {
  const TileBackwardScratch& t = b.t;
  const auto [m, n] = t.tile;
  const int64_t seen = min_of(t.rows[b.rows - 1].visible.end - b.keys.first, b.keys.count);
  const auto add = [&, m = m, n = n](int64_t key, int64_t width, const BFloat16* left,
                                     const BFloat16* right, float* sum) {
    for (int64_t d = 0; d < width; d += kMatrixRows) {
      amx_gemm(tiles, kMatrixRows, 2 * kAmxRows, b.depth, left + d * m, m, right + key * b.depth,
               sum + d * n + key, n, true);
    }
  };
  for (int64_t key = 0; key < seen; key += 2 * kAmxRows) {
    add(key, b.p.head_dim_v, t.dout_transposed, t.p_pairs, t.dv);
    add(key, b.p.head_dim, t.q_transposed, t.ds_pairs, t.dk);
  }
}

inline void add_gradients(const AttentionBwdParams& p, int64_t batch, const KeyBlock& keys,
                          int64_t rows, int64_t at, float* dq, int64_t dq_row,
                          const TileBackwardScratch& t) {
  const TileBlock b{p, batch, keys, rows, round_up(rows, kAmxDepth), t.block(at)};
  Tiles tiles(kFullTiles);  // per block: nanoseconds, and no configuration outlives its use
  AmxQueue queue(tiles);
  Chunk chunk;
  bool more = advance(b, chunk);
  if (more) add_products(b, chunk, t.products[0], queue);
  queue.finish();
  Chunk before;
  bool owes_dq = false;  // of the rows of `before`
  for (int side = 0; more; side ^= 1) {
    Chunk next = chunk;
    more = advance(b, next);
    // The processor multiplies the next chunk and the rows before while it rounds this one.
    if (more) add_products(b, next, t.products[side ^ 1], queue);
    if (owes_dq) queue.add(dq_product(b, before, dq, dq_row));
    round_chunk(b, chunk, t.products[side], queue);
    queue.finish();
    owes_dq = p.pass != BwdPass::kKeys && (!more || next.row != chunk.row);
    before = chunk;
    chunk = next;
  }
  if (owes_dq) queue.add(dq_product(b, before, dq, dq_row));
  queue.finish();
  if (p.pass != BwdPass::kQueries) add_dk_dv(tiles, b);
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
