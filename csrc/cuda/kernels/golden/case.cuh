// What the golden cases share. A case calls a few functions of cuda/arch and writes what they give;
// its output is a pure function of its input, so that a GPU and the executor can be held to the
// same table of expected words (tests/golden_table.py).
#pragma once

#include <bit>
#include <cstdint>

#include "common/types.h"
#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::golden {

struct Params {
  const uint32_t* in;
  uint32_t* out;
  arch::TensorMap map;  // of TmaLoad only
};

inline constexpr int kWarpSize = 32;

// The launch of a case that says nothing else.
struct OneWarp {
  static constexpr uint32_t blocks = 1;
  static constexpr uint32_t threads = kWarpSize;
  static constexpr uint32_t smem_bytes = 2048;
};

struct FourWarps : OneWarp {
  static constexpr uint32_t threads = 4 * kWarpSize;
};

__device__ __forceinline__ uint32_t read(const Params& p, int i) { return arch::ldg(p.in + i); }

__device__ __forceinline__ void write(const Params& p, int i, uint32_t word) {
  arch::stg(p.out + i, word);
}

__device__ __forceinline__ float read_float(const Params& p, int i) {
  return std::bit_cast<float>(read(p, i));
}

__device__ __forceinline__ void write_float(const Params& p, int i, float value) {
  write(p, i, std::bit_cast<uint32_t>(value));
}

}  // namespace flashinfer_lite::golden
