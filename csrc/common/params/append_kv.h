// What one append_kv call works on: new keys and values go behind the last of each sequence of a
// cache. Plain pointers and strides: no torch, no ownership.
#pragma once

#include <cstdint>

#include "common/params/attention.h"

namespace flashinfer_lite {

// Cosines and sines [positions, dim / 2] of the same dtype; the last dimension is contiguous.
struct RotaryTable {
  const void* cos = nullptr;  // null: keys are written as they are
  const void* sin = nullptr;
  int64_t cos_row = 0;
  int64_t sin_row = 0;
  int64_t positions = 0;
  int64_t dim = 0;             // of the keys' first so many elements
  bool in_accumulator = true;  // else of the keys' dtype
  bool interleaved = false;    // a pair is 2i and 2i + 1, not i and i + dim / 2
};

struct AppendKvParams {
  int64_t batch_size = 0;
  int64_t seqlen_new = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  int64_t capacity = 0;  // slots of a sequence

  Strided<const void*> k, v;
  Strided<void*> k_cache, v_cache;  // of a paged cache, batch leads from page to page
  PageTable block_table;
  const int64_t* seqlens_kv = nullptr;  // [batch], before the call
  RotaryTable rotary;
};

}  // namespace flashinfer_lite
