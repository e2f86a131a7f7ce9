// From q k^T to masked scores: lengths, causal, window, softcap, ALiBi, mask. Masking is by select
// with a true -inf, so what a hidden key or its mask holds never matters.
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

template <class View>
__device__ __forceinline__ int64_t read_length(const View& view, int batch_idx, int64_t otherwise) {
  if (view.data == nullptr) return otherwise;
  const int64_t at = batch_idx * view.stride;
  return view.is_int64 ? arch::ldg(static_cast<const int64_t*>(view.data) + at)
                       : int64_t{arch::ldg(static_cast<const int32_t*>(view.data) + at)};
}

// The slots of one sequence that hold keys. What else decides visibility is in Params: it is put
// together where it is needed, for registers are dear in between.
struct KeySlots {
  int begin;
  int end;

  template <class Params>
  __device__ __forceinline__ Visibility visibility(const Params& p) const {
    return visibility(p, p.seqlen_q);
  }
  // Which of the sequences, where `batch_idx` is which of the batch.
  template <class Params>
  __device__ __forceinline__ int sequence_of(const Params&, int batch_idx) const {
    return batch_idx;
  }

 protected:
  template <class Params>
  __device__ __forceinline__ Visibility visibility(const Params& p, int64_t seqlen_q) const {
    Visibility v;
    v.kv_begin = begin;
    v.kv_end = end;
    v.diagonal = p.alignment == Alignment::kBottomRight ? end - seqlen_q : 0;
    v.window_left = p.window_left;
    v.window_right = p.window_right;
    return v;
  }
};

// The same where each sequence has queries of its own number.
struct SequenceSlots : KeySlots {
  int seqlen_q;

  // Sought again, since registers are dear: the last that begins no later than its first row,
  // batch_q, for those without rows may begin there too.
  template <class Params>
  __device__ __forceinline__ int sequence_of(const Params& p, int batch_q) const {
    int low = 0;
    auto high = static_cast<int>(p.ragged.sequences);
#pragma unroll 1
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      const bool begun = read_length(p.ragged.q, middle, 0) <= batch_q;
      low = begun ? middle : low;
      high = begun ? high : middle;
    }
    return low;
  }
  template <class Params>
  __device__ __forceinline__ Visibility visibility(const Params& p) const {
    return KeySlots::visibility(p, seqlen_q);
  }
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Clamped: a wrong length may not lead outside the cache. Both are loaded before either is used.
template <class Params>
__device__ __forceinline__ KeySlots read_key_slots(const Params& p, int batch_idx,
                                                   int64_t seqlen_kv) {
  const int64_t end = read_length(p.device_seqlens_kv, batch_idx, seqlen_kv);
  const int64_t begin = read_length(p.device_kv_start, batch_idx, 0);
  const int64_t last = clamp(end, 0, seqlen_kv);
  return {static_cast<int>(clamp(begin, 0, last)), static_cast<int>(last)};
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

// What an element of the mask adds, in units of log2: a bool shows (0) or hides (-inf).
__device__ __forceinline__ float bias_of(uint8_t x) { return x != 0 ? 0.f : kMinusInf; }
__device__ __forceinline__ float bias_of(float x) { return bias_log2(x); }
__device__ __forceinline__ float bias_of(double x) { return bias_log2(x); }
__device__ __forceinline__ float bias_of(BFloat16 x) { return bias_log2(arch::to_float(x)); }
__device__ __forceinline__ float bias_of(Float16 x) { return bias_log2(arch::to_float(x)); }

// The first row's scores in columns e of its tiles move on by one tile; `last` becomes the last.
template <int kM, int kTiles>
__device__ __forceinline__ void rotate_first_row(float (&s)[kM][kTiles][4], int e, float last) {
#pragma unroll
  for (int n = 0; n + 1 < kTiles; ++n) s[0][n][e] = s[0][n + 1][e];
  s[0][kTiles - 1][e] = last;
}

// Adds the mask to the first row that the lane holds, in units of log2, and hides what it hides,
// NaN too. Two tiles at a time if they are pairs, rotating: four loads are under way, and no more
// registers are taken.
template <class Element, class Mask, int kM, int kTiles>
__device__ __forceinline__ void add_mask_of(float (&s)[kM][kTiles][4], const Mask& mask,
                                            int64_t offset, int keys, int lane) {
  const auto* row = static_cast<const Element*>(mask.data) + offset;
  constexpr int kStep = kTiles % 2 == 0 ? 2 : 1;
#pragma unroll 1
  for (int n = 0; n < kTiles; n += kStep) {
    float bias[2 * kStep];
#pragma unroll
    for (int i = 0; i < 2 * kStep; ++i) {
      const int col = (n + i / 2) * 8 + lane % 4 * 2 + i % 2;
      bias[i] = arch::predicate(col < keys) ? bias_of(arch::ldg(row + col * mask.col)) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 2 * kStep; ++i) {
      const int e = i % 2;
      const float x = bias[i] == kMinusInf ? kMinusInf : s[0][0][e] + bias[i];
      rotate_first_row(s, e, x);
    }
  }
}

// The same for any type of mask; `keys` of the tile exist.
template <class Mask, int kM, int kTiles>
__device__ __forceinline__ void add_mask(float (&s)[kM][kTiles][4], const Mask& mask,
                                         int64_t offset, int keys, int lane) {
  switch (mask.type) {
    case MaskType::kBool:
      return add_mask_of<uint8_t>(s, mask, offset, keys, lane);
    case MaskType::kFloat64:
      return add_mask_of<double>(s, mask, offset, keys, lane);
    case MaskType::kFloat32:
      return add_mask_of<float>(s, mask, offset, keys, lane);
    case MaskType::kBFloat16:
      return add_mask_of<BFloat16>(s, mask, offset, keys, lane);
    case MaskType::kFloat16:
      return add_mask_of<Float16>(s, mask, offset, keys, lane);
    default:
      return;
  }
}

// Replaces each score x of the first row that the lane holds by f(x). The loop stays a loop, so
// that a costly f is compiled once and not once per element: registers cannot be indexed, so they
// rotate.
template <int kM, int kTiles, class F>
__device__ __forceinline__ void replace_in_first_row(float (&s)[kM][kTiles][4], const F& f) {
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) rotate_first_row(s, e, f(s[0][0][e]));
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

// Scale or softcap, to units of log2.
template <class Params, int kM, int kTiles>
__device__ __forceinline__ void scale_or_cap(float (&s)[kM][kTiles][4], const Params& p) {
  if (p.softcap == 0) return multiply(s, p.scale_log2);
#pragma unroll 1
  for (int i = 0; i < kM * 2; ++i) {  // all rows that the lane holds
    replace_in_first_row(s, [&](float x) { return p.from_cap * arch::tanh(x * p.to_cap); });
    rotate_rows(s);
  }
}

// ALiBi, if there is any, on scores in units of log2.
template <class Params, class Slots, int kM, int kTiles>
__device__ __forceinline__ void add_alibi(float (&s)[kM][kTiles][4], const Params& p,
                                          const PackedRows& rows, const Slots& slots,
                                          const ScoreOrigin& at, int lane) {
  if (p.alibi.slopes == nullptr) return;
  // Opaque: what follows from these is not kept in registers from one block of keys to the next.
  lane = arch::opaque(lane);
  const int batch_idx = arch::opaque(at.batch_idx);
  const int sequence = p.alibi.batch == 0 ? 0 : slots.sequence_of(p, batch_idx);
  Slots seen = slots;
  seen.end = arch::opaque(slots.end);
  const auto diagonal = static_cast<int>(seen.visibility(p).diagonal);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row behind the last one has a head all the same.
      const Row row = rows[at.row + m * 16 + half * 8 + lane / 4];
      const int64_t offset = sequence * p.alibi.batch + row.head * p.alibi.head;
      const float slope = arch::ldg(p.alibi.slopes + offset) * static_cast<float>(kLog2E);
      // Of integers: what is near is exact, and what is far is rounded once or twice.
      const auto ahead = static_cast<float>(row.query + diagonal - at.key - lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[m][n][2 * half + e];
          score = fmaf(-slope, fabsf(ahead - static_cast<float>(n * 8 + e)), score);
        }
      }
    }
  }
}

