// Values that are not finite, exactly: a hidden key's NaN or inf is not seen, a visible one's is.
//
// The products of the tensor cores cannot leave out a pair: probability 0 times NaN is NaN. A row
// that met such a value has a result that is not finite, so a block looks once, at its end, and on
// a hit runs again with these steps: what visible pairs contribute is added one by one, then the
// value is replaced by 0 in the tile. Rows that saw nothing of it keep their bits.
#pragma once

#include <cmath>

#include "cuda/tile/gemm.cuh"

namespace flashinfer_lite::tile {

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e+38f; }

template <int kM, int kTiles>
__device__ __forceinline__ bool all_finite(const float (&acc)[kM][kTiles][4]) {
  // 0 * x is 0 for finite x and NaN otherwise. Four sums: one would be a chain of all the
  // latencies.
  float probe[4] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) probe[e] = fmaf(acc[m][n][e], 0.f, probe[e]);
  return probe[0] + probe[1] + (probe[2] + probe[3]) == 0.f;
}

// Two neighbouring elements of a tile, as floats.
template <class Tile>
__device__ __forceinline__ Float2 load_pair(const Tile& tile, int row, int col) {
  if constexpr (sizeof(typename Tile::Element) == 4) {
    return arch::lds<Float2>(tile.at(row, col));
  } else {
    const auto word = arch::lds<uint32_t>(tile.at(row, col));
    using Element = typename Tile::Element;
    return {arch::to_float(Element{static_cast<uint16_t>(word & 0xffffu)}),
            arch::to_float(Element{static_cast<uint16_t>(word >> 16)})};
  }
}

__device__ __forceinline__ float contribution(float p, float value) {
  const bool hidden = p == 0.f && std::signbit(p);
  return is_finite(value) || hidden ? 0.f : p * value;
}

// o += the products of one key with values that are not finite; weight is its probability in the
// two rows.
template <class VTile, int kTiles>
__device__ __forceinline__ void add_key(const float (&weight)[2], const VTile& v, int key,
                                        float (&o)[kTiles][4], int lane) {
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
    const Float2 x = load_pair(v, key, n * 8 + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      o[0][2 * half] += contribution(weight[half], x.x);
      o[0][2 * half + 1] += contribution(weight[half], x.y);
    }
    rotate(o);
  }
}

// Whether the warp's part of a row of V is finite all over.
template <class VTile>
__device__ __forceinline__ bool is_key_finite(const VTile& v, int key, int lane) {
  bool finite = true;
#pragma unroll 1
  for (int col = lane * 2; col < VTile::cols; col += 64) {
    const Float2 x = load_pair(v, key, col);
    finite = finite && is_finite(x.x) && is_finite(x.y);
  }
  return arch::all(finite);
}

// o += the products of visible pairs whose value is not finite. p marks hidden keys with -0; it
// rotates and ends as it began.
template <class VTile, int kM, int kKeyTiles, int kTiles>
__device__ __forceinline__ void add_visible_non_finite(float (&p)[kM][kKeyTiles][4], const VTile& v,
                                                       float (&o)[kM][kTiles][4], int lane) {
#pragma unroll 1
  for (int key = 0; key < kKeyTiles * 8; ++key) {
    const bool finite = is_key_finite(v, key, lane);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (!finite) {
        float weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float even = p[m][0][2 * half];
          const float odd = p[m][0][2 * half + 1];
          // A quad holds eight keys of the row, two a lane.
          weight[half] = arch::shfl(key % 2 == 0 ? even : odd, lane / 4 * 4 + key % 8 / 2);
        }
        add_key(weight, v, key, o[m], lane);
      }
      if (key % 8 == 7) rotate(p[m]);
    }
  }
}

// Replaces what is not finite in the tile by 0; kThreads threads, each its own words.
template <int kThreads, class VTile>
__device__ __forceinline__ void zero_non_finite(const VTile& v, int thread) {
#pragma unroll 1
  for (int i = thread; i < VTile::rows * VTile::cols / 2; i += kThreads) {
    const int row = i / (VTile::cols / 2);
    const int col = i % (VTile::cols / 2) * 2;
    const Float2 x = load_pair(v, row, col);
    using Element = typename VTile::Element;
    constexpr auto width = static_cast<uint32_t>(sizeof(Element));
    if (!is_finite(x.x)) arch::sts(v.at(row, col), Element{});
    if (!is_finite(x.y)) arch::sts(v.at(row, col) + width, Element{});
  }
}

}  // namespace flashinfer_lite::tile
