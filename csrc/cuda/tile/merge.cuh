// Merges the states (out, lse) of one row over disjoint keys, by one warp, in order.
#pragma once

#include "cuda/tile/softmax.cuh"

namespace flashinfer_lite::tile {

// Of one row: its first state, and the strides from one to the next.
template <class Partial>
struct RowStates {
  const Partial* out;
  const float* lse;
  int64_t out_stride;
  int64_t lse_stride;
  int64_t count;
};

// The largest lse of the row's states. A NaN is passed over here and met again in its weight.
template <class Partial>
__device__ __forceinline__ float largest_lse(const RowStates<Partial>& states, int lane) {
  float largest = kMinusInf;
#pragma unroll 1
  for (int64_t s = lane; s < states.count; s += 32) {
    largest = fmaxf(largest, arch::ldg(states.lse + s * states.lse_stride));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, arch::shfl_xor(largest, distance));
  }
  return largest;
}

// out[cols] <- the merge; returns its lse. A state with lse = -inf is empty and its out is not
// read.
template <class Partial, class Element>
__device__ __forceinline__ float merge_row(const RowStates<Partial>& states, Element* out,
                                           int64_t cols, int lane) {
  constexpr auto kLog2EFloat = static_cast<float>(kLog2E);
  constexpr int kColumns = 256 / 32;  // per lane, at a time
  const float largest = largest_lse(states, lane);
  float weights = 0.f;
  int64_t first_col = 0;
  do {  // once for heads to 256
    float sum[kColumns] = {};
    weights = 0.f;
#pragma unroll 1
    for (int64_t first = 0; first < states.count; first += 32) {
      // A lane reads the lse of one state and keeps its weight for all.
      const bool exists = first + lane < states.count;
      const float lse =
          exists ? arch::ldg(states.lse + (first + lane) * states.lse_stride) : kMinusInf;
      const float own = lse == kMinusInf ? 0.f : arch::exp2((lse - largest) * kLog2EFloat);
      const auto here = static_cast<int>(states.count - first < 32 ? states.count - first : 32);
      const uint32_t full = arch::ballot(lse != kMinusInf);
#pragma unroll 4
      for (int s = 0; s < here; ++s) {
        const float weight = arch::shfl(own, s);
        if ((full >> s & 1u) == 0) continue;  // empty: its out may hold anything
        weights += weight;
        const Partial* state = states.out + (first + s) * states.out_stride;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int64_t col = first_col + i * 32 + lane;
          if (!arch::predicate(col < cols)) continue;
          sum[i] = fmaf(weight, arch::to_float(arch::ldg(state + col)), sum[i]);
        }
      }
    }
    const float inverse = weights == 0.f ? 0.f : 1.f / weights;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t col = first_col + i * 32 + lane;
      if (!arch::predicate(col < cols)) continue;
      arch::stg(out + col, arch::from_float<Element>(sum[i] * inverse));
    }
    first_col += kColumns * 32;
  } while (first_col < cols);
  return weights == 0.f ? kMinusInf : largest + arch::log2(weights) * kLn2;
}

}  // namespace flashinfer_lite::tile
