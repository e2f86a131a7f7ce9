// flat_gemm in bfloat16 on AMX tiles: out^T = weight x^T.
//
// 16 rows of the weight by 32 of K are a left factor as they lie, so that the weight goes from
// memory into tiles, once and uncopied. x is packed as the right factor, up to 64 rows at a time:
//
//   panel of 256 weight rows        its sums, 64 KB, wait in the second-level cache
//     block of up to 2048 of K      x's, 256 KB, comes from there for each group
//       group of 32 weight rows     read while the next one is fetched, 128 KB each
//         32 rows of x              four tiles of sums and two of either factor
//
// A tile adds products up in the order of K and keeps its bits while it waits, so that a sum
// depends on its row of x and its row of the weight alone: on no block, group or task.
#pragma once

#include "cpu/isa/tile_config.h"
#include "cpu/kernels/flat_linear.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int64_t kTileElements = kAmxRows * kAmxDepth;  // bfloat16 of a factor's tile
constexpr int64_t kTileSums = kAmxRows * kAmxRows;
constexpr int64_t kGroupRows = 2 * kAmxRows;
constexpr int64_t kPanelRows = 8 * kGroupRows;
constexpr int64_t kTileBlockK = 2048;  // at most

struct FlatTileScratch {
  int64_t rows, columns;   // of x, and of tiles that hold them
  int64_t depth, block_k;  // multiples of a tile's
  int64_t group_sums;
  BFloat16 *x, *staging;
  float *sums, *total, *bias;

  FlatTileScratch(const FlatLinearParams& p, Arena& arena)
      : rows(min_of(p.m, kFlatRows)),
        columns(ceil_div(rows, kAmxRows)),
        depth(max_of<int64_t>(round_up(p.k, kAmxDepth), kAmxDepth)),
        block_k(round_up(ceil_div(depth, ceil_div(depth, kTileBlockK)), kAmxDepth)),
        group_sums(2 * columns * kTileSums),
        x(arena.take<BFloat16>(columns * kAmxRows * depth)),
        staging(arena.take<BFloat16>(2 * kTileElements)),
        sums(arena.take<float>(kPanelRows / kGroupRows * group_sums)),
        total(arena.take<float>(columns * kAmxRows * kGroupRows)),
        bias(arena.take<float>(kGroupRows)) {}
};

// to[kRows, 32] <- a chunk of `rows` rows, `count` elements each, and zeros for the others: in the
// same tile as those, a zero meets what belongs to no sum that is written.
template <int64_t kRows>
FIL_INLINE void stage(int64_t rows, int64_t count, const BFloat16* from, int64_t from_row,
                      BFloat16* to) {
  for (int64_t r = 0; r < kRows; ++r, from += from_row, to += kAmxDepth) {
    if (r < rows && count >= kAmxDepth) {
      __builtin_memcpy(to, from, kAmxDepth * sizeof *to);
    } else {
      __builtin_memset(to, 0, kAmxDepth * sizeof *to);
      if (r < rows) __builtin_memcpy(to, from, count * sizeof *to);
    }
  }
}

FIL_INLINE const BFloat16* weight_at(const FlatLinearParams& p, int64_t n, int64_t k) {
  return static_cast<const BFloat16*>(p.weight) + n * p.weight_row + k;
}

// The first row of the group for out's columns [n, end): one that is not whole starts earlier, and
// computes some sums again.
FIL_INLINE int64_t group_at(int64_t n, int64_t end) {
  return max_of<int64_t>(min_of(n, end - kGroupRows), 0);
}

// A group's block that comes next, on its way into the second-level cache. Its tiles read a line of
// 32 rows by turns, more streams than the hardware's prefetchers follow; this asks for it in four
// runs of rows, side by side.
struct NextGroup {
  static constexpr int64_t kRuns = 4, kRunRows = kGroupRows / kRuns;

  const char* at = nullptr;
  int64_t row = 0, bytes = 0;  // stride, and of a row
  int64_t rows = 0, done = 0;  // left, and bytes of the row

