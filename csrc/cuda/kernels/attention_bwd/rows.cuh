// What comes before and after: the statistics of the rows, and dQ from its accumulator.
#pragma once

#include "cuda/kernels/attention_bwd/block.cuh"

namespace flashinfer_lite::attention_bwd {

template <class Cfg>
struct RowsTraits {
  using Tile = typename Sizes<Cfg>::RowTile;
  static constexpr int smem_bytes = 2 * Tile::bytes;  // dO | out
};

// delta is the diagonal of dO out^T by the product that dP comes from: so a row that saw one key,
// whose out is v, has dP - delta = 0 to the bit.
template <class Cfg>
__global__ void __launch_bounds__(Sizes<Cfg>::row_threads)
    attention_bwd_rows_sm80(const __grid_constant__ Params p) {
  using S = Sizes<Cfg>;
  using Tile = typename S::RowTile;
  using Element = const typename Cfg::Element;
  const tile::ForwardWork work = tile::forward_work(p, static_cast<uint32_t>(arch::block_idx()));
  const auto sequence = tile::find_sequence<Cfg, false>(p, work);
  const Head<Cfg> h(p, sequence, work.head_kv);
  const int first_row = sequence.block * Cfg::block_m;
  if (Cfg::ragged && first_row >= h.rows.rows) return;  // nobody needs the block
  const int thread = arch::thread_idx();
  const int lane = thread % 32;
  const Tile dout{arch::dynamic_smem()};
  const Tile out{dout.base + Tile::bytes};
  tile::load_rows<S::row_threads>(dout, h.template row_view<Element>(p.dout, first_row),
                                  static_cast<int>(p.head_dim_v), p.vector_dout, thread);
  tile::load_rows<S::row_threads>(out, h.template row_view<Element>(p.out, first_row),
                                  static_cast<int>(p.head_dim_v), p.vector_out, thread);
  arch::cp_async_commit();

  if (p.dq_accum != nullptr) {
    auto* zeros = reinterpret_cast<arch::U32x4*>(h.dq_accum(first_row));
    constexpr int kCount = Cfg::block_m * Cfg::head_dim / 4;
#pragma unroll 1
    for (int i = thread; i < kCount; i += S::row_threads) {
      arch::stg(zeros + i, arch::U32x4{0, 0, 0, 0});
    }
  }

  arch::cp_async_wait<0>();
  arch::sync_threads();  // both have landed for all
  const int warp_row = thread / 32 * 16;
  tile::Accumulator<1, 16> dot;
  tile::clear(dot);
  tile::qk_gemm(dout, warp_row, out.from_row(warp_row), dot, lane);

  // Of each quad, the lane that holds the diagonal: columns 2 t and 2 t + 1 of row g.
  const int g = lane / 4;
  if (lane % 4 != g / 2) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first_row + warp_row + half * 8 + g;
    const float* pair = &dot[0][half][2 * half];
    tile::Float2 stats{tile::kMinusInf, 0.f};
    if (arch::predicate(r < h.rows.rows)) {
      const tile::Row row = h.rows[r];
      const int64_t at = tile::lse_index<Cfg>(p, h.batch_q, row);
      const float lse = arch::ldg(static_cast<const float*>(p.lse) + at);
      const float delta = g % 2 == 0 ? pair[0] : pair[1];
      const float dlse = p.dlse == nullptr ? 0.f : arch::ldg(p.dlse + at);
      if (lse != tile::kMinusInf) {
        stats = {lse * static_cast<float>(tile::kLog2E), delta - dlse};
      }
    }
    arch::stg(reinterpret_cast<tile::Float2*>(h.stats(r)), stats);
  }
}

// A warp's 16 rows of dQ, by way of its rows of a tile.
template <class Cfg>
__device__ __forceinline__ void store_dq(float (&dq)[1][Cfg::head_dim / 8][4], const Head<Cfg>& h,
                                         const typename Sizes<Cfg>::RowTile& tile, int first_row,
                                         int warp_row, int lane) {
  const Params& p = h.p;
  tile::multiply(dq, p.grad_scale);
  tile::store_rows(dq, tile, warp_row, h.template row_view<typename Cfg::Element>(p.dq, first_row),
                   static_cast<int>(p.head_dim), p.vector_dq, lane);
}

template <class Cfg>
__global__ void __launch_bounds__(Sizes<Cfg>::row_threads)
    attention_bwd_finish_sm80(const __grid_constant__ Params p) {
  const tile::ForwardWork work = tile::forward_work(p, static_cast<uint32_t>(arch::block_idx()));
  const auto sequence = tile::find_sequence<Cfg, false>(p, work);
  const Head<Cfg> h(p, sequence, work.head_kv);
  const int first_row = sequence.block * Cfg::block_m;
  if (Cfg::ragged && first_row >= h.rows.rows) return;  // nobody needs the block
  const int lane = arch::thread_idx() % 32;
  const int warp_row = arch::thread_idx() / 32 * 16;
  const float* from = h.dq_accum(first_row + warp_row) + lane;
  tile::Accumulator<1, Cfg::head_dim> dq;
#pragma unroll
  for (int n = 0; n < Cfg::head_dim / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[0][n][e] = arch::ldg(from + (n * 4 + e) * 32);
  store_dq<Cfg>(dq, h, {arch::dynamic_smem()}, first_row, warp_row, lane);
}

}  // namespace flashinfer_lite::attention_bwd
