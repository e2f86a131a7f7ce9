// Merges the states (out, lse) of one row over disjoint keys, by one warp, in order.
#pragma once

#include "common/heuristics.h"
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

// out[first_col, first_col + kMergedColumns) of cols <- the merge; returns the sum of the weights.
// A state with lse = -inf is empty and its out is not read.
template <class Partial, class Element>
__device__ __forceinline__ float merge_columns(const RowStates<Partial>& states, float largest,
                                               Element* out, int64_t first_col, int64_t cols,
                                               int lane) {
  constexpr auto kLog2EFloat = static_cast<float>(kLog2E);
  // States whose loads are under way together: each alone would be waited for, which took longer
  // than a short decode.
  constexpr int kAhead = 8;
  constexpr int kColumns = kMergedColumns / 32;
  float sum[kColumns] = {};
  float weights = 0.f;
#pragma unroll 1
  for (int64_t first = 0; first < states.count; first += 32) {
    // A lane reads the lse of one state and keeps its weight for all.
    const bool exists = first + lane < states.count;
    const float lse =
        exists ? arch::ldg(states.lse + (first + lane) * states.lse_stride) : kMinusInf;
    const float own = lse == kMinusInf ? 0.f : arch::exp2((lse - largest) * kLog2EFloat);
    const uint32_t full = arch::ballot(lse != kMinusInf);
    const auto here = static_cast<int>(states.count - first < 32 ? states.count - first : 32);
#pragma unroll 1
    for (int s = 0; s < here; s += kAhead) {
      float value[kAhead][kColumns] = {};
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        // Neither an empty state, which may hold anything, nor one behind the last.
        const bool read = (full >> (s + ahead) & 1u) != 0;
        const Partial* state = states.out + (first + s + ahead) * states.out_stride;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int64_t col = first_col + i * 32 + lane;
          if (!arch::predicate(read && col < cols)) continue;
          value[ahead][i] = arch::to_float(arch::ldg(state + col));
        }
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const float weight = arch::shfl(own, s + ahead);
        weights += weight;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[i] = fmaf(weight, value[ahead][i], sum[i]);
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
  return weights;
}

__device__ __forceinline__ float merged_lse(float largest, float weights) {
  return weights == 0.f ? kMinusInf : largest + arch::log2(weights) * kLn2;
}

// out[cols] <- the merge, by one warp; returns its lse.
template <class Partial, class Element>
__device__ __forceinline__ float merge_row(const RowStates<Partial>& states, Element* out,
                                           int64_t cols, int lane) {
  const float largest = largest_lse(states, lane);
  float weights = 0.f;
#pragma unroll 1
  for (int64_t first_col = 0; first_col < cols; first_col += kMergedColumns) {
    weights = merge_columns(states, largest, out, first_col, cols, lane);
  }
  return merged_lse(largest, weights);
}

}  // namespace flashinfer_lite::tile