  NextGroup() = default;
  NextGroup(const FlatLinearParams& p, const FlatTileScratch& s, int64_t n, int64_t end, int64_t k)
      : at(reinterpret_cast<const char*>(weight_at(p, group_at(n, end), k))),
        row(p.weight_row * int64_t{sizeof(BFloat16)}),
        bytes(min_of(p.k - k, s.block_k) * int64_t{sizeof(BFloat16)}),
        rows(p.n < kGroupRows ? 0 : kRunRows) {}

  // A line of each run, `times` over. A block is kRunRows such for each step along K.
  FIL_INLINE void fetch(int64_t times) {
    for (; times > 0 && rows > 0; --times) {
#pragma GCC unroll 4
      for (int run = 0; run < kRuns; ++run) {
        __builtin_prefetch(at + done + run * kRunRows * row, 0, 2);
      }
      done += 64;
      if (done < bytes) continue;
      done = 0;
      at += row;
      --rows;
    }
  }
};

// s.x <- the rows [first, first + rows) of x as a right factor: a column of tiles holds 16 of them,
// one tile for every 32 of K, in which a word is a pair of elements along K.
inline void pack_x(const FlatLinearParams& p, int64_t first, int64_t rows, const FlatTileScratch& s,
                   NextGroup next) {
  BFloat16* to = s.x;
  for (int64_t r = 0; r < rows; r += kAmxRows) {
    const BFloat16* x = static_cast<const BFloat16*>(p.x) + (first + r) * p.x_row;
    for (int64_t k = 0; k < p.k; k += kAmxDepth, to += kTileElements) {
      next.fetch(NextGroup::kRunRows / s.columns);
      stage<kAmxRows>(min_of<int64_t>(rows - r, kAmxRows), p.k - k, x + k, p.x_row, s.staging);
      // Words as floats, which are only moved.
      transpose(kAmxRows, kAmxRows, reinterpret_cast<const float*>(s.staging), kAmxRows,
                reinterpret_cast<float*>(to), kAmxRows);
    }
  }
}

template <bool two_columns>
FIL_INLINE void tile_step(Tiles& tiles, const BFloat16* a, int64_t a_row, const BFloat16* b,
                          int64_t b_column) {
  const int64_t bytes = a_row * int64_t{sizeof *a};
  tiles.load<4>(a, bytes);
  tiles.load<6>(b, 64);
  if constexpr (two_columns) tiles.load<7>(b + b_column, 64);
  tiles.multiply<0, 4, 6>();
  if constexpr (two_columns) tiles.multiply<1, 4, 7>();
  tiles.load<5>(a + kAmxRows * a_row, bytes);
  tiles.multiply<2, 5, 6>();
  if constexpr (two_columns) tiles.multiply<3, 5, 7>();
}

// sums (+)= the block at k of the group at `at` times one or two columns of x's tiles.
template <bool two_columns>
void multiply_block(Tiles& tiles, const FlatLinearParams& p, const FlatTileScratch& s, int64_t at,
                    int64_t k, int64_t column, float* sums, int64_t fetches, NextGroup& shared) {
  const BFloat16* a = weight_at(p, at, k);
  const BFloat16* b = s.x + (column * s.depth + k) * kAmxRows;
  const BFloat16* const end = a + min_of(p.k - k, s.block_k);
  const int64_t b_column = s.depth * kAmxRows;
  NextGroup next = shared;
  sums += column * 2 * kTileSums;
  Tiles::fence();
  if (k == 0) {
    tiles.zero<0>();
    tiles.zero<2>();
    if constexpr (two_columns) tiles.zero<1>();
    if constexpr (two_columns) tiles.zero<3>();
  } else {
    tiles.load<0>(sums, 64);
    tiles.load<2>(sums + kTileSums, 64);
    if constexpr (two_columns) tiles.load<1>(sums + 2 * kTileSums, 64);
    if constexpr (two_columns) tiles.load<3>(sums + 3 * kTileSums, 64);
  }
  const int64_t in_place = p.n < kGroupRows ? 0 : (end - a) / kAmxDepth;
  for (int64_t step = 0; step < in_place; ++step, a += kAmxDepth, b += kTileElements) {
    next.fetch(fetches);
    tile_step<two_columns>(tiles, a, p.weight_row, b, b_column);
  }
  // A tile would read what is not there.
  for (; a < end; a += kAmxDepth, b += kTileElements) {
    stage<kGroupRows>(p.n - at, end - a, a, p.weight_row, s.staging);
    Tiles::fence();
    tile_step<two_columns>(tiles, s.staging, kAmxDepth, b, b_column);
    Tiles::fence();
  }
  tiles.store<0>(sums, 64);
  tiles.store<2>(sums + kTileSums, 64);
  if constexpr (two_columns) tiles.store<1>(sums + 2 * kTileSums, 64);
  if constexpr (two_columns) tiles.store<3>(sums + 3 * kTileSums, 64);
  Tiles::fence();
  shared = next;
}

