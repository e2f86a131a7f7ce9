// Products of one attention tile on AMX tiles: bfloat16 factors, fp32 sums.
//
// A right factor B [depth, cols] lies in scratch memory as tiles of 32 of its depth by 16 columns,
// a column's tiles one after the other. A tile is 16 rows of 16 words, and a word the pair of
// elements of one column at depths 2i and 2i + 1. Depth and columns are padded to multiples of 32
// with zeros, which the left factor's padding meets.
//
// An element of a product depends on its row and its column alone, in an order that neither the
// number of rows nor that of columns changes.
#pragma once

#include "cpu/isa/tile_config.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// tiles <- B = k^T for k [count, depth]: a transpose of words. staging holds 16 padded rows.
inline void pack_keys(int64_t count, int64_t depth, const BFloat16* k, int64_t k_row,
                      BFloat16* tiles, BFloat16* staging) {
  const int64_t padded = round_up(depth, kAmxDepth);
  for (int64_t first = 0; first < round_up(count, 2 * kAmxRows); first += kAmxRows) {
    const int64_t inside = max_of<int64_t>(min_of<int64_t>(count - first, kAmxRows), 0);
    __builtin_memset(staging, 0, kAmxRows * padded * sizeof(BFloat16));
    for (int64_t r = 0; r < inside; ++r) {
      const BFloat16* row = k + (first + r) * k_row;
      __builtin_memcpy(staging + r * padded, row, depth * sizeof(BFloat16));
    }
    // Words as floats, which are only moved.
    transpose(kAmxRows, padded / 2, reinterpret_cast<const float*>(staging), padded / 2,
              reinterpret_cast<float*>(tiles + first * padded), kAmxRows);
  }
}

// The first elements of a row, one to a word, zeros for those that are not there.
template <bool finite_only>
FIL_INLINE Vector<uint32_t> load_words(const BFloat16* p, int64_t count) {
  constexpr int width = kWidth<uint32_t>;
  typedef uint16_t Half __attribute__((vector_size(FIL_VECTOR_BYTES / 2)));
  Half half = {};
  if (count >= width) {
    __builtin_memcpy(&half, p, sizeof half);
  } else if (count > 0) {
    BFloat16 part[width] = {};
    __builtin_memcpy(part, p, count * sizeof(BFloat16));
    __builtin_memcpy(&half, part, sizeof half);
  }
  const Vector<uint32_t> words = __builtin_convertvector(half, Vector<uint32_t>);
  if constexpr (!finite_only) return words;
  return (words & 0x7f80u) == 0x7f80u ? Vector<uint32_t>{} : words;
}

// tiles <- B = v [count, cols]: two rows interleaved. finite_only: zeros for NaN and inf.
template <bool finite_only>
void pack_values(int64_t count, int64_t cols, const BFloat16* v, int64_t v_row, BFloat16* tiles) {
  constexpr int width = kWidth<uint32_t>;
  const int64_t depth = round_up(count, kAmxDepth);
  for (int64_t key = 0; key < depth; key += 2) {
    for (int64_t c = 0; c < round_up(cols, 2 * kAmxRows); c += width) {
      const int64_t first = key < count ? cols - c : 0, second = key + 1 < count ? cols - c : 0;
      const BFloat16* p = v + key * v_row + c;
      const Vector<uint32_t> pair =
          load_words<finite_only>(p, first) | load_words<finite_only>(p + v_row, second) << 16;
      BFloat16* to = tiles + c / kAmxRows * kAmxRows * depth + (key * kAmxRows + c % kAmxRows * 2);
      __builtin_memcpy(to, &pair, sizeof pair);
    }
  }
}

// C[16 or 32 rows, 32] (+)= A[.., depth] B[depth, 32].
template <bool two_rows>
FIL_INLINE void tile_block(Tiles& tiles, int64_t depth, const BFloat16* a, int64_t a_row,
                           const BFloat16* b, float* c, int64_t c_row, bool accumulate) {
  const int64_t a_bytes = a_row * int64_t{sizeof *a}, c_bytes = c_row * int64_t{sizeof *c};
  float* const c_below = c + kAmxRows * c_row;
  if (accumulate) {
    tiles.load<0>(c, c_bytes);
    tiles.load<1>(c + 16, c_bytes);
    if constexpr (two_rows) tiles.load<2>(c_below, c_bytes);
    if constexpr (two_rows) tiles.load<3>(c_below + 16, c_bytes);
  } else {
    tiles.zero<0>();
    tiles.zero<1>();
    if constexpr (two_rows) tiles.zero<2>();
    if constexpr (two_rows) tiles.zero<3>();
  }
  for (int64_t d = 0; d < depth; d += kAmxDepth) {
    tiles.load<4>(a + d, a_bytes);
    tiles.load<6>(b + d * kAmxRows, 64);
    tiles.load<7>(b + (depth + d) * kAmxRows, 64);
    tiles.multiply<0, 4, 6>();
    tiles.multiply<1, 4, 7>();
    if constexpr (two_rows) {
      tiles.load<5>(a + kAmxRows * a_row + d, a_bytes);
      tiles.multiply<2, 5, 6>();
      tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(c, c_bytes);
  tiles.store<1>(c + 16, c_bytes);
  if constexpr (two_rows) tiles.store<2>(c_below, c_bytes);
  if constexpr (two_rows) tiles.store<3>(c_below + 16, c_bytes);
}

// C[rows, cols] (+)= A[rows, depth] B[depth, cols] with B packed. rows, at most 32, are rounded up
// to 16 or 32, cols and depth to multiples of 32: that much of A is read and of C written.
inline void amx_gemm(Tiles& tiles, int64_t rows, int64_t cols, int64_t depth, const BFloat16* a,
                     int64_t a_row, const BFloat16* b, float* c, int64_t c_row, bool accumulate) {
  depth = round_up(depth, kAmxDepth);
  Tiles::fence();
  for (int64_t col = 0; col < cols; col += 2 * kAmxRows) {
    if (rows > kAmxRows) {
      tile_block<true>(tiles, depth, a, a_row, b + col * depth, c + col, c_row, accumulate);
    } else {
      tile_block<false>(tiles, depth, a, a_row, b + col * depth, c + col, c_row, accumulate);
    }
  }
  Tiles::fence();
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
