// Flash-Decoding of the few bfloat16 rows of a group with both products on AMX tiles.
//
// What costs is reading K and V, once. A tile takes 16 rows of K as they lie: S^T = K q^T, with q
// packed as the right factor, is transposed on its way to the softmax, which is that of
// attention_tiles.h. Of V two rows are interleaved into scratch memory for acc_o += P v. While a
// head's block is multiplied, the next one's is fetched into the second-level cache.
#pragma once

#include "cpu/kernels/attention_tiles.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

struct FewRowsScratch : RowState<float> {
  using Element = BFloat16;
  using Acc = float;
  static constexpr int64_t least_tile_rows = kLeastTileRows;
  static constexpr int64_t first_keys = kMatrixKeysInPlace;

  FewRowsScratch(const AttentionFwdParams& params, void* base) : arena(base) {
    plan = forward_plan<FewRowsScratch>(params);
    q_row = round_up(params.head_dim, kAmxDepth);
    s_row = round_up(plan.tile.block_n, kAmxDepth);
    take(arena, params.heads_per_task * kAmxRows, round_up(params.head_dim_v, 2 * kAmxRows));
    q_tiles = arena.take<BFloat16>(params.heads_per_task * kAmxRows * q_row);
    transposed = arena.take<float>(kAmxRows * s_row);
    s = arena.take<float>(kAmxRows * s_row);
    p = arena.take<BFloat16>(kAmxRows * s_row);
    bias = arena.take<float>(s_row);
    v_tiles = arena.take<BFloat16>(s_row * o_row);
    staging = arena.take<BFloat16>(2 * kAmxRows * q_row);
    offset = arena.take<int64_t>(params.block_table.pages ? 4 * plan.tile.block_n : 0);
  }

  FewRowsScratch head(int64_t i) const {
    FewRowsScratch t = *this;
    t.skip(i * kAmxRows);
    t.q_tiles += i * kAmxRows * q_row;
    return t;
  }

  Arena arena;
  CpuForwardPlan plan;
  int64_t q_row, s_row;  // strides; q_row is the depth that q and K are padded to
  float *transposed, *s, *bias;
  BFloat16 *p, *q_tiles, *v_tiles, *staging;
  int64_t* offset;  // in a paged cache: of a block's keys and the next's in k, then in v
};

// Column r of q^T as tiles, zero behind head_dim. Columns without a row hold anything: they make
// rows of S that nobody reads.
FIL_INLINE void load_query(const BFloat16* q, int64_t head_dim, int64_t r,
                           const FewRowsScratch& t) {
  for (int64_t d = 0; d < t.q_row; ++d) {
    const int64_t pair = d / 2 * kAmxRows + r;
    t.q_tiles[2 * pair + d % 2] = d < head_dim ? q[d] : BFloat16{};
  }
}

// Whether a tile's rows lie evenly: a paged cache's do within a page.
FIL_INLINE bool lie_evenly(Rows<BFloat16> rows) {
  bool even = true;
  for (int64_t i = 1; rows.offset && i < kAmxRows; ++i) {
    even &= rows.offset[i] - rows.offset[i - 1] == rows.stride;
  }
  return even;
}

// The rows of K for a tile: in place where they are whole and lie evenly, else beside zeros.
FIL_INLINE Rows<BFloat16> key_rows(Rows<BFloat16> k, int64_t count, int64_t head_dim, int64_t q_row,
                                   BFloat16* staging) {
  if (count >= kAmxRows && head_dim == q_row && lie_evenly(k)) return {k[0], k.stride};
  __builtin_memset(staging, 0, kAmxRows * q_row * sizeof(BFloat16));
  for (int64_t i = 0; i < min_of<int64_t>(count, kAmxRows); ++i) {
    __builtin_memcpy(staging + i * q_row, k[i], head_dim * sizeof(BFloat16));
  }
  return {staging, q_row};
}

