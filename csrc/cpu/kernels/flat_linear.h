// flat_linear: out = x weight^T + bias for few rows of x (the flat GEMM of FlashDecoding++).
//
// Reading the weight is what costs: both kernels read it from memory once, and as dot products
// along K they need no transposed copy of it.
//
//   gemv       kDotRows rows of x at a time against weight rows as they lie in memory
//   flat_gemm  kFlatRows rows of x at a time. A block of the weight, kBlockN rows by kBlockK, is
//              converted to fp32 once and then multiplied by tile after tile of x
//
// A task is a run of weight rows. A product's sum along K has an order that K alone fixes, whatever
// tile computes it: in flat_gemm a row's bits do not depend on how many rows there are.
#pragma once

#include "cpu/isa/load_pair.h"
#include "cpu/kernels/arena.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int64_t kFlatRows = 64;
constexpr int64_t kBlockN = 12;  // a multiple of kDotCols at every level
constexpr int64_t kBlockK = 512;
constexpr int64_t kTotalRow = 16;  // of a block's totals: kBlockN rounded up to any tile
static_assert(kBlockN % kDotCols == 0);

// One pair of elements further: sum[r * kCols + c] += x[r] . weight[c].
template <bool kPart, int kRows, int kCols, class Acc, class T>
FIL_INLINE void dot_step(int64_t k, int64_t count, const Acc* x, int64_t x_row,
                         const T* const* weight, Vector<Acc>* sum) {
#pragma GCC unroll 16
  for (int c = 0; c < kCols; ++c) {
    const Pair<Acc> w =
        kPart ? load_part_pair<Acc>(weight[c] + k, count - k) : load_pair<Acc>(weight[c] + k);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Acc* const x_at = x + r * x_row + k;
      Vector<Acc>& s = sum[r * kCols + c];
      s = fma(load(x_at), w.first, s);
      s = fma(load(x_at + kWidth<Acc>), w.second, s);
    }
  }
}

// total[r, c] += x[r] . weight[c] over `count` elements. x is in load_pair's order and zero up to a
// whole pair. Weight rows behind the last of `cols` are the last again: nothing is read that is not
// there, and their totals mean nothing.
template <int kRows, int kCols, class Acc, class T>
FIL_INLINE void dot_tile_pairs(int64_t cols, int64_t count, const Acc* x, int64_t x_row,
                               const T* weight, int64_t weight_row, Acc* total) {
  // Reduced four at a time, the last ones beside zeros: one order of the lanes for every tile.
  constexpr int kSums = (kRows * kCols + 3) / 4 * 4;
  const T* row[kCols];
#pragma GCC unroll 16
  for (int c = 0; c < kCols; ++c) row[c] = weight + min_of<int64_t>(c, cols - 1) * weight_row;
  Vector<Acc> sum[kSums] = {};
  int64_t k = 0;
  for (; k + kPairWidth<Acc> <= count; k += kPairWidth<Acc>) {
    dot_step<false, kRows, kCols>(k, count, x, x_row, row, sum);
  }
  if (k < count) dot_step<true, kRows, kCols>(k, count, x, x_row, row, sum);
  Acc reduced[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) reduce_sum_4(sum + i, reduced + i);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) total[r * kTotalRow + c] += reduced[r * kCols + c];
  }
}

// Weight rows per tile where the weight is read in place. One row of x needs as many sums as the
// FMA units have latency; more rows leave registers for fewer conversions.
constexpr int in_place_cols(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2; }

template <int kRows, int kCols, class Acc, class T>
void dot_cols(int64_t cols, int64_t count, const Acc* x, int64_t x_row, const T* weight,
              int64_t weight_row, Acc* total) {
  for (int64_t c = 0; c < cols; c += kCols) {
    dot_tile_pairs<kRows, kCols>(cols - c, count, x, x_row, weight + c * weight_row, weight_row,
                                 total + c);
  }
}

// The same for `rows` <= kRows rows and `cols` <= kBlockN columns.
template <int kRows, bool kInPlace, class Acc, class T>
FIL_INLINE void dot_rows_by(int64_t rows, int64_t cols, int64_t count, const Acc* x, int64_t x_row,
                            const T* weight, int64_t weight_row, Acc* total) {
  if (rows == kRows) {
    constexpr int kCols = kInPlace ? in_place_cols(kRows) : kDotCols;
    dot_cols<kRows, kCols>(cols, count, x, x_row, weight, weight_row, total);
  } else if constexpr (kRows > 1) {
    dot_rows_by<kRows - 1, kInPlace>(rows, cols, count, x, x_row, weight, weight_row, total);
  }
}

// out[row, first + c] = total + bias, rounded once.
template <class Element, class Acc>
FIL_INLINE void write_totals(const FlatLinearParams& p, int64_t row, int64_t first, int64_t cols,
                             const Acc* total) {
  Element* out = static_cast<Element*>(p.out) + row * p.out_row + first;
  const Element* bias = static_cast<const Element*>(p.bias);
  for (int64_t c = 0; c < cols; ++c) {
    out[c] = from_float<Element>(bias ? total[c] + to_float(bias[first + c]) : total[c]);
  }
}

// to <- `count` elements in fp32 and load_pair's order, zeros up to a whole pair.
template <class Acc, class T>
FIL_INLINE void convert_pairs(const T* from, int64_t count, Acc* to) {
  for (int64_t k = 0; k < count; k += kPairWidth<Acc>) {
    const Pair<Acc> pair = count - k >= kPairWidth<Acc> ? load_pair<Acc>(from + k)
                                                        : load_part_pair<Acc>(from + k, count - k);
    store(to + k, pair.first);
    store(to + k + kWidth<Acc>, pair.second);
  }
}

