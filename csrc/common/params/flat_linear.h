// What one flat_linear call works on: out[m, n] = sum_k x[m, k] weight[n, k] + bias[n].
// Plain pointers and strides: no torch, no ownership.
#pragma once

#include <cstdint>

namespace flashinfer_lite {

enum class FlatLinearKernel : uint8_t { kGemv, kFlatGemm };

// The last dimension of every operand is contiguous; row strides are free and count elements.
struct FlatLinearParams {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;

  const void* x = nullptr;       // [m, k]
  const void* weight = nullptr;  // [n, k]
  const void* bias = nullptr;    // [n] or null
  void* out = nullptr;           // [m, n]
  int64_t x_row = 0;
  int64_t weight_row = 0;
  int64_t out_row = 0;

  int64_t weight_rows_per_task = 1;  // CPU only: speed, never bits
};

}  // namespace flashinfer_lite