// The mask, if there is one, on scores in units of log2.
template <class Params, int kM, int kTiles>
__device__ __forceinline__ void add_mask_rows(float (&s)[kM][kTiles][4], const Params& p,
                                              const PackedRows& rows, const KeySlots& slots,
                                              const ScoreOrigin& at, int lane) {
  if (p.mask.type == MaskType::kNone) return;
#pragma unroll 1
  for (int i = 0; i < kM * 2; ++i) {
    const int r = at.row + i * 8 + lane / 4;
    if (arch::predicate(r < rows.rows)) {
      const int64_t offset = mask_offset(p.mask, at.batch_idx, rows[r]) + at.key * p.mask.col;
      add_mask(s, p.mask, offset, slots.end - at.key, lane);
    }
    rotate_rows(s);
  }
}

// What is added to scaled and capped scores, in units of log2.
template <class Params, class Slots, int kM, int kTiles>
__device__ __forceinline__ void add_biases(float (&s)[kM][kTiles][4], const Params& p,
                                           const PackedRows& rows, const Slots& slots,
                                           const ScoreOrigin& at, int lane) {
  add_alibi(s, p, rows, slots, at, lane);
  add_mask_rows(s, p, rows, slots, at, lane);
}

// Scale, softcap, ALiBi and mask, in units of log2.
template <class Params, class Slots, int kM, int kTiles>
__device__ __forceinline__ void scale_scores(float (&s)[kM][kTiles][4], const Params& p,
                                             const PackedRows& rows, const Slots& slots,
                                             const ScoreOrigin& at, int lane) {
  scale_or_cap(s, p);
  add_biases(s, p, rows, slots, at, lane);
}

// Hidden scores become -inf: by length, causal and window.
template <class Params, class Slots, int kM, int kTiles>
__device__ __forceinline__ void hide_scores(float (&s)[kM][kTiles][4], const Params& p,
                                            const PackedRows& rows, const Slots& slots,
                                            const ScoreOrigin& at, int lane) {
  // Opaque: what follows from it is not kept in registers from one block of keys to the next.
  lane = arch::opaque(lane);
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
