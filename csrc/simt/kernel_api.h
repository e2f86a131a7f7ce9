// All that the wrapper layer (cuda/arch/cpu.cuh) needs of the executor.
#pragma once

#include "simt/async_copy.h"
#include "simt/barrier.h"
#include "simt/cuda_keywords.h"
#include "simt/global_memory.h"
#include "simt/mbarrier.h"
#include "simt/session.h"
#include "simt/shared_memory.h"
#include "simt/tensor_core.h"
#include "simt/warp_ops.h"

namespace flashinfer_lite::simt {

int block_index();
int num_blocks();

}  // namespace flashinfer_lite::simt
