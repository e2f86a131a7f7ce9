// Golden cases: scalar arithmetic, one value a lane.
#pragma once

#include "cuda/kernels/golden/case.cuh"

namespace flashinfer_lite::golden {

struct Exp2 : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    write_float(p, lane, arch::exp2(read_float(p, lane)));
  }
};

struct Log2 : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    write_float(p, lane, arch::log2(read_float(p, lane)));
  }
};

struct Tanh : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    write_float(p, lane, arch::tanh(read_float(p, lane)));
  }
};

// in: 32 values lo, then 32 values hi.
template <class Element>
struct Pack : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const float lo = read_float(p, lane);
    const float hi = read_float(p, kWarpSize + lane);
    write(p, lane, arch::pack<Element>(lo, hi));
  }
};

template <class Element>
struct ToFloat : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    if constexpr (sizeof(Element) == 4) {
      write_float(p, lane, arch::to_float(read_float(p, lane)));
    } else {
      const Element x{static_cast<uint16_t>(read(p, lane))};
      write_float(p, lane, arch::to_float(x));
    }
  }
};

template <class Element>
struct FromFloat : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const Element x = arch::from_float<Element>(read_float(p, lane));
    if constexpr (sizeof(Element) == 4) {
      write_float(p, lane, x);
    } else {
      write(p, lane, x.bits);
    }
  }
};

struct Predicate : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    write(p, lane, arch::predicate(read(p, lane) != 0));
  }
};

struct Opaque : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    write(p, lane, arch::opaque(read(p, lane)));
  }
};

}  // namespace flashinfer_lite::golden
