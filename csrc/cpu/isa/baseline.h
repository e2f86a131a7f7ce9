// Baseline level: 16-byte vectors in GNU vector extensions, which g++ and clang lower to whatever
// the machine has. No intrinsics, so this level builds on any architecture.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// 16 registers: 6 x 2 accumulators, two columns of B and one broadcast.
constexpr int kTileRows = 6;
constexpr int kTileCols = 2;

// Dot products: rows of a tile, and its columns. One row needs as many sums as the FMA units have
// latency; of more rows, the pair of each column stays in registers beside the sums.
constexpr int kDotRows = 4;
constexpr int dot_tile_cols(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2; }

template <class V>
FIL_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// Like x86's max: the second operand wins when either is NaN.
template <class V>
FIL_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

// Whether a lane is.
template <class V, class T>
FIL_INLINE bool any_above(V x, T bound) {
  bool any = false;
  for (int i = 0; i < kWidth<T>; ++i) any |= x[i] > bound;
  return any;
}

template <class Acc, class T>
FIL_INLINE Vector<Acc> load_as(const T* p) {
  Vector<Acc> v;
  for (int i = 0; i < kWidth<Acc>; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class Acc, class T>
FIL_INLINE Vector<Acc> load_part_as(const T* p, int64_t count) {
  Vector<Acc> v = {};
  for (int i = 0; i < kWidth<Acc> && i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

// s[i] = the sum of the lanes of v[i].
template <class Acc>
FIL_INLINE void reduce_sum_4(const Vector<Acc>* v, Acc* s) {
  for (int i = 0; i < 4; ++i) s[i] = reduce_sum<Acc>(v[i]);
}

// dst[c][r] = src[r][c].
template <class Acc>
FIL_INLINE void transpose(int64_t rows, int64_t cols, const Acc* src, int64_t src_stride, Acc* dst,
                          int64_t dst_stride) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
