// Softmax with a unified maximum (FlashDecoding++, Hong et al., arXiv 2311.01282): every
// probability of a query head stands on one phi, so that partial results are sums and nothing is
// exchanged or rescaled while keys stream. Whether that was safe is seen at the end, once per row,
// by the guard of common/unified.h; a row where it was not is left to the online softmax.
//
// A row stands on its phi as the online softmax does on its base: state.row_max, which never moves.
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

// The largest score, in units of 1 / scale log2, of each row that a thread holds, for the guard
// alone: in words of its own in shared memory, for registers are dear while keys stream.
template <int kM, int kThreads>
struct LargestScores {
  static constexpr int bytes = kM * kThreads * 8;

  uint32_t base;  // of all threads; neighbours lie side by side

  __device__ __forceinline__ uint32_t at(int m) const {
    return base + static_cast<uint32_t>((m * kThreads + arch::thread_idx()) * 8);
  }

  __device__ __forceinline__ void reset() const {
#pragma unroll
    for (int m = 0; m < kM; ++m) arch::sts(at(m), Float2{kMinusInf, kMinusInf});
  }

  // NaN is passed over; the row's sum has met it.
  template <int kKeyTiles>
  __device__ __forceinline__ void raise(const float (&s)[kM][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Float2 largest = arch::lds<Float2>(at(m));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest.x = fmaxf(largest.x, fmaxf(s[m][n][0], s[m][n][1]));
        largest.y = fmaxf(largest.y, fmaxf(s[m][n][2], s[m][n][3]));
      }
      arch::sts(at(m), largest);
    }
  }

  // Of the row that the quad holds; scale brings it to units of log2.
  __device__ __forceinline__ float row_max(int m, int half, float scale) const {
    const auto largest = arch::lds<Float2>(at(m));
    return quad_max(half == 0 ? largest.x : largest.y) * scale;
  }
};

// The bits of |x| grow with it, and those of inf and NaN are the largest.
__device__ __forceinline__ uint32_t magnitude(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}

// A row after its unified pass, over all of its keys; scores in units of log2.
struct UnifiedRow {
  float row_max;
  float row_sum;
  float phi;
  uint32_t largest;  // magnitude() of its numerators

  // A row without keys has out 0 and lse -inf, whatever its numerators are.
  template <class Element>
  __device__ __forceinline__ RowVerdict verdict() const {
    // NaN scores leave no trace in row_max, but one in the sum.
    if (row_max == kMinusInf && row_sum == 0.f) return RowVerdict::kNoKey;
    constexpr UnifiedGuard guard = kUnifiedGuard<Element>;
    const float above = row_max - phi;
    const bool bounded = above > static_cast<float>(guard.low * kLog2E) &&
                         above < static_cast<float>(guard.high * kLog2E);
    constexpr uint32_t kInf = 0x7f800000u;
    // Quotients are looked at too: near the largest number one may round beyond it.
    const float quotient = std::bit_cast<float>(largest) * (1.f / row_sum);
    const bool finite = magnitude(row_sum) < kInf && magnitude(quotient) < kInf;
    return bounded && finite ? RowVerdict::kGood : RowVerdict::kViolated;
  }

  __device__ __forceinline__ float lse() const { return (phi + arch::log2(row_sum)) * kLn2; }
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
