// What amx.h has, for a processor that multiplies bfloat16 by vectors of pairs alone: the kernels'
// tiles as AVX512-BF16 takes them.
//
// A factor stays where it lies in memory and must be as it is until it is multiplied. Sums lie
// here, in the first-level cache.
#pragma once

#include "cpu/isa/tile_config.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// A product takes as long for one column as for 16.
constexpr int64_t kLeastTileRows = 12;

struct DotSums {
  alignas(64) float row[kAmxRows][16];
};

// sums[16][16] += a[16][16 pairs] b[16 pairs][16]. A sum of the pairs, from zero in ascending
// order, is added: as exact over thousands of keys as a tile's. Eight rows at a time are chains
// enough for the instruction's latency, and their addresses fit the registers. Not inlined: it is 2
// KB.
__attribute__((noinline)) inline void multiply_pairs(const char* a, int64_t a_stride, const char* b,
                                                     DotSums& sums) {
  constexpr int rows = 8, width = kWidth<float>;
  for (int first = 0; first < kAmxRows; first += rows, a += rows * a_stride) {
    for (int n = 0; n < 16; n += width) {
      Vector<float> sum[rows] = {};
#pragma GCC unroll 16
      for (int pair = 0; pair < kAmxRows; ++pair) {
        Vector<uint32_t> right;
        __builtin_memcpy(&right, b + (pair * 16 + n) * sizeof(uint32_t), sizeof right);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          uint32_t left;
          __builtin_memcpy(&left, a + r * a_stride + pair * sizeof left, sizeof left);
          sum[r] = dot_pairs(sum[r], left, right);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        float* const to = sums.row[first + r] + n;
        store(to, load(to) + sum[r]);
      }
    }
  }
}

class Tiles {
 public:
  explicit Tiles(const TileConfig&) {}  // all are full
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  FIL_INLINE void zero() {
    static_assert(tile < 4);
    sums_[tile] = {};
  }

  // `stride` is in bytes; that of a right factor is 64.
  template <int tile>
  FIL_INLINE void load(const void* from, int64_t stride) {
    if constexpr (tile >= 4) {
      factor_[tile - 4] = static_cast<const char*>(from);
      if constexpr (tile < 6) stride_[tile - 4] = stride;
    } else {
      const char* row = static_cast<const char*>(from);
      for (int r = 0; r < kAmxRows; ++r, row += stride)
        __builtin_memcpy(sums_[tile].row[r], row, 64);
    }
  }
  template <int tile>
  FIL_INLINE void store(void* to, int64_t stride) {
    static_assert(tile < 4);
    char* row = static_cast<char*>(to);
    for (int r = 0; r < kAmxRows; ++r, row += stride) __builtin_memcpy(row, sums_[tile].row[r], 64);
  }

  template <int c, int a, int b>
  FIL_INLINE void multiply() {
    static_assert(c >= 0 && c < 4 && a == 4 + c / 2 && b == 6 + c % 2);
    multiply_pairs(factor_[a - 4], stride_[a - 4], factor_[b - 4], sums_[c]);
  }

  static FIL_INLINE void fence() {}

 private:
  DotSums sums_[4];
  const char* factor_[4];
  int64_t stride_[2];
};

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
