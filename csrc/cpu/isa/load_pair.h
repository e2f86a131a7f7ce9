// Loads for dot products along a row, where any order of its elements serves that both factors
// share.
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// 2 kWidth elements in the order of the element type.
template <class Acc>
struct Pair {
  Vector<Acc> first, second;
};
template <class Acc>
constexpr int kPairWidth = 2 * kWidth<Acc>;

template <class Acc, class T>
FIL_INLINE Pair<Acc> load_pair(const T* p) {
  return {load_as<Acc>(p), load_as<Acc>(p + kWidth<Acc>)};
}

// What was stored as a pair.
template <class Acc>
FIL_INLINE Pair<Acc> load_stored_pair(const Acc* p) {
  return {load(p), load(p + kWidth<Acc>)};
}

// A word holds two bfloat16, and one operation makes a float of either: widening each half of the
// vector takes two, one of them a shuffle.
template <class Acc>
FIL_INLINE Pair<Acc> load_pair(const BFloat16* p) {
  Vector<uint32_t> words;
  __builtin_memcpy(&words, p, sizeof words);
  const Vector<uint32_t> low = words << 16, high = words & 0xffff0000u;
  Pair<Acc> pair;
  __builtin_memcpy(&pair.first, &low, sizeof low);
  __builtin_memcpy(&pair.second, &high, sizeof high);
  return pair;
}

// The first `count` elements, zeros for the others; reads no further.
template <class Acc, class T>
FIL_INLINE Pair<Acc> load_part_pair(const T* p, int64_t count) {
  T part[kPairWidth<Acc>] = {};
  __builtin_memcpy(part, p, count * sizeof(T));
  return load_pair<Acc>(part);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
