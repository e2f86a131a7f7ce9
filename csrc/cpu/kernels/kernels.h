// All kernels of a level, and its table.
#pragma once

#include "cpu/kernels/append_kv.h"
#include "cpu/kernels/attention_bwd.h"
#include "cpu/kernels/attention_fwd.h"
#include "cpu/kernels/combine.h"
#include "cpu/kernels/flat_linear.h"
#include "cpu/kernels/unified_merge.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

template <class Element>
constexpr Kernels kernels_of() {
  using Scratch = ForwardScratch<Element>;
  using Backward = BackwardScratch<Element>;
  Kernels kernels{
      forward_plan<Scratch>,
      {attention_fwd_tasks<Scratch>, attention_fwd_scratch<Scratch>, attention_fwd<Scratch>},
      {attention_bwd_tasks<Backward>, attention_bwd_scratch<Backward>, attention_bwd<Backward>},
      {combine_tasks<Element>, combine_scratch<Element>, combine<Element>},
      {unified_merge_tasks<Element>, unified_merge_scratch<Element>, unified_merge<Element>},
      {append_kv_tasks, append_kv_scratch, append_kv<Element>},
      {},
      {}};
  if constexpr (sizeof(Element) < 8) {
    kernels.gemv = {flat_linear_tasks<Element>, gemv_scratch<Element>, gemv<Element>};
    kernels.flat_gemm = {flat_linear_tasks<Element>, flat_gemm_scratch<Element>,
                         flat_gemm<Element>};
  }
  return kernels;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