template <class Element>
int64_t flat_linear_tasks(const FlatLinearParams& p) {
  return ceil_div(p.n, p.weight_rows_per_task);
}

// ---- gemv --------------------------------------------------------------------------------------

template <class Acc>
struct GemvScratch {
  int64_t x_row;
  Acc *x, *total;

  GemvScratch(const FlatLinearParams& p, Arena& arena)
      : x_row(round_up(p.k, kPairWidth<Acc>)),
        x(arena.take<Acc>(min_of<int64_t>(p.m, kDotRows) * x_row)),
        total(arena.take<Acc>(kDotRows * kTotalRow)) {}
};

template <class Element>
int64_t gemv_scratch(const FlatLinearParams& p) {
  Arena arena(nullptr);
  GemvScratch<Accumulator<Element>>(p, arena);
  return arena.used();
}

template <class Element>
void gemv(const FlatLinearParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  Arena arena(scratch);
  const GemvScratch<Acc> s(p, arena);
  const int64_t begin = task * p.weight_rows_per_task;
  const int64_t end = min_of(begin + p.weight_rows_per_task, p.n);
  for (int64_t m = 0; m < p.m; m += kDotRows) {
    const int64_t rows = min_of<int64_t>(p.m - m, kDotRows);
    for (int64_t r = 0; r < rows; ++r) {
      convert_pairs(static_cast<const Element*>(p.x) + (m + r) * p.x_row, p.k, s.x + r * s.x_row);
    }
    for (int64_t n = begin; n < end; n += kBlockN) {
      const int64_t cols = min_of(end - n, kBlockN);
      for (int64_t i = 0; i < rows * kTotalRow; ++i) s.total[i] = 0;
      dot_rows_by<kDotRows, true>(rows, cols, p.k, s.x, s.x_row,
                                  static_cast<const Element*>(p.weight) + n * p.weight_row,
                                  p.weight_row, s.total);
      for (int64_t r = 0; r < rows; ++r) {
        write_totals<Element>(p, m + r, n, cols, s.total + r * kTotalRow);
      }
    }
  }
}

// ---- flat_gemm ---------------------------------------------------------------------------------

template <class Acc>
struct FlatGemmScratch {
  int64_t rows, depth;
  Acc* x;       // [block of K][rows][kBlockK]
  Acc* weight;  // [kBlockN][kBlockK]
  Acc* total;   // [rows][kTotalRow]

  FlatGemmScratch(const FlatLinearParams& p, Arena& arena)
      : rows(min_of(p.m, kFlatRows)),
        depth(round_up(p.k, kPairWidth<Acc>)),
        x(arena.take<Acc>(rows * depth)),
        weight(arena.take<Acc>(kBlockN * kBlockK)),
        total(arena.take<Acc>(rows * kTotalRow)) {}
};

template <class Element>
int64_t flat_gemm_scratch(const FlatLinearParams& p) {
  Arena arena(nullptr);
  FlatGemmScratch<Accumulator<Element>>(p, arena);
  return arena.used();
}

// total += x[rows, count] weight[cols, count]^T with the rows of x in tiles of near the same size.
template <class Acc, class T>
void flat_block(int64_t rows, int64_t cols, int64_t count, const Acc* x, int64_t x_row,
                const T* weight, int64_t weight_row, Acc* total, Acc* converted) {
  if (rows <= kDotRows) {  // one tile: converting in registers is enough
    dot_rows_by<kDotRows, true>(rows, cols, count, x, x_row, weight, weight_row, total);
    return;
  }
  for (int64_t c = 0; c < cols; ++c) {
    convert_pairs(weight + c * weight_row, count, converted + c * kBlockK);
  }
  const int64_t padded = round_up(count, kPairWidth<Acc>), tiles = ceil_div(rows, kDotRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, size = rows * (tile + 1) / tiles - first;
    dot_rows_by<kDotRows, false>(size, cols, padded, x + first * x_row, x_row,
                                 static_cast<const Acc*>(converted), kBlockK,
                                 total + first * kTotalRow);
  }
}

template <class Element>
void flat_gemm(const FlatLinearParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  Arena arena(scratch);
  const FlatGemmScratch<Acc> s(p, arena);
  const int64_t begin = task * p.weight_rows_per_task;
  const int64_t end = min_of(begin + p.weight_rows_per_task, p.n);
  for (int64_t m = 0; m < p.m; m += kFlatRows) {
    const int64_t rows = min_of(p.m - m, kFlatRows);
    for (int64_t k = 0; k < p.k; k += kBlockK) {
      const int64_t count = min_of(p.k - k, kBlockK), x_row = round_up(count, kPairWidth<Acc>);
      for (int64_t r = 0; r < rows; ++r) {
        convert_pairs(static_cast<const Element*>(p.x) + (m + r) * p.x_row + k, count,
                      s.x + k * rows + r * x_row);
      }
    }
    for (int64_t n = begin; n < end; n += kBlockN) {
      const int64_t cols = min_of(end - n, kBlockN);
      for (int64_t i = 0; i < rows * kTotalRow; ++i) s.total[i] = 0;
      for (int64_t k = 0; k < p.k; k += kBlockK) {
        const int64_t count = min_of(p.k - k, kBlockK), x_row = round_up(count, kPairWidth<Acc>);
        flat_block(rows, cols, count, s.x + k * rows, x_row,
                   static_cast<const Element*>(p.weight) + n * p.weight_row + k, p.weight_row,
                   s.total, s.weight);
      }
      for (int64_t r = 0; r < rows; ++r) {
        write_totals<Element>(p, m + r, n, cols, s.total + r * kTotalRow);
      }
    }
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
