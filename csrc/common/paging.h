// Where the slots of a KV cache in pages are.
#pragma once

#include <cstdint>

namespace flashinfer_lite {

// Slot j of a sequence is slot j % page_size of the page that the sequence's row of the table names
// at j / page_size. Without a table a sequence is one page, and its number that of the page.
struct PageTable {
  const int64_t* pages = nullptr;  // [batch, row], every entry a page that is there; or null
  int64_t row = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;  // 0 without a table
  int shift = -1;         // log2 of page_size where that is a whole number: saves a division

  struct Slot {
    int64_t page;
    int64_t slot;
  };
  constexpr Slot at(int64_t batch_idx, int64_t j) const {
    if (pages == nullptr) return {batch_idx, j};
    const int64_t i = shift >= 0 ? j >> shift : j / page_size;
    return {pages[batch_idx * row + i], j - i * page_size};
  }
};

// The sizes of a table; its pages are up to who reads them.
constexpr PageTable page_table(int64_t num_pages, int64_t page_size) {
  PageTable table;
  table.num_pages = num_pages;
  table.page_size = page_size;
  if ((page_size & (page_size - 1)) == 0) table.shift = __builtin_ctzll(page_size);
  return table;
}

}  // namespace flashinfer_lite
