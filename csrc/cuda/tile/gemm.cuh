// Products of one warp: S += Q K^T from two tiles, O += P V from registers and a tile.
//
// Accumulators are fragments of m16n8: acc[m][n][e] is row 16 m + g + 8 (e / 2), column 8 n + 2 t +
// e % 2, with g = lane / 4 and t = lane % 4. A row lives in the four lanes of a quad. The fragments
// of float32 are laid out alike, so everything above this file is the same for every element type.
#pragma once

#include <type_traits>

#include "cuda/tile/smem_tile.cuh"

namespace flashinfer_lite::tile {

template <int kM, int kN>
using Accumulator = float[kM][kN / 8][4];

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

template <int kM, int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kM][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
}

// Tile n becomes tile n - 1, the first the last. Registers cannot be indexed by a variable, so a
// loop that must stay a loop works on the first tile and rotates; kTiles turns are none.
template <int kTiles>
__device__ __forceinline__ void rotate(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float first = acc[0][e];
#pragma unroll
    for (int n = 0; n + 1 < kTiles; ++n) acc[n][e] = acc[n + 1][e];
    acc[kTiles - 1][e] = first;
  }
}

// s += q k^T over tensor cores; q's rows start at `row`.
template <class QTile, class KTile, int kM, int kTiles>
__device__ __forceinline__ void qk_tensor(const QTile& q, int row, const KTile& k,
                                          float (&s)[kM][kTiles][4], int lane) {
  using Element = typename QTile::Element;
  // Opaque, or the loop around would keep every address below in a register of its own.
  const uint32_t q_lane = arch::opaque(q.chunk(row + lane % 16, lane / 16));
  const uint32_t k_lane = arch::opaque(k.chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
  for (int step = 0; step < QTile::cols / 16; ++step) {
    uint32_t b[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {  // one load brings both halves of two n tiles
      uint32_t r[4];
      arch::ldmatrix_x4(r, KTile::advance(k_lane, n * 8, step * 2));
      b[n][0] = r[0];
      b[n][1] = r[1];
      b[n + 1][0] = r[2];
      b[n + 1][1] = r[3];
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t a[4];
      arch::ldmatrix_x4(a, QTile::advance(q_lane, m * 16, step * 2));
      arch::mma_m16n8k16_row<Element, kTiles>(s[m], a, b);
    }
  }
}

// o += p v over tensor cores. The layout of S is the layout that P needs as a left operand: two
// neighbouring n tiles make one k step. P is packed first, which frees half of its registers, and V
// comes in parts of 64 columns.
template <class VTile, int kM, int kKeyTiles, int kTiles>
__device__ __forceinline__ void pv_tensor(const float (&p)[kM][kKeyTiles][4], const VTile& v,
                                          float (&o)[kM][kTiles][4], int lane) {
  using Element = typename VTile::Element;
  constexpr int kPart = 8;
  static_assert(kTiles % kPart == 0, "heads are padded to 64 columns");
  const uint32_t v_lane = arch::opaque(v.chunk(lane % 16, lane / 16));  // as in qk_tensor
  uint32_t a[kKeyTiles / 2][kM][4];
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[m][2 * step + i / 2][i % 2 * 2];
        a[step][m][i] = arch::pack<Element>(pair[0], pair[1]);
      }
    }
  }
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {
#pragma unroll
    for (int part = 0; part < kTiles; part += kPart) {
      uint32_t b[kPart][2];
#pragma unroll
      for (int n = 0; n < kPart; n += 2) {
        uint32_t r[4];
        arch::ldmatrix_x4_trans(r, VTile::advance(v_lane, step * 16, part + n));
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        arch::mma_m16n8k16_row<Element, kPart>(&o[m][part], a[step][m], b);
      }
    }
  }
}

// s += q k^T in float32 arithmetic, four columns of both at a time.
template <class QTile, class KTile, int kM, int kTiles>
__device__ __forceinline__ void qk_float(const QTile& q, int row, const KTile& k,
                                         float (&s)[kM][kTiles][4], int lane) {
  const int g = lane / 4;
  const int t = lane % 4;
#pragma unroll 1
  for (int c = 0; c < QTile::chunks; ++c) {
    Float4 a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][half] = arch::lds<Float4>(q.chunk(row + m * 16 + half * 8 + g, c));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Float4 b = arch::lds<Float4>(k.chunk(n * 8 + 2 * t + e, c));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& sum = s[m][n][2 * half + e];
            const Float4& x = a[m][half];
            sum = fmaf(x.x, b.x, sum);
            sum = fmaf(x.y, b.y, sum);
            sum = fmaf(x.z, b.z, sum);
            sum = fmaf(x.w, b.w, sum);
          }
        }
      }
    }
  }
}

// o += p v in float32 arithmetic; each probability comes from the lane of the quad that holds it. p
// rotates and ends as it began.
template <class VTile, int kM, int kKeyTiles, int kTiles>
__device__ __forceinline__ void pv_float(float (&p)[kM][kKeyTiles][4], const VTile& v,
                                         float (&o)[kM][kTiles][4], int lane) {
  const int t = lane % 4;
#pragma unroll 1
  for (int key = 0; key < kKeyTiles * 8; ++key) {
    float weight[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float even = p[m][0][2 * half];
        const float odd = p[m][0][2 * half + 1];
        // A quad holds eight keys of the row, two a lane.
        weight[m][half] = arch::shfl(key % 2 == 0 ? even : odd, lane - t + key % 8 / 2);
      }
    }
    const uint32_t v_lane = arch::opaque(v.at(key, 2 * t));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Float2 x = arch::lds<Float2>(VTile::advance(v_lane, 0, 2 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          o[m][n][2 * half] = fmaf(weight[m][half], x.x, o[m][n][2 * half]);
          o[m][n][2 * half + 1] = fmaf(weight[m][half], x.y, o[m][n][2 * half + 1]);
        }
      }
    }
    if (key % 8 == 7) {
#pragma unroll
      for (int m = 0; m < kM; ++m) rotate(p[m]);
    }
  }
}

template <class QTile, class KTile, int kM, int kTiles>
__device__ __forceinline__ void qk_gemm(const QTile& q, int row, const KTile& k,
                                        float (&s)[kM][kTiles][4], int lane) {
  if constexpr (std::is_same_v<typename QTile::Element, float>) {
    qk_float(q, row, k, s, lane);
  } else {
    qk_tensor(q, row, k, s, lane);
  }
}

template <class VTile, int kM, int kKeyTiles, int kTiles>
__device__ __forceinline__ void pv_gemm(float (&p)[kM][kKeyTiles][4], const VTile& v,
                                        float (&o)[kM][kTiles][4], int lane) {
  if constexpr (std::is_same_v<typename VTile::Element, float>) {
    pv_float(p, v, o, lane);
  } else {
    pv_tensor(p, v, o, lane);
  }
}

}  // namespace flashinfer_lite::tile
