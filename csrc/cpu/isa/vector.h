// The vector type of a level and what every level does with it the same way.
//
// A level is one translation unit: it defines FIL_CPU_LEVEL (its namespace) and
// FIL_VECTOR_BYTES, opens its `#pragma GCC target` region and includes the kernels. Nothing may be
// defined outside the level's namespace in there: an inline function shared with another level
// would let the linker choose code that this machine cannot run.
#pragma once

#define FIL_INLINE inline __attribute__((always_inline))

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FIL_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kWidth = FIL_VECTOR_BYTES / sizeof(T);

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low mantissa bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMinExponent = -126;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMinExponent = -1022;
};

template <class T>
FIL_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FIL_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
FIL_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

template <class T>
FIL_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FIL_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
FIL_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

template <class T>
FIL_INLINE T reduce_sum(Vector<T> v) {
  T lane[kWidth<T>];
  store(lane, v);
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// With NaN among the lanes the result is any of them: the row's sum is NaN then, whatever this
// says.
template <class T>
FIL_INLINE T reduce_max(Vector<T> v) {
  T lane[kWidth<T>];
  store(lane, v);
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
