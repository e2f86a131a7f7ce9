// Which query and head a row is. The query heads that share a KV head are packed into the rows, so
// that each key is read once for all of them: row r of a KV head is query r / group_size of head
// head_kv * group_size + r % group_size.
#pragma once

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

struct Row {
  int query;
  int head;
};

struct PackedRows {
  int head_kv;
  int group_size;
  int rows;  // of the KV head: seqlen_q * group_size

  __device__ __forceinline__ Row operator[](int r) const {
    const auto packed = static_cast<uint32_t>(r);
    const auto group = static_cast<uint32_t>(group_size);
    return {static_cast<int>(packed / group),
            head_kv * group_size + static_cast<int>(packed % group)};
  }
};

// The rows of a [query, head, dim] tensor of one sequence, from packed row `first` on: a source of
// load_rows, or a target of store_rows.
template <class Element>
struct PackedRowView {
  Element* sequence;
  int64_t stride_query;
  int64_t stride_head;
  PackedRows rows;
  int first;

  __device__ __forceinline__ Element* row(int r) const {
    const Row at = rows[first + r];
    return sequence + at.query * stride_query + at.head * stride_head;
  }
  // Whole groups further lie the same head's later queries, an addition away.
  __device__ __forceinline__ Element* next(Element* at, int r, int rows_on) const {
    const int queries_on = rows_on / rows.group_size;
    if (queries_on * rows.group_size == rows_on) return at + queries_on * stride_query;
    return row(r + rows_on);
  }
  __device__ __forceinline__ bool valid(int r) const { return first + r < rows.rows; }
};

}  // namespace flashinfer_lite::tile
