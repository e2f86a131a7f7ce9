// From q k^T to masked scores: lengths, causal, window, softcap, mask. Masking is by select with a
// true -inf, so what a hidden key or its mask holds never matters.
//
// Params is what common/params calls CudaAttentionParams; tiles know it by its members alone.
#pragma once

#include <cmath>
#include <limits>

#include "common/types.h"
#include "common/visible.h"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/softmax.cuh"

namespace flashinfer_lite::tile {

constexpr double kLog2E = 1.44269504088896340736;

// A length in device memory, clamped to [low, high]: a wrong value may not lead outside the cache.
template <class View>
__device__ __forceinline__ int64_t read_length(const View& view, int batch_idx, int64_t low,
                                               int64_t high, int64_t otherwise) {
  if (view.data == nullptr) return otherwise;
  const int64_t at = batch_idx * view.stride;
  const int64_t value = view.is_int64
                            ? arch::ldg(static_cast<const int64_t*>(view.data) + at)
                            : int64_t{arch::ldg(static_cast<const int32_t*>(view.data) + at)};
  return value < low ? low : value > high ? high : value;
}

// The slots of one sequence that hold keys. What else decides visibility is in Params: it is put
// together where it is needed, for registers are dear in between.
struct KeySlots {
  int begin;
  int end;

  template <class Params>
  __device__ __forceinline__ Visibility visibility(const Params& p) const {
    Visibility v;
    v.kv_begin = begin;
    v.kv_end = end;
    v.diagonal = p.alignment == Alignment::kBottomRight ? end - p.seqlen_q : 0;
    v.window_left = p.window_left;
    v.window_right = p.window_right;
    return v;
  }
};

template <class Params>
__device__ __forceinline__ KeySlots read_key_slots(const Params& p, int batch_idx) {
  const int64_t end = read_length(p.device_seqlens_kv, batch_idx, 0, p.seqlen_kv, p.seqlen_kv);
  const int64_t begin = read_length(p.device_kv_start, batch_idx, 0, end, 0);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

template <class Mask>
__device__ __forceinline__ int64_t mask_offset(const Mask& mask, int batch_idx, Row row) {
  return batch_idx * mask.batch + row.head * mask.head + row.query * mask.row;
}

// A bias in units of log2. What was finite stays finite: the lowest number is very unlikely, and
// only -inf hides.
constexpr float kLargest = std::numeric_limits<float>::max();

__device__ __forceinline__ float bias_log2(float bias) {
  const float scaled = bias * static_cast<float>(kLog2E);
  return fabsf(bias) <= kLargest ? fminf(fmaxf(scaled, -kLargest), kLargest) : bias;
}

__device__ __forceinline__ float bias_log2(double bias) {
  const double scaled = fmin(fmax(bias * kLog2E, -double{kLargest}), double{kLargest});
  return static_cast<float>(fabs(bias) <= std::numeric_limits<double>::max() ? scaled : bias);
}

// The additive mask at one pair, in units of log2; 0 where a bool mask shows the key and -inf where
// it hides it.
template <class Mask>
__device__ __forceinline__ float read_mask(const Mask& mask, int64_t at) {
  switch (mask.type) {
    case MaskType::kBool:
      return arch::ldg(static_cast<const uint8_t*>(mask.data) + at) != 0 ? 0.f : kMinusInf;
    case MaskType::kFloat64:
      return bias_log2(arch::ldg(static_cast<const double*>(mask.data) + at));
    case MaskType::kFloat32:
      return bias_log2(arch::ldg(static_cast<const float*>(mask.data) + at));
    case MaskType::kBFloat16:
      return bias_log2(arch::to_float(arch::ldg(static_cast<const BFloat16*>(mask.data) + at)));
    case MaskType::kFloat16:
      return bias_log2(arch::to_float(arch::ldg(static_cast<const Float16*>(mask.data) + at)));
    default:
      return 0.f;
  }
}

// Replaces each score x of the first row that the lane holds, in column `col` of the tile, by f(x,
// col). The loop stays a loop, so that a costly f is compiled once and not once per element:
// registers cannot be indexed, so they rotate.
template <int kM, int kTiles, class F>
__device__ __forceinline__ void replace_in_first_row(float (&s)[kM][kTiles][4], int lane,
                                                     const F& f) {
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x = f(s[0][0][e], n * 8 + lane % 4 * 2 + e);
#pragma unroll
      for (int i = 0; i + 1 < kTiles; ++i) s[0][i][e] = s[0][i + 1][e];
      s[0][kTiles - 1][e] = x;
    }
  }
}

// The second row that the lane holds becomes the first, the first the last.
template <int kM, int kTiles>
__device__ __forceinline__ void rotate_rows(float (&s)[kM][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float first = s[0][n][e];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        s[m][n][e] = s[m][n][e + 2];
        s[m][n][e + 2] = m + 1 < kM ? s[(m + 1) % kM][n][e] : first;
      }
    }
  }
}

template <int kM, int kTiles>
__device__ __forceinline__ void multiply(float (&s)[kM][kTiles][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] *= factor;
}

// Where a warp's scores lie: its first row among the rows of the KV head, its first key.
struct ScoreOrigin {
  int batch_idx;
  int row;
  int key;
};

// Scale, softcap and mask, in units of log2.
template <class Params, int kM, int kTiles>
__device__ __forceinline__ void scale_scores(float (&s)[kM][kTiles][4], const Params& p,
                                             const PackedRows& rows, const KeySlots& slots,
                                             const ScoreOrigin& at, int lane) {
  if (p.softcap == 0) multiply(s, p.scale_log2);
#pragma unroll 1
  for (int i = 0; i < kM * 2; ++i) {  // all rows that the lane holds
    if (p.softcap != 0) {
      replace_in_first_row(s, lane,
                           [&](float x, int) { return p.from_cap * arch::tanh(x * p.to_cap); });
    }
    const int r = at.row + i * 8 + lane / 4;
    if (p.mask.type != MaskType::kNone && arch::predicate(r < rows.rows)) {
      const int64_t row_offset = mask_offset(p.mask, at.batch_idx, rows[r]);
      replace_in_first_row(s, lane, [&](float x, int col) {
        const int key = at.key + col;
        if (!arch::predicate(key < slots.end)) return x;
        const float bias = read_mask(p.mask, row_offset + key * p.mask.col);
        return bias == kMinusInf ? kMinusInf : x + bias;  // what the mask hides, NaN too
      });
    }
    rotate_rows(s);
  }
}

// Hidden scores become -inf: by length, causal and window.
template <class Params, int kM, int kTiles>
__device__ __forceinline__ void hide_scores(float (&s)[kM][kTiles][4], const Params& p,
                                            const PackedRows& rows, const KeySlots& slots,
                                            const ScoreOrigin& at, int lane) {
  const Visibility visible = slots.visibility(p);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.row + m * 16 + half * 8 + lane / 4;
      const KeyRange range = visible.row(rows[r].query);
      const int begin = static_cast<int>(range.begin) - at.key - lane % 4 * 2;
      const int end = static_cast<int>(range.end) - at.key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = n * 8 + e;
          float& score = s[m][n][2 * half + e];
          score = col >= begin && col < end ? score : kMinusInf;
        }
      }
    }
  }
}

}  // namespace flashinfer_lite::tile
