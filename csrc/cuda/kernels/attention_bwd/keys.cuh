// dK and dV of a block of keys, and its share of dQ: see sm80.cuh.
#pragma once

#include "cuda/kernels/attention_bwd/block.cuh"

namespace flashinfer_lite::attention_bwd {

template <class Cfg>
struct KeysTraits : Sizes<Cfg> {
  using Element = typename Cfg::Element;
  static constexpr int block_n = Cfg::block_n;
  static constexpr int num_threads = Cfg::num_warps * 32;
  // The warps as a grid: over rows and keys for S and dP, which for dQ is rows and columns; over
  // keys and columns for dK and dV. 32 rows or keys a warp, or what there is.
  static constexpr int row_warps = std::min(2, Cfg::block_m / 16);
  static constexpr int other_warps = Cfg::num_warps / row_warps;
  static constexpr int key_warps = std::max(1, block_n / 32);
  static constexpr int column_warps = Cfg::num_warps / key_warps;
  static_assert(row_warps * other_warps == Cfg::num_warps, "the warps are a grid of rows");
  static_assert(key_warps * column_warps == Cfg::num_warps, "the warps are a grid of keys");

  static constexpr int warp_rows = Cfg::block_m / row_warps;
  static constexpr int warp_keys = block_n / other_warps;  // of S and dP
  static constexpr int dq_columns = Cfg::head_dim / other_warps;
  static constexpr int kv_keys = block_n / key_warps;
  static constexpr int kv_columns = Cfg::head_dim / column_warps;
  static_assert(sizeof(Element) == 4 || warp_keys % 16 == 0, "one load brings two n tiles");

  using KeyTile = tile::SmemTile<Element, block_n, Cfg::head_dim>;  // K, V
  // A row of P or dS is at least 128 bytes.
  static constexpr int score_columns = std::max(block_n, 128 / static_cast<int>(sizeof(Element)));
  using ScoreTile = tile::SmemTile<Element, Cfg::block_m, score_columns>;
  using Scores = tile::Accumulator<warp_rows / 16, warp_keys>;
  using RowGradient = tile::Accumulator<warp_rows / 16, dq_columns>;
  using KeyGradient = tile::Accumulator<kv_keys / 16, kv_columns>;

  static constexpr int smem_bytes =
      2 * KeyTile::bytes + 2 * ScoreTile::bytes + Cfg::num_stages * RowBlock<Cfg>::bytes;
  // Who loads ahead of a step. Two thread blocks on a multiprocessor, of four warps each, are out
  // of step anyway.
  static constexpr int early_threads = Cfg::num_warps > 4 ? num_threads / 2 : num_threads;
  // Eight warps on a multiprocessor have 255 registers a thread.
  static constexpr int blocks_per_sm = std::max(8 / Cfg::num_warps, 1);
};

// What a thread block works on, the same for all of its threads but for the warp.
template <class Cfg>
struct KeysBlock {
  using T = KeysTraits<Cfg>;

  template <class Sequence>
  __device__ __forceinline__ KeysBlock(const Params& p, const Sequence& s, int head_kv)
      : h(p, s, head_kv),
        slots(s.slots),
        batch_kv(s.batch_kv),
        seqlen_kv(static_cast<int>(s.seqlen_kv)),
        first_key(s.block * Cfg::block_n),
        warp(arch::thread_idx() / 32),
        lane(arch::thread_idx() % 32) {}

  // The same, of which the compiler knows nothing: what only the epilogue derives from it takes no
  // registers before.
  __device__ __forceinline__ KeysBlock afresh() const {
    KeysBlock b = *this;
    b.warp = arch::opaque(warp);
    b.lane = arch::opaque(lane);
    b.first_key = arch::opaque(first_key);
    b.batch_kv = arch::opaque(batch_kv);
    return b;
  }

  __device__ __forceinline__ typename T::KeyTile k() const { return {arch::dynamic_smem()}; }
  __device__ __forceinline__ typename T::KeyTile v() const {
    return {k().base + T::KeyTile::bytes};
  }
  __device__ __forceinline__ typename T::ScoreTile p_tile() const {
    return {v().base + T::KeyTile::bytes};
  }
  __device__ __forceinline__ typename T::ScoreTile ds_tile() const {
    return {p_tile().base + T::ScoreTile::bytes};
  }
  __device__ __forceinline__ RowBlock<Cfg> row_block(int stage) const {
    const uint32_t first = ds_tile().base + T::ScoreTile::bytes;
    return {first + static_cast<uint32_t>(stage * RowBlock<Cfg>::bytes)};
  }

