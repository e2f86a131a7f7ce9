// Which keys a query row may see: sequence bounds, causal and window, as half-open ranges.
// Everything is constexpr, which makes it callable in device code too.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashinfer_lite {

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;  // exclusive; begin >= end is empty

  constexpr bool empty() const { return begin >= end; }
};

struct QueryRange {
  int64_t begin = 0;
  int64_t end = 0;  // exclusive
};

// Row i stands at key position i + diagonal and sees [position - left, position + right] within
// [kv_begin, kv_end). An open side is -1. Causal is right = 0.
struct Visibility {
  int64_t kv_begin = 0;
  int64_t kv_end = 0;
  int64_t diagonal = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;

  constexpr KeyRange row(int64_t i) const {
    const int64_t position = i + diagonal;
    KeyRange range{kv_begin, kv_end};
    if (window_left >= 0) range.begin = std::max(range.begin, position - window_left);
    if (window_right >= 0) range.end = std::min(range.end, position + window_right + 1);
    // A row beyond its keys is empty, within the bounds all the same: ranges of rows are joined.
    range.begin = std::min(range.begin, kv_end);
    range.end = std::max(range.end, range.begin);
    return range;
  }

  // The keys that at least one of the rows [first, last] sees, as one range. Both bounds grow with
  // the row, so the outer rows decide.
  constexpr KeyRange rows(int64_t first, int64_t last) const {
    KeyRange range{row(first).begin, row(last).end};
    range.end = std::max(range.end, range.begin);
    return range;
  }

  // The rows, of so many, that see at least one of the keys [first, last), as one range.
  constexpr QueryRange queries(int64_t first, int64_t last, int64_t num_rows) const {
    first = std::max(first, kv_begin);
    last = std::min(last, kv_end);
    if (first >= last) return {0, 0};
    QueryRange range{0, num_rows};
    if (window_right >= 0) {
      range.begin = std::clamp<int64_t>(first - window_right - diagonal, 0, num_rows);
    }
    if (window_left >= 0) {
      range.end = std::clamp(last + window_left - diagonal, range.begin, num_rows);
    }
    return range;
  }

  // The rows, of so many, that see all of the keys [first, last), as one range.
  constexpr QueryRange queries_of_all(int64_t first, int64_t last, int64_t num_rows) const {
    if (first < kv_begin || last > kv_end) return {0, 0};
    const int64_t begin = window_right < 0 ? 0 : last - 1 - window_right - diagonal;
    const int64_t end = window_left < 0 ? num_rows : first + window_left - diagonal + 1;
    return {std::clamp<int64_t>(begin, 0, num_rows), std::clamp<int64_t>(end, 0, num_rows)};
  }
};

}  // namespace flashinfer_lite
