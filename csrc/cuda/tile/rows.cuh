// Which query and head a row is. The query heads that share a KV head are packed into the rows, so
// that each key is read once for all of them: row r of a KV head is query r / group of head
// head_kv * group + r % group.
#pragma once

#include "common/divisor.h"
#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

struct Row {
  int query;
  int head;
};

struct PackedRows {
  int head_kv;
  Divisor group;
  int rows;  // of the KV head: seqlen_q * group

  __device__ __forceinline__ Row operator[](int r) const {
    const int query = group.divide(r);
    return {query, (head_kv - query) * group.value + r};
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
  // Whole groups further lie the same head's later queries.
  __device__ __forceinline__ bool evenly(int rows_on) const {
    return rows.group.divide(rows_on) * rows.group.value == rows_on;
  }
  __device__ __forceinline__ Element* next(Element* at, int rows_on) const {
    return at + rows.group.divide(rows_on) * stride_query;
  }
  __device__ __forceinline__ bool valid(int r) const { return first + r < rows.rows; }
};

}  // namespace flashinfer_lite::tile
