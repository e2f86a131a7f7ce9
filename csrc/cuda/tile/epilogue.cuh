// From accumulators to out and lse.
#pragma once

#include "cuda/tile/exact.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/softmax.cuh"

namespace flashinfer_lite::tile {

// out <- o / row_sum, lse <- its natural logarithm; a row without keys gives 0 and -inf. Returns
// the lse of each row that the lane holds.
template <int kM, int kTiles>
__device__ __forceinline__ void normalise(SoftmaxState<kM>& state, float (&o)[kM][kTiles][4],
                                          float (&lse)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row_sum = quad_sum(state.row_sum[m][half]);
      const float inverse = row_sum == 0.f ? 0.f : 1.f / row_sum;
      lse[m][half] =
          row_sum == 0.f ? kMinusInf : (state.row_max[m][half] + arch::log2(row_sum)) * kLn2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        o[m][n][2 * half] *= inverse;
        o[m][n][2 * half + 1] *= inverse;
      }
    }
  }
}

// One element after another, for rows without 16-byte alignment.
template <class Element>
__device__ __forceinline__ void store_unaligned(Element* out, arch::U32x4 value) {
  const uint32_t word[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      arch::stg(reinterpret_cast<uint32_t*>(out) + i, word[i]);
    } else {
      auto* half = reinterpret_cast<uint16_t*>(out) + 2 * i;
      arch::stg(half, static_cast<uint16_t>(word[i] & 0xffffu));
      arch::stg(half + 1, static_cast<uint16_t>(word[i] >> 16));
    }
  }
}

// A warp's fragments into a tile, from its place (row, col) on.
template <class Tile, int kM, int kTiles>
__device__ __forceinline__ void stage(const float (&o)[kM][kTiles][4], const Tile& tile, int row,
                                      int col, int lane) {
  using Element = typename Tile::Element;
  // Opaque, or a loop around would keep every address below in a register of its own.
  const uint32_t first = arch::opaque(tile.at(row + lane / 4, col + lane % 4 * 2));
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float low = o[m][n][2 * half];
        const float high = o[m][n][2 * half + 1];
        const uint32_t address =
            Tile::advance(first, m * 16 + half * 8, n * (8 / Tile::chunk_elements));
        if constexpr (sizeof(Element) == 4) {
          arch::sts(address, Float2{low, high});
        } else {
          arch::sts(address, arch::pack<Element>(low, high));
        }
      }
    }
  }
}

// `rows` rows of a tile from `row` on to global memory, by `threads` threads that cover whole rows
// together. target.row and target.valid say where the tile's rows go.
template <class Tile, class Target>
__device__ __forceinline__ void copy_rows(const Tile& tile, int row, int rows, const Target& target,
                                          int cols, bool vector, int thread, int threads) {
#pragma unroll 4
  for (int i = thread; i < rows * Tile::chunks; i += threads) {
    const int r = row + i / Tile::chunks;
    const int col = i % Tile::chunks * Tile::chunk_elements;
    if (!arch::predicate(target.valid(r) && col < cols)) continue;
    const auto value = arch::lds<arch::U32x4>(tile.chunk(r, i % Tile::chunks));
    auto* out = target.row(r) + col;
    if (vector) {
      arch::stg(reinterpret_cast<arch::U32x4*>(out), value);
    } else {
      store_unaligned(out, value);
    }
  }
}

// The warp's rows of `o` to global memory by way of its own rows of a tile, `row` the first.
template <class Tile, class Target, int kM, int kTiles>
__device__ __forceinline__ void store_rows(const float (&o)[kM][kTiles][4], const Tile& tile,
                                           int row, const Target& target, int cols, bool vector,
                                           int lane) {
  stage(o, tile, row, 0, lane);
  arch::sync_warp();  // the lanes of a row read each other's columns
  copy_rows(tile, row, kM * 16, target, cols, vector, lane, 32);
}

}  // namespace flashinfer_lite::tile
