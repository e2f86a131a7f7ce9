// AVX2 level: 32-byte vectors with FMA and F16C.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

#include "cpu/isa/avx_common.inc"

// 16 registers: 6 x 2 accumulators, two columns of B and one broadcast.
constexpr int kTileRows = 6;
constexpr int kTileCols = 2;

// Dot products: rows of a tile, and its columns. One row needs as many sums as the FMA units have
// latency; of more rows, the pair of each column stays in registers beside the sums.
constexpr int kDotRows = 4;
constexpr int dot_tile_cols(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2; }

FIL_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
FIL_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}

// The second operand wins when either is NaN.
FIL_INLINE Vector<float> max(Vector<float> a, Vector<float> b) { return _mm256_max_ps(a, b); }
FIL_INLINE Vector<float> min(Vector<float> a, Vector<float> b) { return _mm256_min_ps(a, b); }
FIL_INLINE Vector<double> max(Vector<double> a, Vector<double> b) { return _mm256_max_pd(a, b); }

// Whether a lane is.
FIL_INLINE bool any_above(Vector<float> x, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
}
FIL_INLINE bool any_above(Vector<double> x, double bound) {
  return _mm256_movemask_pd(_mm256_cmp_pd(x, _mm256_set1_pd(bound), _CMP_GT_OQ)) != 0;
}

FIL_INLINE Vector<float> load_float(const float* p) { return _mm256_loadu_ps(p); }
FIL_INLINE Vector<double> load_float(const double* p) { return _mm256_loadu_pd(p); }
FIL_INLINE Vector<float> load_float(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FIL_INLINE Vector<float> load_float(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <class Acc, class T>
FIL_INLINE Vector<Acc> load_as(const T* p) {
  return load_float(p);
}

// Head dimensions are multiples of 8, which no vector of this level exceeds.
template <class Acc, class T>
FIL_INLINE Vector<Acc> load_part_as(const T* p, int64_t) {
  return load_float(p);
}

// s[i] = the sum of the lanes of v[i].
FIL_INLINE void reduce_sum_4(const Vector<float>* v, float* s) {
  _mm_storeu_ps(s, sum_lanes_4(v[0], v[1], v[2], v[3]));
}
FIL_INLINE void reduce_sum_4(const Vector<double>* v, double* s) {
  for (int i = 0; i < 4; ++i) s[i] = reduce_sum<double>(v[i]);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
