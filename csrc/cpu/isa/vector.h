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
  // Adding it leaves round(x) + kBias in the low bits.
  static constexpr float kRound = 0x1.8p23f + 127;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMinExponent = -126;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
  static constexpr double kRound = 0x1.8p52 + 1023;
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

// Rows in memory, `stride` elements apart or each at an offset of its own.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* offset = nullptr;

  FIL_INLINE const T* operator[](int64_t r) const {
    return data + (offset ? offset[r] : r * stride);
  }
  FIL_INLINE Rows from(int64_t r) const {
    return offset ? Rows{data, stride, offset + r} : Rows{data + r * stride, stride};
  }
};

// Lane i of the result is lane i + distance of v, counted in a circle.
template <class T, int distance>
FIL_INLINE Vector<T> rotate_lanes(Vector<T> v) {
  Vector<typename BitsOf<T>::type> lanes;
  for (int i = 0; i < kWidth<T>; ++i) lanes[i] = (i + distance) % kWidth<T>;
  return __builtin_shuffle(v, lanes);
}

template <class T, int distance = kWidth<T> / 2>
FIL_INLINE T reduce_sum(Vector<T> v) {
  v += rotate_lanes<T, distance>(v);
  if constexpr (distance == 1) return v[0];
  if constexpr (distance > 1) return reduce_sum<T, distance / 2>(v);
}

// With NaN among the lanes the result is any of them: the row's sum is NaN then, whatever this
// says.
template <class T, int distance = kWidth<T> / 2>
FIL_INLINE T reduce_max(Vector<T> v) {
  const Vector<T> other = rotate_lanes<T, distance>(v);
  v = v > other ? v : other;
  if constexpr (distance == 1) return v[0];
  if constexpr (distance > 1) return reduce_max<T, distance / 2>(v);
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
