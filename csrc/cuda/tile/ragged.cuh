// 16 bytes of a row of which only the first elements exist, or that lie at any address.
#pragma once

#include <algorithm>

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

// The first `count` of 8 elements of 16 bits, one load each; zeros behind them.
template <class Element>
__device__ __forceinline__ arch::U32x4 load_ragged(const Element* p, int count) {
  static_assert(sizeof(Element) == 2, "eight elements are 16 bytes");
  const auto* half = reinterpret_cast<const uint16_t*>(p);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low = 0, high = 0;
    if (arch::predicate(2 * i < count)) low = arch::ldg(half + 2 * i);
    if (arch::predicate(2 * i + 1 < count)) high = arch::ldg(half + 2 * i + 1);
    word[i] = low | high << 16;
  }
  return {word[0], word[1], word[2], word[3]};
}

// Rows of a matrix whose columns lie side by side.
template <class Element>
struct MatrixRows {
  const Element* first;  // row 0 of the tile
  int64_t stride;        // between rows
  int rows;              // from here on there are none
  int cols;
  bool vector;  // every row begins on 16 bytes and is a whole number of them
};

// Starts the copy of the columns from `col` on of a whole tile; what does not exist is zero in the
// tile. The caller commits and waits. Without 16-byte alignment the elements go through registers,
// at once.
template <int kThreads, class Tile, class Element>
__device__ __forceinline__ void load_columns(const Tile& tile, const MatrixRows<Element>& from,
                                             int col, int thread) {
  constexpr int kRowsOn = kThreads / Tile::chunks;
  constexpr int kTurns = (Tile::rows + kRowsOn - 1) / kRowsOn;
  static_assert(kThreads % Tile::chunks == 0, "a thread keeps its column of chunks");
  static_assert(kTurns * kRowsOn == Tile::rows || kTurns == 1, "every turn is whole");
  const int first_row = thread / Tile::chunks;
  if (kTurns == 1 && first_row >= Tile::rows) return;
  const int c = thread % Tile::chunks;
  constexpr int kElements = Tile::chunk_elements;
  const int own_col = col + c * kElements;
  const int left = std::min(std::max(from.cols - own_col, 0), kElements);
  const Element* at = from.first + first_row * from.stride + own_col;
  if (from.vector) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = first_row + i * kRowsOn;
      const bool exists = arch::predicate(row < from.rows);
      arch::cp_async_16(tile.chunk(row, c), at, exists && left > 0 ? 16 : 0);
      at += kRowsOn * from.stride;
    }
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < Tile::rows; row += kRowsOn) {
    const bool exists = arch::predicate(row < from.rows);
    arch::sts(tile.chunk(row, c), load_ragged(at, exists ? left : 0));
    at += kRowsOn * from.stride;
  }
}

}  // namespace flashinfer_lite::tile