// s[rows, count] <- q k^T of one head. The sums of all keys are transposed in the end, when those
// of the first have long been stored.
FIL_INLINE void few_rows_scores(Tiles& tiles, int64_t rows, int64_t count, Rows<BFloat16> k,
                                int64_t head_dim, Rows<BFloat16> next, const FewRowsScratch& t) {
  for (int64_t first = 0; first < count; first += 2 * kAmxRows) {
    const int64_t second = first + kAmxRows;
    const Rows<BFloat16> upper =
        key_rows(k.from(first), count - first, head_dim, t.q_row, t.staging);
    const Rows<BFloat16> lower =
        key_rows(k.from(second), count - second, head_dim, t.q_row, t.staging + kAmxRows * t.q_row);
    Tiles::fence();
    tiles.zero<0>();
    tiles.zero<2>();
    for (int64_t d = 0; d < t.q_row; d += kAmxDepth) {
      tiles.load<4>(upper.data + d, upper.stride * int64_t{sizeof(BFloat16)});
      tiles.load<6>(t.q_tiles + d * kAmxRows, 64);
      tiles.multiply<0, 4, 6>();
      tiles.load<5>(lower.data + d, lower.stride * int64_t{sizeof(BFloat16)});
      tiles.multiply<2, 5, 6>();
    }
    for (int64_t i = 0; i < 2 * kAmxRows; ++i) {
      prefetch_row(next[min_of(first + i, count - 1)], head_dim);
    }
    tiles.store<0>(t.transposed + first * kAmxRows, 64);
    tiles.store<2>(t.transposed + second * kAmxRows, 64);
    Tiles::fence();
  }
  transpose(round_up(count, kAmxRows), round_up(rows, 8), t.transposed, kAmxRows, t.s, t.s_row);
}

// The rows that follow a block's in x, to be fetched: behind the last, any of the cache.
FIL_INLINE Rows<BFloat16> rows_behind(const AttentionParams& p, const Strided<const void*>& x,
                                      int64_t batch, const KeyBlock& keys, int64_t head,
                                      int64_t* offset) {
  const int64_t first = keys.first + keys.count;
  if (p.block_table.pages == nullptr)
    return {element_of<BFloat16>(x, batch, first, head), x.seqlen};
  const int64_t last = p.block_table.row * p.block_table.page_size - 1;
  for (int64_t c = 0; c < keys.count; ++c) {
    offset[c] = slot_offset(p, x, batch, min_of(first + c, last));
  }
  return {element_of<BFloat16>(x, 0, 0, head), x.seqlen, offset};
}

// A block's rows of K or V, head after head, and those that will be read after them.
class HeadRows {
 public:
  FIL_INLINE HeadRows(const AttentionFwdParams& p, const Strided<const void*>& x, int64_t batch,
                      const KeyBlock& keys, int64_t first_head, int64_t* offset)
      : head_(x.head),
        rows_(rows_of<BFloat16>(p, x, batch, keys, first_head, offset)),
        behind_(rows_behind(p, x, batch, keys, first_head, offset + keys.count)) {}

  FIL_INLINE Rows<BFloat16> of(int64_t h) const {
    Rows<BFloat16> rows = rows_;
    rows.data += h * head_;
    return rows;
  }
  FIL_INLINE Rows<BFloat16> after(int64_t h, int64_t heads) const {
    return h + 1 < heads ? of(h + 1) : behind_;
  }

 private:
  int64_t head_;
  Rows<BFloat16> rows_, behind_;
};

inline void attend(const AttentionFwdParams& p, int64_t batch, int64_t first_head, int64_t heads,
                   const KeyBlock& keys, int64_t rows, const FewRowsScratch& all) {
  const bool mask_is_shared = p.mask.row == 0 && p.mask.head == 0;
  const int64_t depth = round_up(keys.count, kAmxDepth);
  const HeadRows k_rows(p, p.k, batch, keys, first_head, all.offset);
  const HeadRows v_rows(p, p.v, batch, keys, first_head, all.offset + 2 * keys.count);
  Tiles tiles(kFullTiles);
  for (int64_t h = 0; h < heads; ++h) {
    const FewRowsScratch t = all.head(h);
    few_rows_scores(tiles, rows, keys.count, k_rows.of(h), p.head_dim, k_rows.after(h, heads), t);
    bool hides = false;
    for (int64_t r = 0; r < rows; ++r) {
      hides |= tile_row(p, batch, keys, r, t, mask_is_shared && r > 0, nullptr);
    }
    const Rows<BFloat16> v = v_rows.of(h);
    if (hides && has_non_finite<float>(keys.count, p.head_dim_v, v)) {
      pack_values<true>(keys.count, p.head_dim_v, v, t.v_tiles);
      add_non_finite(p, batch, first_head + h, keys, rows, t);
    } else {
      const Rows<BFloat16> next = v_rows.after(h, heads);
      pack_values<false>(keys.count, p.head_dim_v, v, t.v_tiles, &next);
    }
    amx_gemm(tiles, rows, p.head_dim_v, depth, t.p, t.s_row, t.v_tiles, t.acc_o, t.o_row, true);
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
