// Storage types of the 16-bit floating point formats and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace flashinfer_lite {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double to_float(double x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  // Shifting exponent and mantissa into place leaves the value a factor 2^112 too small, which
  // also normalises subnormals; only inf and NaN (exponent 31) need their exponent filled up.
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31;
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu;
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(bits_from_float(scaled) | special | sign);
}

// from_float<T>: round to nearest even; NaN stays NaN.
template <class T>
inline T from_float(double x) {
  return static_cast<T>(x);
}

template <>
inline BFloat16 from_float<BFloat16>(double x) {
  const float rounded = static_cast<float>(x);
  const uint32_t bits = bits_from_float(rounded);
  if (rounded != rounded) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(double x) {
  const float rounded = static_cast<float>(x);
  const uint32_t bits = bits_from_float(rounded);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the spacing is 2^-24: adding 0.5 puts that spacing at the float's last bit, so
    // the addition itself rounds to nearest even.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_from_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rebased = magnitude - 0x38000000u;  // exponent bias 127 -> 15
  return {static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13)};
}

// Accumulator<T>: the type in which scores, softmax and sums are computed.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace flashinfer_lite
