// Merges attention states of the same rows over disjoint keys:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
//   out_partial [num_states, batch, seqlen_q, num_heads_q, head_dim_v], lse_partial [num_states,
//   batch, num_heads_q, seqlen_q]: the splits of decode, or what merge_states is given; any strides
//
// A warp takes one row. States are added in order; one with lse = -inf is empty and its out is not
// read. Bound by memory: every partial is read once.
#pragma once

#include <cmath>

#include "common/params/attention.h"
#include "common/types.h"
#include "cuda/tile/softmax.cuh"

namespace flashinfer_lite::combine {

using Params = CombineParams;

constexpr int kWarps = 4;  // rows per thread block
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 256 / 32;  // per lane, at a time

struct CombineRow {
  int64_t batch_idx, query, head;
};

// The largest lse of the row's states. A NaN is passed over here and met again in its weight.
__device__ __forceinline__ float largest_lse(const Params& p, const float* lse, int lane) {
  float largest = tile::kMinusInf;
#pragma unroll 1
  for (int64_t s = lane; s < p.num_states; s += 32) {
    largest = fmaxf(largest, arch::ldg(lse + s * p.lse_partial_state));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, arch::shfl_xor(largest, distance));
  }
  return largest;
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads) combine_sm80(const __grid_constant__ Params p) {
  using Partial = typename Cfg::Partial;
  using Element = typename Cfg::Element;
  constexpr auto kLog2E = static_cast<float>(tile::kLog2E);
  const int lane = arch::thread_idx() % 32;
  const int64_t index = int64_t{arch::block_idx()} * kWarps + arch::thread_idx() / 32;
  if (!arch::predicate(index < p.batch_size * p.seqlen_q * p.num_heads_q)) return;
  const CombineRow row{index / p.num_heads_q / p.seqlen_q, index / p.num_heads_q % p.seqlen_q,
                       index % p.num_heads_q};

  const float* lse_partial = static_cast<const float*>(p.lse_partial) +
                             row.batch_idx * p.lse_partial_batch + row.head * p.lse_partial_head +
                             row.query * p.lse_partial_seqlen;
  const Partial* out_partial = static_cast<const Partial*>(p.out_partial.data) +
                               row.batch_idx * p.out_partial.batch +
                               row.query * p.out_partial.seqlen + row.head * p.out_partial.head;
  Element* out = static_cast<Element*>(p.out.data) + row.batch_idx * p.out.batch +
                 row.query * p.out.seqlen + row.head * p.out.head;
  const float largest = largest_lse(p, lse_partial, lane);
  float weights = 0.f;
  int64_t first_col = 0;
  do {  // once for heads to 256
    float sum[kColumns] = {};
    weights = 0.f;
#pragma unroll 1
    for (int64_t first = 0; first < p.num_states; first += 32) {
      // A lane reads the lse of one state and keeps its weight for all.
      const bool exists = first + lane < p.num_states;
      const float lse =
          exists ? arch::ldg(lse_partial + (first + lane) * p.lse_partial_state) : tile::kMinusInf;
      const float own = lse == tile::kMinusInf ? 0.f : arch::exp2((lse - largest) * kLog2E);
      const auto here = static_cast<int>(p.num_states - first < 32 ? p.num_states - first : 32);
      const uint32_t full = arch::ballot(lse != tile::kMinusInf);
#pragma unroll 4
      for (int s = 0; s < here; ++s) {
        const float weight = arch::shfl(own, s);
        if ((full >> s & 1u) == 0) continue;  // empty: its out may hold anything
        weights += weight;
        const Partial* state = out_partial + (first + s) * p.out_partial_state;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int64_t col = first_col + i * 32 + lane;
          if (!arch::predicate(col < p.head_dim_v)) continue;
          sum[i] = fmaf(weight, arch::to_float(arch::ldg(state + col)), sum[i]);
        }
      }
    }
    const float inverse = weights == 0.f ? 0.f : 1.f / weights;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t col = first_col + i * 32 + lane;
      if (!arch::predicate(col < p.head_dim_v)) continue;
      arch::stg(out + col, arch::from_float<Element>(sum[i] * inverse));
    }
    first_col += kColumns * 32;
  } while (first_col < p.head_dim_v);
  if (lane == 0) {
    const int64_t at = (row.batch_idx * p.num_heads_q + row.head) * p.seqlen_q + row.query;
    arch::stg(static_cast<float*>(p.lse) + at,
              weights == 0.f ? tile::kMinusInf : largest + arch::log2(weights) * tile::kLn2);
  }
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = combine::Params;
  static constexpr int smem_bytes = 0;

  static Status launch(const Params& p, Stream stream) {
    const int64_t rows = p.batch_size * p.seqlen_q * p.num_heads_q;
    const auto blocks = static_cast<uint32_t>((rows + kWarps - 1) / kWarps);
    const LaunchConfig config{blocks, kThreads, smem_bytes};
    return arch::launch<combine_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::combine
