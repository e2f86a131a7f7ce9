// What one attention call works on when its tensors are in device memory.
#pragma once

#include "common/divisor.h"
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

// Of a ragged batch, whose tensors have no batch dimension: its sequences lie behind one another.
struct RaggedView {
  LengthsView q, kv;  // [sequences + 1] offsets of rows and of keys; no data: it is not ragged
  int64_t sequences = 0;
};

// In device memory, one of each device: rows that the unified maximum was tried on, and those of
// them that the online softmax did again.
struct RowCounters {
  uint64_t checked;
  uint64_t recomputed;
};

// The pointers are device pointers. Of a ragged batch batch_size is 1 and the lengths are those of
// all sequences; `lengths` have one of each. kv_start, seqlens_kv and the pages of the base's
// block_table are unused: they are the views below.
struct CudaAttentionParams : AttentionFwdParams {
  LengthsView device_kv_start, device_seqlens_kv;
  BlockTableView device_block_table;
  RaggedView ragged;
  bool is_ragged() const { return ragged.q.data != nullptr; }

  // Whether every row of the tensor starts on 16 bytes, so that 16-byte accesses may be used.
  bool vector_q = false;
  bool vector_k = false;
  bool vector_v = false;
  bool vector_out = false;

  // Of the base, as the kernels want them: divided and multiplied once, by the host.
  Divisor group;             // group_size()
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

// The launches of one backward. kRows: what is known of each row, and dQ's accumulator set to 0.
// kKeys: dK and dV, and dQ added up by atomics; kFinish rounds it. Where the bits must be the same
// every time, kKeys leaves dQ to kQueries, which owns rows and computes the scores once more. kMask
// likewise, for the gradient of the mask.
enum class CudaBwdPass : uint8_t { kRows, kKeys, kFinish, kQueries, kMask };

// float32, of an additive mask; strides 0 where it broadcasts.
struct MaskGradient {
  float* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t col = 0;
};

// `out` and `lse` of the base are inputs here.
struct CudaAttentionBwdParams : CudaAttentionParams {
  Strided<const void*> dout;
  const float* dlse = nullptr;  // like lse, or null
  Strided<void*> dq, dk, dv;
  MaskGradient dmask;  // no data: not asked for

  CudaBwdPass pass = CudaBwdPass::kRows;
  // [batch, num_heads_kv, padded_rows] pairs: lse in units of log2 (-inf of rows that saw no key,
  // and of those that do not exist), and delta = rowsum(dO out) - dlse.
  float* row_stats = nullptr;
  // Null: dQ is left to kQueries. [batch, num_heads_kv, padded_rows, the instance's head_dim], each
  // 16 rows as the fragments of tile/gemm.cuh lie in a warp: [head_dim / 8, 4, 32 lanes].
  float* dq_accum = nullptr;
  int64_t padded_rows = 0;  // rows up to whole blocks
  float grad_scale = 1.f;   // of dK and dQ: the softmax_scale

  bool vector_dout = false;
  bool vector_dq = false;
  bool vector_dk = false;
  bool vector_dv = false;
};

}  // namespace flashinfer_lite
