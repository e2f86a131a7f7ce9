// What one flat_linear call works on when its tensors are in device memory.
#pragma once

#include "common/params/flat_linear.h"

namespace flashinfer_lite {

// The pointers are device pointers.
struct CudaFlatLinearParams : FlatLinearParams {
  // Whether every row of the tensor starts on 16 bytes (of out: on 8), so that wide accesses may be
  // used.
  bool vector_x = false;
  bool vector_weight = false;
  bool vector_out = false;

  int64_t num_m_blocks = 0;
  int64_t num_n_blocks = 0;

  // flat_gemm: how K is cut. With more than one split each leaves its sums in `partial`, and the
  // last to arrive, which the tickets tell, adds them up.
  int64_t splits = 1;
  int64_t k_per_split = 0;      // a multiple of every row's block_k
  float* partial = nullptr;     // [num_n_blocks, splits, num_m_blocks, block_m * block_n]
  uint32_t* tickets = nullptr;  // [num_n_blocks, num_m_blocks], all 0 between launches
};

}  // namespace flashinfer_lite
