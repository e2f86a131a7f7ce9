// What one attention call works on. Plain pointers and strides: no torch, no ownership.
#pragma once

#include <cstdint>

#include "common/heuristics.h"
#include "common/paging.h"
#include "common/unified.h"
#include "common/visible.h"

namespace flashinfer_lite {

// [batch, seqlen, head, dim] with dim contiguous; strides count elements.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t batch = 0;
  int64_t seqlen = 0;
  int64_t head = 0;
};

enum class MaskType : uint8_t { kNone, kBool, kFloat64, kFloat32, kBFloat16, kFloat16 };

// [batch, head, row, col], any of them broadcast by stride 0. Bool: true is visible. Floating
// point: added to the scaled score, and exactly -inf hides the key.
struct MaskView {
  const void* data = nullptr;
  MaskType type = MaskType::kNone;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t col = 0;
};

// ALiBi: score -= slope |position - key|, after scale and softcap, with the row at the position
// that Visibility gives it. Strides count elements.
struct AlibiView {
  const float* slopes = nullptr;  // [batch, num_heads_q], the batch broadcast by stride 0; or null
  int64_t batch = 0;
  int64_t head = 0;
};

enum class Alignment : uint8_t { kBottomRight, kTopLeft };

struct AttentionParams {
  int64_t batch_size = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_kv = 0;
  int64_t num_heads_q = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;

  Strided<const void*> q, k, v;  // of a paged cache, k.batch and v.batch lead from page to page
  PageTable block_table;
  // Of lse, [batch, num_heads_q, seqlen_q] with the queries of a head side by side. A sequence of a
  // ragged batch has its heads as far apart as the batch has queries.
  int64_t lse_batch = 0, lse_head = 0;
  MaskView mask;
  AlibiView alibi;
  const int64_t* kv_start = nullptr;    // [batch] or null: first visible slot
  const int64_t* seqlens_kv = nullptr;  // [batch] or null: one past the last visible slot
  Alignment alignment = Alignment::kBottomRight;
  int64_t window_left = -1;
  int64_t window_right = -1;  // 0 for causal
  double softmax_scale = 1.0;
  double softcap = 0.0;  // 0 is off
  int64_t threads = 1;   // of a CPU that share the work

  constexpr int64_t group_size() const { return num_heads_q / num_heads_kv; }

  // The rows of one KV head: every query of its group, query-major, so that the rows of a tile
  // share their diagonal: row r is query r / group_size of head head_kv * group_size + r %
  // group_size.
  constexpr int64_t rows_per_kv_head() const { return seqlen_q * group_size(); }

  // Of a row in lse and in what is laid out like it.
  int64_t row_index(int64_t batch_idx, int64_t head, int64_t query) const {
    return batch_idx * lse_batch + head * lse_head + query;
  }

  CpuForwardProblem cpu_problem(int64_t element_size, int64_t least_tile_rows) const {
    const bool side_by_side = num_heads_kv > 1 && k.head == head_dim && v.head == head_dim_v;
    return {batch_size, threads,      rows_per_kv_head(), num_heads_kv,   head_dim,
            head_dim_v, element_size, side_by_side,       least_tile_rows};
  }

  Visibility visibility(int64_t batch_idx) const {
    Visibility v;
    v.kv_begin = kv_start ? kv_start[batch_idx] : 0;
    v.kv_end = seqlens_kv ? seqlens_kv[batch_idx] : seqlen_kv;
    v.diagonal = alignment == Alignment::kBottomRight ? v.kv_end - seqlen_q : 0;
    v.window_left = window_left;
    v.window_right = window_right;
    return v;
  }
};

