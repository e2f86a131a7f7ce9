// Elementary functions on vectors.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// 2^f on [-1/2, 1/2], by Horner; exactly 1 at 0, so that a row with one key returns V bit for bit.
// float: minimax, relative error 2e-9. double: Taylor, relative error below 2^-54.
template <class V>
FIL_INLINE V exp2_fraction(V f, float) {
  V p = fma(f, broadcast<float>(0x1.4201eap-13f), broadcast<float>(0x1.5f3e6ep-10f));
  p = fma(p, f, broadcast<float>(0x1.3b2d44p-7f));
  p = fma(p, f, broadcast<float>(0x1.c6aee8p-5f));
  p = fma(p, f, broadcast<float>(0x1.ebfbdcp-3f));
  p = fma(p, f, broadcast<float>(0x1.62e430p-1f));
  return fma(p, f, broadcast<float>(1.0f));
}
template <class V>
FIL_INLINE V exp2_fraction(V f, double) {
  constexpr double ln2 = 0.693147180559945309417232;
  double term = 1.0, coefficient[14];
  for (int k = 0; k < 14; ++k) {
    coefficient[k] = term;
    term *= ln2 / (k + 1);
  }
  V p = broadcast<double>(coefficient[13]);
#pragma GCC unroll 16
  for (int k = 12; k >= 0; --k) p = fma(p, f, broadcast<double>(coefficient[k]));
  return p;
}

// 2^x for x <= 126; 0 below the smallest normal; NaN stays NaN.
template <class T>
FIL_INLINE Vector<T> exp2(Vector<T> x) {
  using B = BitsOf<T>;
  using Bits = Vector<typename B::type>;
  const Vector<T> lowest = broadcast<T>(B::kMinExponent);
  const Vector<T> clamped = max(lowest, x);
  const Vector<T> rounded = clamped + B::kRound;
  const Vector<T> power = exp2_fraction(clamped - (rounded - B::kRound), T{});
  Bits exponent;
  __builtin_memcpy(&exponent, &rounded, sizeof exponent);
  exponent = (exponent + B::kBias) << B::kMantissa;
  Vector<T> scale;
  __builtin_memcpy(&scale, &exponent, sizeof scale);
  return x < lowest ? Vector<T>{} : power * scale;
}

// tanh(x) = sign(x) (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2, with e = exp(-2 |x|): written
// so, the slope keeps its digits where tanh is all but 1.
template <class T>
FIL_INLINE Vector<T> tanh(Vector<T> x, Vector<T>& slope) {
  const Vector<T> magnitude = x < T{0} ? -x : x;
  const Vector<T> e = exp2<T>(magnitude * T(-2.88539008177792681471985));  // -2 log2(e)
  const Vector<T> inverse = T{1} / (T{1} + e);
  const Vector<T> t = (T{1} - e) * inverse;
  slope = T{4} * e * inverse * inverse;
  return x < T{0} ? -t : t;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
