// flat_linear: out = x weight^T + bias for few rows of x (the flat GEMM of FlashDecoding++).
//
// Reading the weight is what costs. Both kernels read it from memory once, in place: as dot
// products along K they need no transposed copy, and a 16-bit element is converted in registers,
// again for each tile of x, which costs less than to store it and load it back.
//
//   gemv       a few rows of x, one tile, at a time; the tile's x stays in the first-level cache
//   flat_gemm  64 rows of x at a time: a block of the weight, 16 rows by 640 of K, stays in the
//              first-level cache while tile after tile of x passes
//
// A task is a run of weight rows. A product's sum along K has an order that K alone fixes in
// flat_gemm, K and the number of rows in gemv, whatever tile and task compute it: in flat_gemm a
// row's bits do not depend on how many rows there are.
#pragma once

#include "cpu/isa/load_pair.h"
#include "cpu/kernels/arena.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int64_t kFlatRows = 64;
constexpr int64_t kFlatBlockK = 640;   // at most: a tile of x and a block of the weight fill an L1
constexpr int64_t kGemvX = 4096;       // elements of x in fp32, that fill half of one
constexpr int64_t kBlockColumns = 16;  // at most
constexpr int64_t kTotalRow = kBlockColumns + 8;  // a block's totals, and what a tile adds behind

// Near equal blocks of K, of at most `most` elements: whole pairs, but for the last.
template <class Acc>
FIL_INLINE int64_t depth_block(int64_t k, int64_t most) {
  const int64_t blocks = max_of<int64_t>(ceil_div(k, most), 1);
  return round_up(max_of<int64_t>(ceil_div(k, blocks), 1), kPairWidth<Acc>);
}

// One pair of elements further: sum[r * kCols + c] += x[r] . weight[c]. The shorter side waits in
// registers while the longer one passes.
template <bool kPart, int kRows, int kCols, class Acc, class T>
FIL_INLINE void dot_step(int64_t k, int64_t count, const Acc* x, int64_t x_row,
                         const T* const* weight, Vector<Acc>* sum) {
  const auto load_weight = [&](int c) __attribute__((always_inline)) {
    return kPart ? load_part_pair<Acc>(weight[c] + k, count - k) : load_pair<Acc>(weight[c] + k);
  };
  if constexpr (kRows < kCols && kRows < 3) {
    Pair<Acc> x_at[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) x_at[r] = load_stored_pair(x + r * x_row + k);
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) {
      const Pair<Acc> w = load_weight(c);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Vector<Acc>& s = sum[r * kCols + c];
        s = fma(x_at[r].second, w.second, fma(x_at[r].first, w.first, s));
      }
    }
  } else {
    Pair<Acc> w[kCols];
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) w[c] = load_weight(c);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector<Acc> x_at = load(x + r * x_row + k);
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c)
        sum[r * kCols + c] = fma(x_at, w[c].first, sum[r * kCols + c]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector<Acc> x_at = load(x + r * x_row + k + kWidth<Acc>);
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c)
        sum[r * kCols + c] = fma(x_at, w[c].second, sum[r * kCols + c]);
    }
  }
}

// total[r, c] += x[r] . weight[c] over `count` elements. x is in load_pair's order and zero up to a
// whole pair. What lies `ahead` elements further, if not 0, will be read next: it is fetched into
// the second-level cache.
template <int kRows, int kCols, class Acc, class T>
FIL_INLINE void dot_tile_pairs(int64_t count, const Acc* x, int64_t x_row, const T* const* weight,
                               int64_t ahead, Acc* total) {
  // Reduced four at a time, the last ones beside zeros: one order of the lanes for every tile.
  constexpr int kSums = (kRows * kCols + 3) / 4 * 4;
  Vector<Acc> sum[kSums] = {};
  int64_t k = 0;
  for (; k + kPairWidth<Acc> <= count; k += kPairWidth<Acc>) {
    if (ahead != 0) {
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c) __builtin_prefetch(weight[c] + k + ahead, 0, 2);
    }
    dot_step<false, kRows, kCols>(k, count, x, x_row, weight, sum);
  }
  if (k < count) dot_step<true, kRows, kCols>(k, count, x, x_row, weight, sum);
  Acc reduced[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) reduce_sum_4(sum + i, reduced + i);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) total[r * kTotalRow + c] += reduced[r * kCols + c];
  }
}

