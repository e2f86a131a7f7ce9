// Products of one warp whose operands are both tiles in shared memory: acc += X Y, or, of a tile
// that holds X's transpose, acc += X^T Y. The warp's part of the result begins at row `row` (of X,
// or column of its transpose) and column `col` of Y; accumulators are laid out as gemm.cuh says.
#pragma once

#include <algorithm>

#include "cuda/tile/gemm.cuh"

namespace flashinfer_lite::tile {

template <bool kTransposed, class XTile, class YTile, int kM, int kTiles>
__device__ __forceinline__ void product_tensor(const XTile& x, int row, const YTile& y, int col,
                                               float (&acc)[kM][kTiles][4], int lane) {
  using Element = typename YTile::Element;
  constexpr int kPart = std::min(kTiles, 8);
  static_assert(kTiles % kPart == 0 && kPart % 2 == 0, "one load brings two n tiles");
  const uint32_t x_first = kTransposed ? x.chunk(lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2)
                                       : x.chunk(row + lane % 16, lane / 16);
  // Opaque, or a loop around would keep every address below in a register of its own.
  const uint32_t x_lane = arch::opaque(x_first);
  const uint32_t y_lane = arch::opaque(y.chunk(lane % 16, col / 8 + lane / 16));
#pragma unroll
  for (int step = 0; step < YTile::rows / 16; ++step) {
#pragma unroll
    for (int part = 0; part < kTiles; part += kPart) {
      uint32_t b[kPart][2];
#pragma unroll
      for (int n = 0; n < kPart; n += 2) {
        uint32_t r[4];
        arch::ldmatrix_x4_trans(r, YTile::advance(y_lane, step * 16, part + n));
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t a[4];
        if constexpr (kTransposed) {
          arch::ldmatrix_x4_trans(a, XTile::advance(x_lane, step * 16, m * 2));
        } else {
          arch::ldmatrix_x4(a, XTile::advance(x_lane, m * 16, step * 2));
        }
        arch::mma_m16n8k16_row<Element, kPart>(&acc[m][part], a, b);
      }
    }
  }
}

// In float32 arithmetic, one row of Y at a time.
template <bool kTransposed, class XTile, class YTile, int kM, int kTiles>
__device__ __forceinline__ void product_float(const XTile& x, int row, const YTile& y, int col,
                                              float (&acc)[kM][kTiles][4], int lane) {
  const int g = lane / 4;
  const int t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < YTile::rows; ++k) {
    float a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + m * 16 + half * 8 + g;
        a[m][half] = arch::lds<float>(kTransposed ? x.at(k, r) : x.at(r, k));
      }
    }
    const uint32_t y_lane = arch::opaque(y.at(k, col + 2 * t));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Float2 b = arch::lds<Float2>(YTile::advance(y_lane, 0, 2 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          acc[m][n][2 * half] = fmaf(a[m][half], b.x, acc[m][n][2 * half]);
          acc[m][n][2 * half + 1] = fmaf(a[m][half], b.y, acc[m][n][2 * half + 1]);
        }
      }
    }
  }
}

template <bool kTransposed, class XTile, class YTile, int kM, int kTiles>
__device__ __forceinline__ void product(const XTile& x, int row, const YTile& y, int col,
                                        float (&acc)[kM][kTiles][4], int lane) {
  if constexpr (std::is_same_v<typename YTile::Element, float>) {
    product_float<kTransposed>(x, row, y, col, acc, lane);
  } else {
    product_tensor<kTransposed>(x, row, y, col, acc, lane);
  }
}

// acc += x y
template <class XTile, class YTile, int kM, int kTiles>
__device__ __forceinline__ void xy_gemm(const XTile& x, int row, const YTile& y, int col,
                                        float (&acc)[kM][kTiles][4], int lane) {
  product<false>(x, row, y, col, acc, lane);
}

// acc += x^T y
template <class XTile, class YTile, int kM, int kTiles>
__device__ __forceinline__ void xty_gemm(const XTile& x, int row, const YTile& y, int col,
                                         float (&acc)[kM][kTiles][4], int lane) {
  product<true>(x, row, y, col, acc, lane);
}

}  // namespace flashinfer_lite::tile
