// Elementary functions on vectors.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// (2^f - 1) / f on [-1/2, 1/2], by Horner. float: minimax, relative error of 2^f 2e-9. double:
// Taylor, below 2^-54.
template <class V>
FIL_INLINE V exp2m1_over(V f, float) {
  V p = fma(f, broadcast<float>(0x1.4201eap-13f), broadcast<float>(0x1.5f3e6ep-10f));
  p = fma(p, f, broadcast<float>(0x1.3b2d44p-7f));
  p = fma(p, f, broadcast<float>(0x1.c6aee8p-5f));
  p = fma(p, f, broadcast<float>(0x1.ebfbdcp-3f));
  return fma(p, f, broadcast<float>(0x1.62e430p-1f));
}
template <class V>
FIL_INLINE V exp2m1_over(V f, double) {
  constexpr double ln2 = 0.693147180559945309417232;
  double term = ln2, coefficient[13];
  for (int k = 0; k < 13; ++k) {
    coefficient[k] = term;
    term *= ln2 / (k + 2);
  }
  V p = broadcast<double>(coefficient[12]);
#pragma GCC unroll 16
  for (int k = 11; k >= 0; --k) p = fma(p, f, broadcast<double>(coefficient[k]));
  return p;
}

// 2^x = scale (1 + f slope) with scale a power of two, for x in [minimum exponent, 126].
template <class T>
struct PowerOfTwo {
  Vector<T> scale, f, slope;
};

template <class T>
FIL_INLINE PowerOfTwo<T> split_exp2(Vector<T> x) {
  using B = BitsOf<T>;
  const Vector<T> rounded = x + B::kRound;
  const Vector<T> f = x - (rounded - B::kRound);
  Vector<typename B::type> exponent;
  __builtin_memcpy(&exponent, &rounded, sizeof exponent);
  exponent <<= B::kMantissa;
  Vector<T> scale;
  __builtin_memcpy(&scale, &exponent, sizeof scale);
  return {scale, f, exp2m1_over(f, T{})};
}

// 2^x for x <= 126; exactly 1 at 0, so that a row with one key returns V bit for bit; 0 below the
// smallest normal; NaN stays NaN.
template <class T>
FIL_INLINE Vector<T> exp2(Vector<T> x) {
  const Vector<T> lowest = broadcast<T>(BitsOf<T>::kMinExponent);
  const PowerOfTwo<T> p = split_exp2<T>(max(lowest, x));
  return x < lowest ? Vector<T>{} : fma(p.f, p.slope, broadcast<T>(1)) * p.scale;
}

// 2^x for x <= 126 where 16 bits will be left of it: relative error 3e-6, by minimax; exactly 1 at
// 0; 0 from -126.5 down, where the exponent's bits are 0; NaN stays NaN.
FIL_INLINE Vector<float> exp2_short(Vector<float> x) {
  x = max(broadcast<float>(-BitsOf<float>::kBias), x);
  const Vector<float> rounded = x + BitsOf<float>::kRound;
  const Vector<float> f = x - (rounded - BitsOf<float>::kRound);
  Vector<float> p = fma(f, broadcast<float>(0x1.3a02ccp-7f), broadcast<float>(0x1.c9fc46p-5f));
  p = fma(p, f, broadcast<float>(0x1.ec0378p-3f));
  p = fma(p, f, broadcast<float>(0x1.62e12cp-1f));
  p = fma(p, f, broadcast<float>(1.0f));
  Vector<int32_t> exponent;
  __builtin_memcpy(&exponent, &rounded, sizeof exponent);
  exponent <<= BitsOf<float>::kMantissa;
  Vector<float> scale;
  __builtin_memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// tanh(x) = sign(x) -m / (2 + m) and its slope 4 (1 + m) / (2 + m)^2, with m = exp(-2 |x|) - 1.
// Kept apart from its 1, m has all its digits near 0, as a large softcap needs; 1 + m has them
// where tanh is all but 1, as the slope needs.
template <class T>
FIL_INLINE Vector<T> tanh(Vector<T> x, Vector<T>& slope) {
  const Vector<T> magnitude = x < T{0} ? -x : x;
  const Vector<T> exponent = magnitude * T(-2.88539008177792681471985);  // -2 log2(e)
  const PowerOfTwo<T> p = split_exp2<T>(max(broadcast<T>(BitsOf<T>::kMinExponent), exponent));
  const Vector<T> fraction = p.f * p.slope;
  const Vector<T> m = fma(fraction, p.scale, p.scale - T{1});
  const Vector<T> inverse = T{1} / (T{2} + m);
  const Vector<T> t = -m * inverse;
  slope = T{4} * (fraction + T{1}) * p.scale * inverse * inverse;
  return x < T{0} ? -t : t;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
