// dQ of a block of rows without atomics, or the gradient of the mask: see sm80.cuh.
#pragma once

#include "cuda/kernels/attention_bwd/block.cuh"
#include "cuda/kernels/attention_bwd/rows.cuh"

namespace flashinfer_lite::attention_bwd {

template <class Cfg>
struct QueriesTraits : Sizes<Cfg> {
  using Element = typename Cfg::Element;
  static constexpr int num_threads = Sizes<Cfg>::row_threads;
  // As many keys a step as the registers leave room for beside dQ.
  static constexpr int block_n = std::min(Cfg::block_n, Cfg::head_dim > 128 ? 32 : 64);
  using KeyTile = tile::SmemTile<Element, block_n, Cfg::head_dim>;
  using Scores = tile::Accumulator<1, block_n>;
  using RowGradient = tile::Accumulator<1, Cfg::head_dim>;
  static constexpr int stage_bytes = 2 * KeyTile::bytes;  // K | V
  static constexpr int smem_bytes = RowBlock<Cfg>::bytes + Cfg::num_stages * stage_bytes;
};

// The warp's scores' gradients to where the mask's elements are, which several rows may share.
template <class Cfg, int kTiles>
__device__ __forceinline__ void add_mask_gradient(const float (&ds)[1][kTiles][4],
                                                  const Head<Cfg>& h, const tile::KeySlots& slots,
                                                  const tile::ScoreOrigin& at, int lane) {
  const MaskGradient& dmask = h.p.dmask;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = at.row + half * 8 + lane / 4;
    const bool exists = r < h.rows.rows;
    float* row = dmask.data + tile::mask_offset(dmask, at.batch_idx, h.rows[r]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = at.key + n * 8 + lane % 4 * 2 + e;
        if (!arch::predicate(exists && key < slots.end)) continue;
        arch::atomic_add(row + key * dmask.col, ds[0][n][2 * half + e]);
      }
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(QueriesTraits<Cfg>::num_threads)
    attention_bwd_queries_sm80(const __grid_constant__ Params p) {
  using T = QueriesTraits<Cfg>;
  using Element = const typename Cfg::Element;
  const tile::ForwardWork work = tile::forward_work(p, static_cast<uint32_t>(arch::block_idx()));
  const auto sequence = tile::find_sequence<Cfg, false>(p, work);
  const Head<Cfg> h(p, sequence, work.head_kv);
  const int first_row = sequence.block * Cfg::block_m;
  if (Cfg::ragged && first_row >= h.rows.rows) return;  // nobody needs the block
  const int lane = arch::thread_idx() % 32;
  const int warp_row = arch::thread_idx() / 32 * 16;
  const tile::SlotsOf<Cfg> slots = sequence.slots;
  const bool of_mask = p.pass == CudaBwdPass::kMask;

  const int last_row = std::min(first_row + Cfg::block_m, h.rows.rows) - 1;
  const int first_query = h.rows[first_row].query;
  const int last_query = h.rows[last_row].query;
  const KeyRange some = slots.visibility(p).rows(first_query, last_query);
  // Counted from the first slot: left padding does not move the blocks.
  const int first_block = (static_cast<int>(some.begin) - slots.begin) / T::block_n;
  const int last_block = (static_cast<int>(some.end) - slots.begin + T::block_n - 1) / T::block_n;

  const RowBlock<Cfg> rows{arch::dynamic_smem()};
  const auto k = [&](int stage) -> typename T::KeyTile {
    return {rows.base + static_cast<uint32_t>(RowBlock<Cfg>::bytes + stage * T::stage_bytes)};
  };
  const auto v = [&](int stage) ->
      typename T::KeyTile { return {k(stage).base + T::KeyTile::bytes}; };

  typename T::RowGradient dq;
  tile::clear(dq);
  if (!some.empty()) {
    rows.template load<T::num_threads>(h, first_row);  // travels with the first keys
    const auto load = [&](int block, int stage) {
      const int first_key = slots.begin + block * T::block_n;
      tile::load_rows<T::num_threads>(
          k(stage), slot_rows<Element>(p.k, sequence.batch_kv, work.head_kv, first_key, slots),
          static_cast<int>(p.head_dim), p.vector_k, arch::thread_idx());
      tile::load_rows<T::num_threads>(
          v(stage), slot_rows<Element>(p.v, sequence.batch_kv, work.head_kv, first_key, slots),
          static_cast<int>(p.head_dim_v), p.vector_v, arch::thread_idx());
    };
    const auto step = [&](int block, int stage, const auto&) {
      if (block == first_block) rows.template drop_rows_without_keys<T::num_threads>();
      typename T::Scores s, ds;
      tile::clear(s);
      tile::qk_gemm(rows.q(), warp_row, k(stage), s, lane);
      tile::clear(ds);
      tile::qk_gemm(rows.dout(), warp_row, v(stage), ds, lane);
      const int first_key = slots.begin + block * T::block_n;
      const tile::ScoreOrigin at{h.batch_q, first_row + warp_row, first_key};
      const uint32_t stats = rows.stats(warp_row);
      if (!p.scale_first &&
          see_all(slots.visibility(p), first_query, last_query, first_key, T::block_n)) {
        score_gradients<false>(s, ds, h, slots, at, stats, !of_mask, lane);
      } else {
        score_gradients<true>(s, ds, h, slots, at, stats, !of_mask, lane);
      }
      if (of_mask) {
        add_mask_gradient(ds, h, slots, at, lane);
      } else {
        tile::pv_gemm(ds, k(stage), dq, lane);
      }
    };
    walk<Cfg::num_stages, T::num_threads, T::num_threads>(first_block, last_block, load, step);
  }
  if (of_mask) return;
  arch::sync_warp();  // the epilogue passes through the warp's own rows of Q
  store_dq<Cfg>(dq, h, rows.q(), first_row, warp_row, lane);
}

}  // namespace flashinfer_lite::attention_bwd
