// What avx512_bf16.h has, for a processor without AVX512-BF16: every bit as Intel's manual defines
// the instructions (volume 2, VDPBF16PS, VCVTNEPS2BF16), but for the payload of a NaN and for
// denormals in products, which count here as the caller's floating point environment has it.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

FIL_INLINE Vector<float> as_float(Vector<uint32_t> words) {
  Vector<float> x;
  __builtin_memcpy(&x, &words, sizeof x);
  return x;
}
FIL_INLINE Vector<uint32_t> as_words(Vector<float> x) {
  Vector<uint32_t> words;
  __builtin_memcpy(&words, &x, sizeof words);
  return words;
}

// sum[i] + the products of the two bfloat16 in `pair` and those in b[i], the upper ones first.
FIL_INLINE Vector<float> dot_pairs(Vector<float> sum, uint32_t pair, Vector<uint32_t> b) {
  const Vector<uint32_t> a = pair - Vector<uint32_t>{};
  sum = fma(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), sum);
  return fma(as_float(a << 16), as_float(b << 16), sum);
}

// As VCVTNEPS2BF16, in the low half of each word: rounded to nearest even; NaN stays NaN, denormals
// become zero.
FIL_INLINE Vector<uint32_t> rounded_words(Vector<float> x) {
  const Vector<uint32_t> word = as_words(x), magnitude = word & 0x7fffffffu;
  Vector<uint32_t> rounded = (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
  rounded = magnitude < 0x00800000u ? word >> 31 << 15 : rounded;
  return magnitude > 0x7f800000u ? word >> 16 | 0x40u : rounded;
}

FIL_INLINE void store_bfloat16(BFloat16* to, Vector<float> x) {
  typedef uint16_t Half __attribute__((vector_size(FIL_VECTOR_BYTES / 2)));
  const Half half = __builtin_convertvector(rounded_words(x), Half);
  __builtin_memcpy(to, &half, sizeof half);
}

// Two rows interleaved: pairs[2i] is even[i], pairs[2i + 1] is odd[i].
FIL_INLINE void store_pairs(BFloat16* pairs, Vector<float> even, Vector<float> odd) {
  const Vector<uint32_t> words = rounded_words(even) | rounded_words(odd) << 16;
  __builtin_memcpy(pairs, &words, sizeof words);
}

// And each of the rows.
FIL_INLINE void store_pairs(BFloat16* pairs, BFloat16* even_row, BFloat16* odd_row,
                            Vector<float> even, Vector<float> odd) {
  store_pairs(pairs, even, odd);
  store_bfloat16(even_row, even);
  store_bfloat16(odd_row, odd);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
