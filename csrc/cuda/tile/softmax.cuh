// Softmax on fragments, in the exp2 domain: online (Dao, FlashAttention-2, arXiv 2307.08691), or on
// a base that never moves (unified.cuh).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147180559945309f;
constexpr double kLog2E = 1.44269504088896340736;

// A row's maximum over the quad that holds it; NaN is passed over, as fmaxf does.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, arch::shfl_xor(x, 1));
  return fmaxf(x, arch::shfl_xor(x, 2));
}

__device__ __forceinline__ uint32_t quad_max(uint32_t x) {
  x = std::max(x, arch::shfl_xor(x, 1));
  return std::max(x, arch::shfl_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += arch::shfl_xor(x, 1);
  return x + arch::shfl_xor(x, 2);
}

// Of the rows that a lane holds: [m][half] is row 16 m + 8 half + lane / 4.
template <int kM>
struct SoftmaxState {
  // The base that P and the sums stand on, log2. Online it is -inf before any key.
  float row_max[kM][2];
  float row_sum[kM][2];  // this lane's share

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = kMinusInf;
        row_sum[m][half] = 0.f;
      }
    }
  }
};

// The base moves only when a row's maximum has grown by more than 2^8: until then probabilities up
// to 2^8 are as exact, and the row's factor is exactly 1. The vote skips work, never changes it.
template <int kM, int kKeyTiles, int kTiles>
__device__ __forceinline__ void raise_base(const float (&s)[kM][kKeyTiles][4], float scale,
                                           SoftmaxState<kM>& state, float (&o)[kM][kTiles][4]) {
  float factor[kM][2];
  bool moved = false;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = kMinusInf;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      const float new_max = quad_max(largest) * scale;
      float& row_max = state.row_max[m][half];
      const bool grew = new_max > row_max + 8.f;
      factor[m][half] = grew ? arch::exp2(row_max - new_max) : 1.f;
      row_max = grew ? new_max : row_max;
      moved = moved || grew;
    }
  }
  if (!arch::any(moved)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) state.row_sum[m][half] *= factor[m][half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[m][n][e] *= factor[m][e / 2];
  }
}

// s, in units of 1 / scale log2, becomes the unnormalised probabilities. `scale` is positive. With
// kMarkHidden the probability of a hidden key is -0, which sums as 0 and can be told apart.
template <bool kMarkHidden, int kM, int kKeyTiles>
__device__ __forceinline__ void exponentials(float (&s)[kM][kKeyTiles][4], float scale,
                                             SoftmaxState<kM>& state) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // No key so far: every score is -inf, and any finite base keeps it at probability 0.
      const float row_max = state.row_max[m][half];
      const float base = row_max == kMinusInf ? 0.f : row_max;
      float sum = 0.f;  // of the block alone: over many keys each addition to row_sum rounds more
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const bool hidden = kMarkHidden && s[m][n][e] == kMinusInf;
          const float p = arch::exp2(fmaf(s[m][n][e], scale, -base));
          s[m][n][e] = hidden ? -0.f : p;
          sum += p;
        }
      }
      state.row_sum[m][half] += sum;
    }
  }
}

}  // namespace flashinfer_lite::tile
