// Softmax on a unified maximum (FlashDecoding++, Hong et al., arXiv 2311.01282): every probability
// of a query head stands on one phi, so that partial results are sums and nothing is exchanged or
// rescaled while keys stream. What that may overflow or lose is seen at the end, once per row; such
// a row is left to the online softmax.
//
// The kernel keeps phi of its rows in words of shared memory: registers are dear in between.
#pragma once

#include <bit>

#include "common/unified.h"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/softmax.cuh"

namespace flashinfer_lite::tile {

// What is no number, or too large for one in units of log2, fails the guard of every row.
__device__ __forceinline__ float phi_log2_of(float phi) {
  constexpr float kMost = std::numeric_limits<float>::max();
  return fminf(fmaxf(phi * static_cast<float>(kLog2E), -kMost), kMost);
}

// The base of a row of that head, in units of log2 and finite.
template <class Params>
__device__ __forceinline__ float phi_log2(const Params& p, int head) {
  return p.phi_heads == nullptr ? p.phi_log2 : phi_log2_of(arch::ldg(p.phi_heads + head));
}

// The largest score, in units of 1 / scale log2, of each row that a lane holds, for the guard alone:
// in words of the lane's own in shared memory, for registers are dear while keys stream.
template <int kM>
struct LargestScores {
  static constexpr int bytes = kM * 8;  // of a lane

  uint32_t address;

  __device__ __forceinline__ void reset() const {
#pragma unroll
    for (int m = 0; m < kM; ++m) arch::sts(address + m * 8, Float2{kMinusInf, kMinusInf});
  }

  // NaN is passed over; the row's sum has met it.
  template <int kKeyTiles>
  __device__ __forceinline__ void raise(const float (&s)[kM][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Float2 largest = arch::lds<Float2>(address + m * 8);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest.x = fmaxf(largest.x, fmaxf(s[m][n][0], s[m][n][1]));
        largest.y = fmaxf(largest.y, fmaxf(s[m][n][2], s[m][n][3]));
      }
      arch::sts(address + m * 8, largest);
    }
  }

  __device__ __forceinline__ float of(int m, int half) const {
    return arch::lds<float>(address + m * 8 + half * 4);
  }
};

// The bits of |x| grow with it, and those of inf and NaN are the largest.
__device__ __forceinline__ uint32_t magnitude(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}

// A row after its unified pass, over all of its keys.
struct UnifiedRow {
  float excess;  // of its largest score over phi, log2
  float row_sum;
  float phi;         // log2
  uint32_t largest;  // magnitude() of its numerators

  // No key was seen: out is 0 and lse -inf, whatever the numerators are. NaN is no such score.
  __device__ __forceinline__ bool empty() const { return excess == kMinusInf && row_sum == 0.f; }

  // Whether out and lse are to be had from the sums, to the precision of the online softmax.
  template <class Element>
  __device__ __forceinline__ bool in_range() const {
    constexpr UnifiedGuard guard = unified_guard<Element>();
    const bool bounded = excess * kLn2 > guard.low && excess * kLn2 < guard.high;
    const bool finite = magnitude(row_sum) < magnitude(-kMinusInf) && largest < magnitude(-kMinusInf);
    const bool tiny = excess < 0.f && largest < magnitude(kUnifiedTiny);
    return bounded && finite && !tiny;
  }

  __device__ __forceinline__ float inverse() const { return empty() ? 0.f : 1.f / row_sum; }
  __device__ __forceinline__ float lse() const {
    return empty() ? kMinusInf : (phi + arch::log2(row_sum)) * kLn2;
  }
};

// Adds rows to the device's counters; one lane calls it for its warp.
template <class Counters>
__device__ __forceinline__ void count_rows(Counters* counters, uint32_t checked,
                                           uint32_t recomputed) {
  if (counters == nullptr) return;
  if (checked > 0) arch::atomic_add(&counters->checked, uint64_t{checked});
  if (recomputed > 0) arch::atomic_add(&counters->recomputed, uint64_t{recomputed});
}

}  // namespace flashinfer_lite::tile
