// Register-tiled products of one attention tile. On a matrix unit amx_gemm.h multiplies instead.
//
// Every element of a product sums from zero over the depth in ascending order, one multiply-add at
// a time (fused where the level has it), whatever tile computes it: a row's bits do not depend on
// how many rows it is computed with. The sum is then added to C once: over thousands of keys these
// two levels keep fp32 as exact as eager torch, where one running sum is five times worse.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// Columns of one panel of B. Packed, B is [panel][depth][kPanel] with zeros behind the last column.
template <class Acc>
constexpr int kPanel = kTileCols * kWidth<Acc>;

// C[kRows, kCols vectors] (+)= A[kRows, depth] B[depth, kCols vectors], whose row d is at b(d).
template <int kRows, int kCols, class Acc, class RowOf>
FIL_INLINE void micro_tile(int64_t depth, const Acc* a, int64_t a_row, int64_t a_col,
                           const RowOf& b, int64_t last_count, Acc* c, int64_t c_row,
                           bool accumulate) {
  Vector<Acc> sum[kRows][kCols] = {};
  // The shorter side waits in registers while the longer one passes: there is room for no more.
  for (int64_t d = 0; d < depth; ++d) {
    const auto* const b_at = b(d);
    const int64_t last = (kCols - 1) * kWidth<Acc>;
    const bool part = last_count != kWidth<Acc>;
    if constexpr (kRows < kCols) {
      Vector<Acc> x[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) x[r] = broadcast<Acc>(a[r * a_row + d * a_col]);
#pragma GCC unroll 16
      for (int j = 0; j < kCols; ++j) {
        const Vector<Acc> y = part && j == kCols - 1 ? load_part_as<Acc>(b_at + last, last_count)
                                                     : load_as<Acc>(b_at + j * kWidth<Acc>);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) sum[r][j] = fma(x[r], y, sum[r][j]);
      }
    } else {
      Vector<Acc> y[kCols];
#pragma GCC unroll 16
      for (int j = 0; j < kCols; ++j) {
        y[j] = part && j == kCols - 1 ? load_part_as<Acc>(b_at + last, last_count)
                                      : load_as<Acc>(b_at + j * kWidth<Acc>);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vector<Acc> x = broadcast<Acc>(a[r * a_row + d * a_col]);
#pragma GCC unroll 16
        for (int j = 0; j < kCols; ++j) sum[r][j] = fma(x, y[j], sum[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kCols; ++j) {
      Acc* to = c + r * c_row + j * kWidth<Acc>;
      store<Acc>(to, accumulate ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// One row block of at most kRows rows against one packed panel.
template <int kRows, class Acc>
FIL_INLINE void panel_rows(int64_t rows, int64_t depth, const Acc* a, int64_t a_row, int64_t a_col,
                           const Acc* b, int64_t b_row, Acc* c, int64_t c_row, bool accumulate) {
  if (rows >= kRows) {
    const auto row = [=](int64_t d) __attribute__((always_inline)) { return b + d * b_row; };
    micro_tile<kRows, kTileCols>(depth, a, a_row, a_col, row, kWidth<Acc>, c, c_row, accumulate);
  } else if constexpr (kRows > 1) {
    panel_rows<kRows - 1>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
  }
}

// The right operand of tile_gemm in scratch memory, readable up to a whole panel.
template <class Acc>
struct RightOperand {
  const Acc* data;
  int64_t row;    // stride between rows
  int64_t panel;  // stride between panels
};

template <class Acc>
FIL_INLINE RightOperand<Acc> packed(const Acc* panels, int64_t depth) {
  return {panels, kPanel<Acc>, depth * kPanel<Acc>};
}
template <class Acc>
FIL_INLINE RightOperand<Acc> row_major(const Acc* b, int64_t b_row) {
  return {b, b_row, kPanel<Acc>};
}

// What a row block of a product needs of a side: [begin, end).
struct Part {
  int64_t begin;
  int64_t end;
};

// Every row block needs all of it.
struct Whole {
  int64_t size;
  FIL_INLINE Part operator()(int64_t) const { return {0, size}; }
};

// C[rows, cols] (+)= A[rows, depth] B[depth, cols]. A's strides are free, so a transposed A costs
// nothing. C's rows must have room for whole panels. cols_of(row) and depth_of(row) say what the
// kTileRows rows from `row` on need: other panels of C are left as they are, and other terms are
// zero.
template <class Acc, class ColsOf, class DepthOf>
FIL_INLINE void tile_gemm_parts(int64_t rows, int64_t cols, const Acc* a, int64_t a_row,
                                int64_t a_col, RightOperand<Acc> b, Acc* c, int64_t c_row,
                                bool accumulate, const ColsOf& cols_of, const DepthOf& depth_of) {
  for (int64_t col = 0; col < cols; col += kPanel<Acc>) {
    const Acc* panel = b.data + col / kPanel<Acc> * b.panel;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Part wanted = cols_of(row), depth = depth_of(row);
      if (col >= wanted.end || col + kPanel<Acc> <= wanted.begin) continue;
      panel_rows<kTileRows>(min_of<int64_t>(rows - row, kTileRows), depth.end - depth.begin,
                            a + row * a_row + depth.begin * a_col, a_row, a_col,
                            panel + depth.begin * b.row, b.row, c + row * c_row + col, c_row,
                            accumulate);
    }
  }
}

template <class Acc>
void tile_gemm(int64_t rows, int64_t cols, int64_t depth, const Acc* a, int64_t a_row,
               int64_t a_col, RightOperand<Acc> b, Acc* c, int64_t c_row, bool accumulate) {
  tile_gemm_parts(rows, cols, a, a_row, a_col, b, c, c_row, accumulate, Whole{cols}, Whole{depth});
}

// Rows of B per step of the products that read it in place: they stay in the first-level cache for
// all rows of A.
constexpr int64_t kStepRows = 8;

// Columns, in vectors, that a block of `rows` rows keeps in registers when B is read in place:
// few rows need more columns for as many independent sums as the FMA units have latency.
constexpr int direct_cols(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : kTileCols; }

template <int kRows, class Acc, class T>
FIL_INLINE void direct_rows(int64_t rows, int64_t cols, int64_t depth, const Acc* a, int64_t a_row,
                            const T* b, const int64_t* b_offset, Acc* c, int64_t c_row) {
  if (rows >= kRows) {
    constexpr int width = kWidth<Acc>, wide = direct_cols(kRows) * width;
    int64_t col = 0;
    const auto row = [&](int64_t d)
                         __attribute__((always_inline)) { return b + b_offset[d] + col; };
    for (; col + wide <= cols; col += wide) {
      micro_tile<kRows, direct_cols(kRows)>(depth, a, a_row, 1, row, width, c + col, c_row, true);
    }
    for (; col < cols; col += width) {
      micro_tile<kRows, 1>(depth, a, a_row, 1, row, min_of<int64_t>(cols - col, width), c + col,
                           c_row, true);
    }
  } else if constexpr (kRows > 1) {
    direct_rows<kRows - 1>(rows, cols, depth, a, a_row, b, b_offset, c, c_row);
  }
}

// One step of C[rows, cols] += A[rows, depth] B[depth, cols], depth <= kStepRows, with B read once,
// in place, in its own type: for too few rows to pay for packing B. Row d of B is at b +
// b_offset[d]. C's rows must have room for whole vectors.
template <class Acc, class T>
void tile_gemm_direct(int64_t rows, int64_t cols, int64_t depth, const Acc* a, int64_t a_row,
                      const T* b, const int64_t* b_offset, Acc* c, int64_t c_row) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    direct_rows<kTileRows>(min_of<int64_t>(rows - row, kTileRows), cols, depth, a + row * a_row,
                           a_row, b, b_offset, c + row * c_row, c_row);
  }
}

// S[kRows, kKeys] = A[kRows, depth] (kKeys rows of B)^T, vectors along the depth. Behind the last
// row of B the last is repeated: nothing is read that is not there.
template <int kRows, int kKeys, class Acc, class T>
FIL_INLINE void dot_tile(int64_t keys, int64_t depth, const Acc* a, int64_t a_row, const T* b,
                         const int64_t* b_offset, Acc* s, int64_t s_row) {
  const T* key[kKeys];
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j) key[j] = b + b_offset[min_of<int64_t>(j, keys - 1)];
  Vector<Acc> sum[kRows * kKeys] = {};
  for (int64_t d = 0; d < depth; d += kWidth<Acc>) {
    Vector<Acc> row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(a + r * a_row + d);
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      const Vector<Acc> x = depth - d >= kWidth<Acc> ? load_as<Acc>(key[j] + d)
                                                     : load_part_as<Acc>(key[j] + d, depth - d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r * kKeys + j] = fma(row[r], x, sum[r * kKeys + j]);
    }
  }
  Acc total[kRows * kKeys];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kKeys; i += 4) reduce_sum_4(sum + i, total + i);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) s[r * s_row + j] = total[r * kKeys + j];
  }
}