  // Of the sequence. Those of a dense batch come from the parameters each time: registers are dear.
  __device__ __forceinline__ int64_t queries() const {
    if constexpr (Cfg::ragged) return slots.seqlen_q;
    return h.p.seqlen_q;
  }
  __device__ __forceinline__ int keys() const {
    return Cfg::ragged ? seqlen_kv : static_cast<int>(h.p.seqlen_kv);
  }
  __device__ __forceinline__ int warp_row() const { return warp / T::other_warps * T::warp_rows; }
  __device__ __forceinline__ int score_key() const { return warp % T::other_warps * T::warp_keys; }
  __device__ __forceinline__ int dq_column() const { return warp % T::other_warps * T::dq_columns; }
  __device__ __forceinline__ int kv_key() const { return warp / T::column_warps * T::kv_keys; }
  __device__ __forceinline__ int kv_column() const {
    return warp % T::column_warps * T::kv_columns;
  }

  Head<Cfg> h;
  tile::SlotsOf<Cfg> slots;
  int batch_kv;  // as tile::Sequence has it
  int seqlen_kv;
  int first_key;
  int warp, lane;
};

// P and dS of a block of rows, into their tiles.
template <bool kMasked, class Cfg>
__device__ __forceinline__ void make_scores(const KeysBlock<Cfg>& b, const RowBlock<Cfg>& rows,
                                            int first_row) {
  using T = KeysTraits<Cfg>;
  typename T::Scores s, ds;
  tile::clear(s);
  tile::qk_gemm(rows.q(), b.warp_row(), b.k().from_row(b.score_key()), s, b.lane);
  tile::clear(ds);
  tile::qk_gemm(rows.dout(), b.warp_row(), b.v().from_row(b.score_key()), ds, b.lane);
  const tile::ScoreOrigin at{b.h.batch_q, first_row + b.warp_row(), b.first_key + b.score_key()};
  score_gradients<kMasked>(s, ds, b.h, b.slots, at, rows.stats(b.warp_row()), true, b.lane);
  tile::stage(s, b.p_tile(), b.warp_row(), b.score_key(), b.lane);
  tile::stage(ds, b.ds_tile(), b.warp_row(), b.score_key(), b.lane);
}

template <class Cfg>
__device__ __forceinline__ void add_dq(const KeysBlock<Cfg>& b, int first_row) {
  using T = KeysTraits<Cfg>;
  typename T::RowGradient dq;
  tile::clear(dq);
  tile::xy_gemm(b.ds_tile(), b.warp_row(), b.k(), b.dq_column(), dq, b.lane);
  // The 32 lanes of each addition are neighbours in memory.
  float* to = b.h.dq_accum(first_row + b.warp_row()) + b.dq_column() * 16 + b.lane;
#pragma unroll
  for (int m = 0; m < T::warp_rows / 16; ++m)
#pragma unroll
    for (int n = 0; n < T::dq_columns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        arch::atomic_add(to + m * 16 * Cfg::head_dim + (n * 4 + e) * 32, dq[m][n][e]);
      }
}

// The gradient of the block's keys or values by way of the tile, which nobody reads any more. Slots
// outside of the sequence get 0.
template <class Cfg>
__device__ __forceinline__ void stage_gradient(const KeysBlock<Cfg>& b,
                                               typename KeysTraits<Cfg>::KeyGradient& acc,
                                               float scale,
                                               const typename KeysTraits<Cfg>::KeyTile& to) {
  using T = KeysTraits<Cfg>;
#pragma unroll
  for (int m = 0; m < T::kv_keys / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = b.first_key + b.kv_key() + m * 16 + half * 8 + b.lane / 4;
      const bool exists = slot >= b.slots.begin && slot < b.slots.end;
#pragma unroll
      for (int n = 0; n < T::kv_columns / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          acc[m][n][e] = exists ? acc[m][n][e] * scale : 0.f;
        }
    }
  }
  tile::stage(acc, to, b.kv_key(), b.kv_column(), b.lane);
}

