// A tile of rows in shared memory, swizzled so that neither the copies into it nor the matrix loads
// out of it meet a bank twice: the 16-byte chunk c of row r lies at chunk c ^ (r & 7). A row is a
// multiple of 128 bytes, so the bank of a chunk is its low three bits alone, and any 8 consecutive
// rows show one column of chunks in 8 different bank groups.
#pragma once

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

template <class ElementType, int kRows, int kCols>
struct SmemTile {
  using Element = ElementType;
  static constexpr int rows = kRows;
  static constexpr int cols = kCols;
  static constexpr int chunk_elements = 16 / static_cast<int>(sizeof(Element));
  static constexpr int chunks = cols / chunk_elements;  // per row
  static constexpr int bytes = rows * cols * static_cast<int>(sizeof(Element));
  static_assert(chunks % 8 == 0, "a row is a multiple of 128 bytes, or the swizzle leaves it");

  uint32_t base;  // shared-window address, 128-byte aligned

  __device__ __forceinline__ uint32_t chunk(int row, int c) const {
    return base + static_cast<uint32_t>((row * chunks + (c ^ (row & 7))) * 16);
  }

  __device__ __forceinline__ uint32_t at(int row, int col) const {
    return chunk(row, col / chunk_elements) +
           static_cast<uint32_t>(col % chunk_elements * static_cast<int>(sizeof(Element)));
  }

  // The tile without its first rows, a multiple of 8.
  __device__ __forceinline__ SmemTile from_row(int row) const {
    return {base + static_cast<uint32_t>(row * chunks * 16)};
  }

  // From the address of chunk (row, c) to that of (row + rows_on, c + chunks_on), both constants:
  // rows_on a multiple of 8, chunks_on one of a power of two above c. One instruction each, where
  // chunk() would have the compiler keep an address per place in registers.
  static __device__ __forceinline__ uint32_t advance(uint32_t address, int rows_on, int chunks_on) {
    return (address ^ static_cast<uint32_t>(chunks_on % 8 * 16)) +
           static_cast<uint32_t>((rows_on * chunks + chunks_on / 8 * 8) * 16);
  }
};

// The same for float accumulators stored two columns a lane, as the fragments hold them: a half
// warp writes 32 bytes of each of 4 rows, so pairs of chunks are what must not collide.
template <int kRows, int kCols>
struct SmemAccumulator {
  static constexpr int chunks = kCols / 4;
  static constexpr int bytes = kRows * kCols * 4;

  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int col) const {
    const int c = (col / 4) ^ ((row & 3) << 1);
    return base + static_cast<uint32_t>((row * chunks + c) * 16 + col % 4 * 4);
  }
};

}  // namespace flashinfer_lite::tile
