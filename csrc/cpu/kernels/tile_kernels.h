// The table of a level with tiles, AMX's or those of dot_tiles.h.
#pragma once

#include "cpu/kernels/attention_bwd_tiles.h"
#include "cpu/kernels/attention_tiles.h"
#include "cpu/kernels/decode_tiles.h"
#include "cpu/kernels/flat_linear_tiles.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// Fewer rows than tiles pay for read K and V in place on vectors: the level below does.
template <const KernelTable* (*below)()>
struct TileForward {
  static const Kernel<AttentionFwdParams>& one() { return below()->bfloat16.attention_fwd; }

  static bool in_place(const AttentionFwdParams& p) {
    return runs_on_tiles_in_place(p.rows_per_kv_head(), kLeastTileRows);
  }
  static int64_t scratch(const AttentionFwdParams& p) {
    if (in_place(p)) return attention_fwd_scratch<FewRowsScratch>(p);
    return forward_plan<TileScratch>(p).pack ? attention_fwd_scratch<TileScratch>(p)
                                             : one().scratch(p);
  }
  static void run(const AttentionFwdParams& p, int64_t task, void* scratch) {
    if (in_place(p)) {
      attention_fwd<FewRowsScratch>(p, task, scratch);
    } else if (forward_plan<TileScratch>(p).pack) {
      attention_fwd<TileScratch>(p, task, scratch);
    } else {
      one().run(p, task, scratch);
    }
  }
};

// The kernels of the level below, but for bfloat16's attention and flat_gemm.
template <const KernelTable* (*below)()>
KernelTable with_tiles() {
  KernelTable table = *below();
  table.bfloat16.forward_plan = forward_plan<TileScratch>;
  table.bfloat16.attention_fwd = {attention_fwd_tasks<TileScratch>, TileForward<below>::scratch,
                                  TileForward<below>::run};
  using Backward = TileBackwardScratch;
  table.bfloat16.attention_bwd = {attention_bwd_tasks<Backward>, attention_bwd_scratch<Backward>,
                                  attention_bwd<Backward>};
  table.bfloat16.flat_gemm = {flat_linear_tasks<BFloat16>, flat_gemm_tiles_scratch,
                              flat_gemm_tiles};
  return table;
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