// Forward, and decode with kv_splits > 1. lse has the accumulator's type; with splits it is
// contiguous, and out and lse go to the partials instead, which add a leading split dimension and
// hold normalised states for combine. With a unified maximum they hold sums instead: numerators,
// denominators, and row maxima in row_max_partial.
struct AttentionFwdParams : AttentionParams {
  Strided<void*> out;
  void* lse = nullptr;
  int64_t heads_per_task = 1;
  int64_t kv_splits = 1;
  int64_t keys_per_split = 0;   // counted from the first visible slot of each sequence
  void* out_partial = nullptr;  // [kv_splits, batch, seqlen_q, num_heads_q, head_dim_v]
  void* lse_partial = nullptr;  // [kv_splits, batch, num_heads_q, seqlen_q]

  // Softmax with a unified maximum: exp(score - phi) in place of exp(score - row_max).
  bool unified = false;
  double phi = 0.0;                  // of every head, in natural units, unless there is
  const float* phi_heads = nullptr;  // [num_heads_q]
  void* row_max_partial = nullptr;   // like lse_partial, in units of log2

  // On the CPU, both laid out like lse: what became of each row of a unified pass, and the rows
  // that an online pass is for, those marked kViolated; null for all.
  RowVerdict* verdict = nullptr;
  const RowVerdict* only = nullptr;
};

// How the backward is cut into tasks. Fused computes everything in five products per tile, one task
// per (batch, KV head) and part of the keys; of several parts, kSum adds up dQ. Where those are
// fewer than the threads, two passes of independent tasks, one per KV block for dK and dV and one
// per row block for dQ, cost seven products and use every thread. Both add in the same order: the
// gradients are bitwise the same.
enum class BwdPass : uint8_t { kFused, kSum, kKeys, kQueries };

constexpr int64_t kAccumulatorAlign = 32;  // elements; a multiple of every level's panel

struct AttentionBwdParams : AttentionParams {
  Strided<const void*> out, dout;
  const void* lse = nullptr;
  const void* dlse = nullptr;  // like lse, or null
  Strided<void*> dq, dk, dv;
  BwdPass pass = BwdPass::kFused;
  int64_t keys_per_part = 0;
  int64_t key_parts() const { return ceil_div(seqlen_kv, keys_per_part); }
  // Fused pass with several parts: dQ in the accumulator's type, [key_parts, batch, num_heads_kv,
  // dq_accum_rows, head_dim rounded up to kAccumulatorAlign].
  void* dq_accum = nullptr;
  // A matrix unit writes whole blocks of rows, those behind the last too.
  int64_t dq_accum_rows() const { return ceil_div(rows_per_kv_head(), kMatrixRows) * kMatrixRows; }
  // Elements of one part of it.
  int64_t dq_accum_elements() const {
    const int64_t row = ceil_div(head_dim, kAccumulatorAlign) * kAccumulatorAlign;
    return batch_size * num_heads_kv * dq_accum_rows() * row;
  }
  // Gradient of an additive mask in the accumulator's type; strides 0 where the mask broadcasts.
  void* dmask = nullptr;
  int64_t dmask_batch = 0, dmask_head = 0, dmask_row = 0, dmask_col = 0;
};

// out, lse <- the merge of num_states states over the same rows.
struct CombineParams {
  int64_t num_states = 0;
  int64_t batch_size = 0;
  int64_t seqlen_q = 0;
  int64_t num_heads_q = 0;
  int64_t head_dim_v = 0;
  bool partial_in_accumulator = true;  // else out_partial has the output's dtype
  Strided<const void*> out_partial;    // of one state
  int64_t out_partial_state = 0;       // stride between states
  const void* lse_partial = nullptr;   // [num_states, batch, num_heads_q, seqlen_q], strides below
  int64_t lse_partial_state = 0, lse_partial_batch = 0, lse_partial_head = 0,
          lse_partial_seqlen = 0;
  Strided<void*> out;
  void* lse = nullptr;               // [batch, num_heads_q, seqlen_q]
  const RowVerdict* only = nullptr;  // on the CPU, as in AttentionFwdParams
};

}  // namespace flashinfer_lite
