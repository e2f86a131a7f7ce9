// What one append_kv call works on when its tensors are in device memory.
#pragma once

#include "common/params/append_kv.h"
#include "common/params/attention_cuda.h"

namespace flashinfer_lite {

// The pointers are device pointers. seqlens_kv and the pages of the base's block_table are unused:
// they are the views below.
struct CudaAppendKvParams : AppendKvParams {
  LengthsView device_seqlens_kv;
  BlockTableView device_block_table;
};

}  // namespace flashinfer_lite
