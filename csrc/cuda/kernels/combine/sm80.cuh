// Merges attention states of the same rows over disjoint keys:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
//   out_partial [num_states, batch, seqlen_q, num_heads_q, head_dim_v], lse_partial [num_states,
//   batch, num_heads_q, seqlen_q]: the splits of decode, or what merge_states is given; any strides
//
// A warp takes 64 columns of a row. States are added in order; one with lse = -inf is empty and its
// out is not read. Every partial is read once, but few rows of many states are bound by latency, so
// the loads of several states are under way together.
#pragma once

#include "common/params/attention.h"
#include "common/types.h"
#include "cuda/tile/merge.cuh"

namespace flashinfer_lite::combine {

using Params = CombineParams;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

template <class Cfg>
__global__ void __launch_bounds__(kThreads) combine_sm80(const __grid_constant__ Params p) {
  using Partial = typename Cfg::Partial;
  using Element = typename Cfg::Element;
  const int lane = arch::thread_idx() % 32;
  const int64_t warp = int64_t{arch::block_idx()} * kWarps + arch::thread_idx() / 32;
  const int64_t parts = ceil_div(p.head_dim_v, kMergedColumns), index = warp / parts;
  if (!arch::predicate(index < p.batch_size * p.seqlen_q * p.num_heads_q)) return;
  const int64_t batch_idx = index / p.num_heads_q / p.seqlen_q;
  const int64_t query = index / p.num_heads_q % p.seqlen_q;
  const int64_t head = index % p.num_heads_q;

  tile::RowStates<Partial> states;
  states.lse = static_cast<const float*>(p.lse_partial) + batch_idx * p.lse_partial_batch +
               head * p.lse_partial_head + query * p.lse_partial_seqlen;
  states.out = static_cast<const Partial*>(p.out_partial.data) + batch_idx * p.out_partial.batch +
               query * p.out_partial.seqlen + head * p.out_partial.head;
  states.lse_stride = p.lse_partial_state;
  states.out_stride = p.out_partial_state;
  states.count = p.num_states;
  Element* out = static_cast<Element*>(p.out.data) + batch_idx * p.out.batch +
                 query * p.out.seqlen + head * p.out.head;
  const int64_t first_col = warp % parts * kMergedColumns;
  const float largest = tile::largest_lse(states, lane);
  const float weights = tile::merge_columns(states, largest, out, first_col, p.head_dim_v, lane);
  if (first_col == 0 && lane == 0) {
    const int64_t at = (batch_idx * p.num_heads_q + head) * p.seqlen_q + query;
    arch::stg(static_cast<float*>(p.lse) + at, tile::merged_lse(largest, weights));
  }
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = combine::Params;
  static constexpr int smem_bytes = 0;

  static Status launch(const Params& p, Stream stream) {
    const int64_t rows = p.batch_size * p.seqlen_q * p.num_heads_q;
    const int64_t warps = rows * ceil_div(p.head_dim_v, kMergedColumns);
    const auto blocks = static_cast<uint32_t>((warps + kWarps - 1) / kWarps);
    const LaunchConfig config{blocks, kThreads, smem_bytes};
    return arch::launch<combine_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::combine
