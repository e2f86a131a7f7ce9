// AVX-512 level: 64-byte vectors. fp64 runs at the AVX2 level, so only float accumulates here.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

#include "cpu/isa/avx_common.inc"

// 32 registers: 12 x 2 accumulators, two columns of B and one broadcast.
constexpr int kTileRows = 12;
constexpr int kTileCols = 2;

// Dot products: rows of a tile, and its columns. One row needs as many sums as the FMA units have
// latency; of more rows, the pair of each column stays in registers beside the sums.
constexpr int kDotRows = 6;
constexpr int dot_tile_cols(int rows) { return rows == 1 ? 8 : rows < 6 ? 4 : 3; }

FIL_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}

// The second operand wins when either is NaN.
FIL_INLINE Vector<float> max(Vector<float> a, Vector<float> b) { return _mm512_max_ps(a, b); }
FIL_INLINE Vector<float> min(Vector<float> a, Vector<float> b) { return _mm512_min_ps(a, b); }

// Whether a lane is.
FIL_INLINE bool any_above(Vector<float> x, float bound) {
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
}

FIL_INLINE Vector<float> widen(__m256i bits, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FIL_INLINE Vector<float> widen(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }

FIL_INLINE Vector<float> load_float(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
FIL_INLINE Vector<float> load_float(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}

FIL_INLINE Vector<float> load_part_float(const float* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
template <class T>
FIL_INLINE Vector<float> load_part_float(const T* p, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, p), p);
}

template <class Acc, class T>
FIL_INLINE Vector<Acc> load_as(const T* p) {
  return load_float(p);
}

// The first `count` elements, zeros behind them; reads no further.
template <class Acc, class T>
FIL_INLINE Vector<Acc> load_part_as(const T* p, int64_t count) {
  return load_part_float(p, static_cast<__mmask16>((1u << count) - 1));
}

// s[i] = the sum of the lanes of v[i].
FIL_INLINE void reduce_sum_4(const Vector<float>* v, float* s) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  }
  _mm_storeu_ps(s, sum_lanes_4(half[0], half[1], half[2], half[3]));
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