template <int kRows, int kKeys, class Acc, class T>
void dot_rows(int64_t cols, int64_t depth, const Acc* a, int64_t a_row, const T* b,
              const int64_t* b_offset, Acc* s, int64_t s_row) {
  for (int64_t col = 0; col < cols; col += kKeys) {
    dot_tile<kRows, kKeys>(cols - col, depth, a, a_row, b, b_offset + col, s + col, s_row);
  }
}

// One step of S[rows, cols] = A[rows, depth] B[cols, depth]^T, cols <= kStepRows, with B read in
// place: for few rows. Row j of B is at b + b_offset[j]. A's rows are zero up to a whole vector;
// S's rows have room for kStepRows.
template <class Acc, class T>
void tile_dot(int64_t rows, int64_t cols, int64_t depth, const Acc* a, int64_t a_row, const T* b,
              const int64_t* b_offset, Acc* s, int64_t s_row) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    const auto dot = left >= 4   ? dot_rows<4, 2, Acc, T>
                     : left == 3 ? dot_rows<3, 4, Acc, T>
                     : left == 2 ? dot_rows<2, 4, Acc, T>
                                 : dot_rows<1, 8, Acc, T>;
    dot(cols, depth, a + row * a_row, a_row, b, b_offset, s + row * s_row, s_row);
    row += min_of<int64_t>(left, 4);
  }
}

