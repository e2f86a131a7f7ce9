// Global memory -> shared memory, by rows.
//
// A source says where a row is and whether it exists: `const Element* row(int r)`, `bool valid(int
// r)`; and whether rows that are so many apart lie evenly, `bool evenly(int rows_on)`, so that an
// addition leads from one to the next: `Element* next(Element* row, int rows_on)`. Rows that do not
// exist and columns beyond `cols` are zero in the tile.
#pragma once

#include <algorithm>

#include "cuda/tile/smem_tile.cuh"

namespace flashinfer_lite::tile {

// Keys or values of one head, `stride` elements apart: row r of the tile is slot first + r.
template <class Element>
struct KvRows {
  const Element* head;  // slot 0
  int64_t stride;
  int first;
  int end;  // slots from here on hold anything

  __device__ __forceinline__ const Element* row(int r) const {
    return head + int64_t{first + r} * stride;
  }
  static __device__ __forceinline__ bool evenly(int) { return true; }
  __device__ __forceinline__ const Element* next(const Element* at, int rows_on) const {
    return at + rows_on * stride;
  }
  __device__ __forceinline__ bool valid(int r) const { return first + r < end; }
};

// The page that the table has for a sequence's i-th.
template <class View>
__device__ __forceinline__ int64_t read_page(const View& view, int batch_idx, int64_t i) {
  const int64_t at = batch_idx * view.batch + i * view.page;
  return view.is_int64 ? arch::ldg(static_cast<const int64_t*>(view.data) + at)
                       : int64_t{arch::ldg(static_cast<const int32_t*>(view.data) + at)};
}

// A slot of a cache in pages.
struct PageSlot {
  int page;
  int slot;
};

// Where a sequence's `slot` is. Table is a PageTable, View says where its entries lie in device
// memory. Clamped: a wrong page may not lead outside the cache.
template <class Table, class View>
__device__ __forceinline__ PageSlot find_slot(const Table& table, const View& view, int batch_idx,
                                              int slot) {
  const auto page_size = static_cast<int>(table.page_size);
  const int i = table.shift >= 0 ? slot >> table.shift : slot / page_size;
  const int64_t page = read_page(view, batch_idx, i);
  const int64_t inside = std::max(std::min(page, table.num_pages - 1), int64_t{0});
  return {static_cast<int>(inside), slot - i * page_size};
}

// Rows of a warp's tile, of 32 at most, in pages of a cache: lane r knows where row r is, so that
// one read of the table serves a whole tile of K and one of V.
template <class Element>
struct PagedRows {
  static constexpr bool by_all_lanes = true;  // row() is called by the whole warp

  const Element* cache;  // of one head
  int64_t page_stride;
  int64_t stride;
  PageSlot own;  // of the row of this lane's number
  int count;     // rows from here on hold anything

  __device__ __forceinline__ const Element* row(int r) const {
    return cache + int64_t{arch::shfl(own.page, r)} * page_stride +
           int64_t{arch::shfl(own.slot, r)} * stride;
  }
  static __device__ __forceinline__ bool evenly(int) { return false; }
  __device__ __forceinline__ const Element* next(const Element* at, int) const { return at; }
  __device__ __forceinline__ bool valid(int r) const { return r < count; }
};

// 16 bytes from an address with only the element's alignment.
template <class Element>
__device__ __forceinline__ arch::U32x4 load_unaligned(const Element* p) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      word[i] = arch::ldg(reinterpret_cast<const uint32_t*>(p) + i);
    } else {
      const auto* half = reinterpret_cast<const uint16_t*>(p) + 2 * i;
      const uint32_t low = arch::ldg(half);
      word[i] = low | static_cast<uint32_t>(arch::ldg(half + 1)) << 16;
    }
  }
  return {word[0], word[1], word[2], word[3]};
}

// Starts the copies of a whole tile by kThreads threads; the caller commits and waits. Where
// `vector` is false the rows lack 16-byte alignment and are copied through registers at once.
template <int kThreads, class Tile, class Source>
__device__ __forceinline__ void load_rows(const Tile& tile, const Source& source, int cols,
                                          bool vector, int thread) {
  constexpr int kChunks = Tile::rows * Tile::chunks;
  constexpr bool kByAllLanes = requires { Source::by_all_lanes; };
  static_assert(kChunks % kThreads == 0, "every thread copies as many chunks");
  if (vector) {
    // A thread keeps its column of chunks, or takes its turn of the columns within each row.
    constexpr int kRowsOn = kThreads >= Tile::chunks ? kThreads / Tile::chunks : 1;
    constexpr int kTurns = kThreads >= Tile::chunks ? 1 : Tile::chunks / kThreads;
    const int first_row = arch::opaque(thread / Tile::chunks);
    const int first_chunk = thread % Tile::chunks;
    auto* at = source.row(first_row);
    const auto copy_all = [&](auto next) {
#pragma unroll
      for (int i = 0; i < kChunks / kThreads; ++i) {
        const int row = first_row + i / kTurns * kRowsOn;
        const int c = first_chunk + i % kTurns * kThreads;
        const int col = c * Tile::chunk_elements;
        const bool inside = arch::predicate(source.valid(row) && col < cols);
        arch::cp_async_16(tile.chunk(row, c), at + col, inside ? 16 : 0);
        if ((i + 1) % kTurns == 0) at = next(row + kRowsOn);
      }
    };
    if (source.evenly(kRowsOn)) {
      copy_all([&](int) { return source.next(at, kRowsOn); });
    } else {
      copy_all([&](int row) { return source.row(row); });
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < kChunks; i += kThreads) {
    const int row = i / Tile::chunks;
    const int c = i % Tile::chunks;
    const int col = c * Tile::chunk_elements;
    arch::U32x4 value{0, 0, 0, 0};
    const bool inside = arch::predicate(source.valid(row) && col < cols);
    if (inside || kByAllLanes) {
      const auto* at = source.row(row) + col;
      if (inside) value = load_unaligned(at);
    }
    arch::sts(tile.chunk(row, c), value);
  }
}

}  // namespace flashinfer_lite::tile