// A block of the weight: rows of several streams. A stream is a run of consecutive rows; column q
// of the block is row q / streams of stream q % streams. Side by side, a few long streams are what
// the hardware's prefetchers follow best, and one alone would leave a third of the bandwidth.
template <class T>
struct WeightBlock {
  const T* data;
  int64_t row;  // stride
  int64_t streams;
  int64_t stream_rows;  // rows from one stream to the next
  int64_t columns;
  int64_t last;  // row that is there

  // Behind the last column it is the last again, behind the last row likewise: nothing is read that
  // is not there, and those totals mean nothing.
  FIL_INLINE const T* column(int64_t q) const {
    q = min_of(q, columns - 1);
    return data + min_of(q / streams + q % streams * stream_rows, last) * row;
  }
};

template <int kRows, class Acc, class T>
void dot_block(const WeightBlock<T>& weight, int64_t count, const Acc* x, int64_t x_row,
               int64_t ahead, Acc* total) {
  constexpr int kCols = dot_tile_cols(kRows);
  for (int64_t q = 0; q < weight.columns; q += kCols) {
    const T* column[kCols];
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) column[c] = weight.column(q + c);
    dot_tile_pairs<kRows, kCols>(count, x, x_row, column, ahead, total + q);
  }
}

// The same for `rows` <= kRows rows.
template <int kRows, class Acc, class T>
FIL_INLINE void dot_block_by(int64_t rows, const WeightBlock<T>& weight, int64_t count,
                             const Acc* x, int64_t x_row, int64_t ahead, Acc* total) {
  if (rows == kRows) {
    dot_block<kRows>(weight, count, x, x_row, ahead, total);
  } else if constexpr (kRows > 1) {
    dot_block_by<kRows - 1>(rows, weight, count, x, x_row, ahead, total);
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

// The rows [first, first + rows) of x in fp32, block by block of K: [block][row][block_k].
template <class Element, class Acc>
FIL_INLINE void convert_x(const FlatLinearParams& p, int64_t first, int64_t rows, int64_t block_k,
                          Acc* to) {
  for (int64_t k = 0; k < p.k; k += block_k) {
    for (int64_t r = 0; r < rows; ++r) {
      convert_pairs(static_cast<const Element*>(p.x) + (first + r) * p.x_row + k,
                    min_of(p.k - k, block_k), to + k * rows + r * block_k);
    }
  }
}

// How a task's rows of the weight are walked by tiles of at most `rows` rows of x.
struct Walk {
  int64_t streams;
  int64_t steps;    // rows of each stream in a block
  int64_t block_k;  // elements of a block along K

  FIL_INLINE Walk(int64_t rows, int64_t block_k)
      : streams(dot_tile_cols(rows)),
        steps(streams_x(rows) ? 1 : kBlockColumns / streams),
        block_k(block_k) {}

  // Up to two rows of x may stream from the second-level cache for each row of the weight, so that
  // the weight is read without a gap; more are kept in the first for several.
  static FIL_INLINE bool streams_x(int64_t rows) { return rows <= 2; }
};

// out <- total + bias, rounded once, for one block: column i * streams + c is row i of stream c.
template <class Element, class Acc>
FIL_INLINE void write_totals(const FlatLinearParams& p, int64_t first, int64_t rows,
                             const Walk& walk, int64_t n, int64_t steps, int64_t stream_rows,
                             int64_t end, const Acc* total) {
  const Element* bias = static_cast<const Element*>(p.bias);
  for (int64_t r = 0; r < rows; ++r, total += kTotalRow) {
    Element* out = static_cast<Element*>(p.out) + (first + r) * p.out_row;
    for (int64_t c = 0; c < walk.streams; ++c) {
      const int64_t from = n + c * stream_rows;
      for (int64_t i = 0; i < steps && from + i < end; ++i) {
        const Acc sum = total[i * walk.streams + c];
        out[from + i] = from_float<Element>(bias ? sum + to_float(bias[from + i]) : sum);
      }
    }
  }
}

// Products of `rows` rows of x, from the row `first` on and converted, with a task's rows of the
// weight. dot(weight, count, x, ahead, total) multiplies a block.
template <class Element, class Acc, class Dot>
FIL_INLINE void walk_weight(const FlatLinearParams& p, int64_t task, int64_t first, int64_t rows,
                            const Walk& walk, const Acc* x, Acc* total, const Dot& dot) {
  const int64_t begin = task * p.weight_rows_per_task;
  const int64_t end = min_of(begin + p.weight_rows_per_task, p.n);
  const int64_t stream_rows = ceil_div(end - begin, walk.streams);
  for (int64_t i = 0; i < stream_rows; i += walk.steps) {
    const int64_t steps = min_of(stream_rows - i, walk.steps);
    const Element* data = static_cast<const Element*>(p.weight) + (begin + i) * p.weight_row;
    for (int64_t j = 0; j < rows * kTotalRow; ++j) total[j] = 0;
    for (int64_t k = 0; k < p.k; k += walk.block_k) {
      // A stream that is read without a gap is fetched by the hardware.
      const bool gaps = walk.steps > 1 && walk.block_k < p.k;
      const int64_t ahead = !gaps                               ? 0
                            : k + walk.block_k < p.k            ? walk.block_k
                            : i + 2 * walk.steps <= stream_rows ? walk.steps * p.weight_row - k
                                                                : 0;
      dot(WeightBlock<Element>{data + k, p.weight_row, walk.streams, stream_rows,
                               steps * walk.streams, end - begin - i - 1},
          min_of(p.k - k, walk.block_k), x + k * rows, ahead, total);
    }
    write_totals<Element>(p, first, rows, walk, begin + i, steps, stream_rows, end, total);
  }
}

// ---- gemv --------------------------------------------------------------------------------------

template <class Acc>
struct GemvScratch {
  int64_t rows;
  Walk walk;
  Acc *x, *total;

  GemvScratch(const FlatLinearParams& p, Arena& arena)
      : rows(min_of<int64_t>(p.m, kDotRows)),
        walk(rows, depth_block<Acc>(
                       p.k, Walk::streams_x(rows) ? max_of<int64_t>(p.k, 1) : kGemvX / rows)),
        x(arena.take<Acc>(rows * round_up(p.k, walk.block_k))),
        total(arena.take<Acc>(rows * kTotalRow)) {}
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
  for (int64_t m = 0; m < p.m; m += s.rows) {
    const int64_t rows = min_of<int64_t>(p.m - m, s.rows);
    convert_x<Element>(p, m, rows, s.walk.block_k, s.x);
    walk_weight<Element>(p, task, m, rows, s.walk, s.x, s.total,
                         [&](const WeightBlock<Element>& weight, int64_t count, const Acc* x,
                             int64_t ahead, Acc* total) __attribute__((always_inline)) {
                           dot_block_by<kDotRows>(rows, weight, count, x, s.walk.block_k, ahead,
                                                  total);
                         });
  }
}

// ---- flat_gemm ---------------------------------------------------------------------------------

template <class Acc>
struct FlatGemmScratch {
  int64_t rows, block_k;
  Acc *x, *total;

  FlatGemmScratch(const FlatLinearParams& p, Arena& arena)
      : rows(min_of(p.m, kFlatRows)),
        block_k(depth_block<Acc>(p.k, kFlatBlockK)),
        x(arena.take<Acc>(rows * round_up(p.k, block_k))),
        total(arena.take<Acc>(rows * kTotalRow)) {}
};

template <class Element>
int64_t flat_gemm_scratch(const FlatLinearParams& p) {
  Arena arena(nullptr);
  FlatGemmScratch<Accumulator<Element>>(p, arena);
  return arena.used();
}

template <class Element>
void flat_gemm(const FlatLinearParams& p, int64_t task, void* scratch) {
  using Acc = Accumulator<Element>;
  Arena arena(scratch);
  const FlatGemmScratch<Acc> s(p, arena);
  for (int64_t m = 0; m < p.m; m += kFlatRows) {
    const int64_t rows = min_of(p.m - m, kFlatRows);
    const int64_t size = ceil_div(rows, ceil_div(rows, kDotRows));  // tiles of near the same size
    convert_x<Element>(p, m, rows, s.block_k, s.x);
    walk_weight<Element>(p, task, m, rows, Walk(size, s.block_k), s.x, s.total,
                         [&](const WeightBlock<Element>& weight, int64_t count, const Acc* x,
                             int64_t ahead, Acc* total) __attribute__((always_inline)) {
                           for (int64_t r = 0; r < rows; r += size) {
                             dot_block_by<kDotRows>(min_of(rows - r, size), weight, count,
                                                    x + r * s.block_k, s.block_k,
                                                    r == 0 ? ahead : 0, total + r * kTotalRow);
                           }
                         });
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