// panels <- the rows of B [rows, cols] in place order, padded with zeros: B as the right operand.
template <class Acc, class T>
void pack_rows(int64_t rows, int64_t cols, Rows<T> b, Acc* panels) {
  for (int64_t col = 0; col < cols; col += kPanel<Acc>) {
    Acc* panel = panels + col * rows;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = b[r];
      for (int j = 0; j < kTileCols; ++j) {
        const int64_t at = col + j * kWidth<Acc>, count = cols - at;
        const T* p = row + at;
        const Vector<Acc> v = count >= kWidth<Acc> ? load_as<Acc>(p)
                              : count > 0          ? load_part_as<Acc>(p, count)
                                                   : Vector<Acc>{};
        store(panel + r * kPanel<Acc> + j * kWidth<Acc>, v);
      }
    }
  }
}

// panels <- B^T for B [rows, cols]: depth is B's cols, panel columns are B's rows. staging holds
// kPanel rows of B, rounded up to whole vectors.
template <class Acc, class T>
void pack_transposed(int64_t rows, int64_t cols, Rows<T> b, Acc* panels, Acc* staging) {
  const int64_t stride = round_up(cols, kWidth<Acc>);
  for (int64_t first = 0; first < rows; first += kPanel<Acc>) {
    for (int64_t r = 0; r < kPanel<Acc>; ++r) {
      const bool inside = first + r < rows;
      const T* row = b[min_of(first + r, rows - 1)];
      for (int64_t c = 0; c < cols; c += kWidth<Acc>) {
        const Vector<Acc> v = !inside                   ? Vector<Acc>{}
                              : cols - c >= kWidth<Acc> ? load_as<Acc>(row + c)
                                                        : load_part_as<Acc>(row + c, cols - c);
        store(staging + r * stride + c, v);
      }
    }
    transpose(kPanel<Acc>, cols, staging, stride, panels + first * cols, kPanel<Acc>);
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
