// What one attention call works on when its tensors are in device memory.
#pragma once

#include "common/params/attention.h"

namespace flashinfer_lite {

// [batch] in device memory, int32 or int64: read and clamped by the kernel, never by the host.
struct LengthsView {
  const void* data = nullptr;  // null: the default bound
  bool is_int64 = false;
  int64_t stride = 1;
};

// [batch, pages] in device memory, int32 or int64, likewise.
struct BlockTableView {
  const void* data = nullptr;  // null: no pages
  bool is_int64 = false;
  int64_t batch = 0;
  int64_t page = 0;
};

// In device memory, one of each device: rows that the unified maximum was tried on, and those of
// them that the online softmax did again.
struct RowCounters {
  uint64_t checked;
  uint64_t recomputed;
};

// The pointers are device pointers. kv_start, seqlens_kv and the pages of the base's block_table
// are unused: they are the views below.
struct CudaAttentionParams : AttentionFwdParams {
  LengthsView device_kv_start, device_seqlens_kv;
  BlockTableView device_block_table;

  // Whether every row of the tensor starts on 16 bytes, so that 16-byte accesses may be used.
  bool vector_q = false;
  bool vector_k = false;
  bool vector_v = false;
  bool vector_out = false;

  // Of the base, as the kernels want them: divided and multiplied once, by the host.
  int32_t group = 1;         // group_size()
  int32_t rows = 0;          // rows_per_kv_head()
  bool scale_first = false;  // scores are brought to log2 one by one; else by the exponential
  float scale_log2 = 1.f;    // q k^T times this is the score in units of log2, or, with a softcap,
  float to_cap = 0.f;        // from_cap * tanh(to_cap * q k^T) is
  float from_cap = 0.f;

  // With a unified maximum.
  float phi_log2 = 0.f;  // of every head, in units of log2, where phi_heads is null
  // With splits the last thread block to draw a ticket merges: [batch, num_m_blocks, num_heads_kv],
  // 0 before and after.
  uint32_t* tickets = nullptr;
  RowCounters* row_counters = nullptr;  // null: nobody counts

  int64_t num_m_blocks = 0;       // blocks of rows per (batch, KV head)
  int64_t heads_per_section = 1;  // forward: (batch, KV head) pairs that share the L2 at a time

  // The base's visibility() cannot read device memory; kernels build theirs with tile/scores.
  Visibility visibility(int64_t) const = delete;
};

}  // namespace flashinfer_lite