// out[first ..first + rows, n ..end) <- sums of the group for those columns, and the bias.
inline void write_group(const FlatLinearParams& p, const FlatTileScratch& s, int64_t first,
                        int64_t rows, int64_t n, int64_t end, int64_t at, const float* sums) {
  const BFloat16* bias = static_cast<const BFloat16*>(p.bias);
  for (int64_t i = 0; i < kGroupRows; ++i) {
    s.bias[i] = bias && at + i < end ? to_float(bias[at + i]) : 0;
  }
  for (int64_t r = 0; r < rows; r += kAmxRows) {
    for (int64_t half = 0; half < kGroupRows; half += kAmxRows, sums += kTileSums) {
      transpose(kAmxRows, kAmxRows, sums, kAmxRows, s.total + r * kGroupRows + half, kGroupRows);
    }
  }
  const bool whole = end - n == kGroupRows;
  for (int64_t r = 0; r < rows; ++r) {
    const float* total = s.total + r * kGroupRows;
    BFloat16* out = static_cast<BFloat16*>(p.out) + (first + r) * p.out_row + n;
    BFloat16 line[kGroupRows];
    for (int64_t i = 0; i < kGroupRows; i += kWidth<float>) {
      store_bfloat16((whole ? out : line) + i, load(total + i) + load(s.bias + i));
    }
    if (!whole) __builtin_memcpy(out, line + (n - at), (end - n) * sizeof *out);
  }
}

// out[first ..first + rows, begin ..end) of a task that goes on to the column `last`.
inline void multiply_panel(Tiles& tiles, const FlatLinearParams& p, const FlatTileScratch& s,
                           int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t last) {
  const int64_t columns = ceil_div(rows, kAmxRows);
  const int64_t fetches = NextGroup::kRunRows / ceil_div(columns, 2);
  for (int64_t k = 0; k < s.depth; k += s.block_k) {
    const bool last_block = k + s.block_k >= s.depth;
    float* sums = s.sums;
    for (int64_t n = begin; n < end; n += kGroupRows, sums += s.group_sums) {
      NextGroup next;
      if (n + kGroupRows < end) {
        next = {p, s, n + kGroupRows, end, k};
      } else if (!last_block) {
        next = {p, s, begin, end, k + s.block_k};
      } else if (end < last) {
        next = {p, s, end, last, 0};
      }
      const int64_t at = group_at(n, end);
      for (int64_t c = 0; c < columns; c += 2) {
        const auto multiply = c + 1 < columns ? multiply_block<true> : multiply_block<false>;
        multiply(tiles, p, s, at, k, c, sums, fetches, next);
      }
      if (last_block) write_group(p, s, first, rows, n, min_of(n + kGroupRows, end), at, sums);
    }
  }
}

inline int64_t flat_gemm_tiles_scratch(const FlatLinearParams& p) {
  Arena arena(nullptr);
  FlatTileScratch(p, arena);
  return arena.used();
}

inline void flat_gemm_tiles(const FlatLinearParams& p, int64_t task, void* scratch) {
  Arena arena(scratch);
  const FlatTileScratch s(p, arena);
  const int64_t begin = task * p.weight_rows_per_task;
  const int64_t end = min_of(begin + p.weight_rows_per_task, p.n);
  Tiles tiles(kFullTiles);
  for (int64_t m = 0; m < p.m; m += kFlatRows) {
    const int64_t rows = min_of(p.m - m, kFlatRows);
    pack_x(p, m, rows, s, {p, s, begin, end, 0});
    for (int64_t n = begin; n < end; n += kPanelRows) {
      multiply_panel(tiles, p, s, m, rows, n, min_of(n + kPanelRows, end), end);
    }
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