template <class Cfg>
__device__ __forceinline__ void store_gradient(const KeysBlock<Cfg>& b, const Strided<void*>& x,
                                               const typename KeysTraits<Cfg>::KeyTile& from,
                                               int64_t cols, bool vector) {
  const tile::KeySlots all{0, b.keys()};
  const auto target =
      slot_rows<typename Cfg::Element>(x, b.batch_kv, b.h.rows.head_kv, b.first_key, all);
  tile::copy_rows(from, 0, Cfg::block_n, target, static_cast<int>(cols), vector, arch::thread_idx(),
                  KeysTraits<Cfg>::num_threads);
}

template <class Cfg>
__global__ void __launch_bounds__(KeysTraits<Cfg>::num_threads, KeysTraits<Cfg>::blocks_per_sm)
    attention_bwd_keys_sm80(const __grid_constant__ Params p) {
  using T = KeysTraits<Cfg>;
  using Element = const typename Cfg::Element;
  tile::ForwardWork work = tile::forward_work(p, static_cast<uint32_t>(arch::block_idx()));
  // The scheduler gives the last block of a head first; under a causal mask the first block of keys
  // has the most rows.
  work.m_block = static_cast<int>(p.num_m_blocks) - 1 - work.m_block;
  const KeysBlock<Cfg> b(p, tile::find_sequence<Cfg, true>(p, work), work.head_kv);
  if (Cfg::ragged && b.first_key >= b.keys()) return;  // nobody needs the block
  const Visibility visible = b.slots.visibility(p);
  const int64_t end_key = int64_t{b.first_key} + Cfg::block_n;
  const QueryRange queries = visible.queries(b.first_key, end_key, b.queries());
  typename T::KeyGradient dk, dv;
  tile::clear(dk);
  tile::clear(dv);
  if (queries.begin < queries.end) {
    const int thread = arch::thread_idx();
    tile::load_rows<T::num_threads>(
        b.k(), slot_rows<Element>(p.k, b.batch_kv, work.head_kv, b.first_key, b.slots),
        static_cast<int>(p.head_dim), p.vector_k, thread);
    tile::load_rows<T::num_threads>(
        b.v(), slot_rows<Element>(p.v, b.batch_kv, work.head_kv, b.first_key, b.slots),
        static_cast<int>(p.head_dim_v), p.vector_v, thread);
    // The rows that see every one of the keys, unless their scores want more than a scale.
    const QueryRange full = visible.queries_of_all(b.first_key, end_key, b.queries());
    const int first_full = static_cast<int>(full.begin) * p.group.value;
    const int end_full = p.scale_first ? 0 : static_cast<int>(full.end) * p.group.value;
    const auto load = [&](int block, int stage) {
      b.row_block(stage).template load<T::num_threads>(b.h, block * Cfg::block_m);
    };
    const auto step = [&](int block, int stage, const auto& load_rest) {
      const RowBlock<Cfg> rows = b.row_block(stage);
      const int first_row = block * Cfg::block_m;
      const int last_row = std::min(first_row + Cfg::block_m, b.h.rows.rows) - 1;
      if (first_row >= first_full && last_row < end_full) {
        make_scores<false>(b, rows, first_row);
      } else {
        rows.template drop_rows_without_keys<T::num_threads>();
        make_scores<true>(b, rows, first_row);
      }
      arch::sync_threads();  // P and dS of every warp are there
      load_rest();
      tile::xty_gemm(b.p_tile(), b.kv_key(), rows.dout(), b.kv_column(), dv, b.lane);
      tile::xty_gemm(b.ds_tile(), b.kv_key(), rows.q(), b.kv_column(), dk, b.lane);
      if (p.dq_accum != nullptr) add_dq(b, first_row);
    };
    const int first_row = static_cast<int>(queries.begin) * p.group.value;
    const int end_row = static_cast<int>(queries.end) * p.group.value;
    walk<Cfg::num_stages, T::num_threads, T::early_threads>(
        first_row / Cfg::block_m, (end_row + Cfg::block_m - 1) / Cfg::block_m, load, step);
    arch::sync_threads();  // no warp reads K any more
  }
  const KeysBlock<Cfg> after = b.afresh();
  stage_gradient(after, dk, p.grad_scale, after.k());
  stage_gradient(after, dv, 1.f, after.v());
  arch::sync_threads();  // the rows are complete
  store_gradient(after, p.dk, after.k(), p.head_dim, p.vector_dk);
  store_gradient(after, p.dv, after.v(), p.head_dim_v, p.vector_dv);
}

}  // namespace flashinfer_lite::attention_bwd
