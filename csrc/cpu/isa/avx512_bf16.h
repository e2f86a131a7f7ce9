// AVX512-BF16: products of pairs, and rounding. avx512_bf16_emulation.h has the same for a
// processor without.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// sum[i] + the products of the two bfloat16 in `pair` and those in b[i].
FIL_INLINE Vector<float> dot_pairs(Vector<float> sum, uint32_t pair, Vector<uint32_t> b) {
  const __m512i a = _mm512_set1_epi32(static_cast<int>(pair));
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// Rounded to nearest even; NaN stays NaN, denormals become zero.
FIL_INLINE void store_bfloat16(BFloat16* to, Vector<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

struct WordOrder {
  alignas(64) uint16_t from[32];
};
constexpr WordOrder kInterleaved = [] {
  WordOrder order{};
  for (int i = 0; i < 32; ++i) order.from[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return order;
}();

// Two rows rounded likewise, interleaved: pairs[2i] is even[i], pairs[2i + 1] is odd[i].
FIL_INLINE __m512i store_pairs(BFloat16* pairs, Vector<float> even, Vector<float> odd) {
  const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even's first
  const __m512i order = _mm512_load_si512(kInterleaved.from);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, rows));
  return rows;
}

// And each of the rows.
FIL_INLINE void store_pairs(BFloat16* pairs, BFloat16* even_row, BFloat16* odd_row,
                            Vector<float> even, Vector<float> odd) {
  const __m512i rows = store_pairs(pairs, even, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even_row), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd_row), _mm512_extracti64x4_epi64(rows, 1));
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
