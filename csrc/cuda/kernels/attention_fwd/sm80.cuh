// FlashAttention-2 forward on tensor cores (Dao, arXiv 2307.08691), compute capability 8.0 and up.
//
//   out = softmax(softmax_scale q k^T + masks) v      lse = log sum exp of the row's scores
//   q [batch, seqlen_q, num_heads_q, head_dim]    k [batch, seqlen_kv, num_heads_kv, head_dim]
//   out like q with head_dim_v                    v [batch, seqlen_kv, num_heads_kv, head_dim_v]
//
// A thread block owns block_m rows of one (batch, KV head): queries of all heads of the group, so
// that K and V are read once per group. Each warp owns whole rows and shares nothing but the tiles.
// Keys stream in blocks from the last visible to the first, counted from the sequence's first slot:
//   load V(n) | S = Q K(n)^T | load K(n-1) | mask, online softmax | O += P V(n)
//
// Blocks that every row sees whole take a step without masking. One buffer each of K and V is
// enough: V arrives under the first product, the next K under the softmax and the second.
//
// With a unified maximum (FlashDecoding++) the same pass stands on one phi per query head, and rows
// within the guard's bounds are stored; for others the block runs the online scheme and stores
// those.
//
// Shared memory: Q | K | V; unified besides: each lane's largest scores | a mask of each warp's
// rows that are left. The epilogue passes out through Q's rows.
#pragma once

#include <algorithm>

#include "common/params/attention_cuda.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/exact.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/scheduler.cuh"
#include "cuda/tile/scores.cuh"
#include "cuda/tile/sequence.cuh"
#include "cuda/tile/softmax.cuh"
#include "cuda/tile/unified.cuh"

namespace flashinfer_lite::attention_fwd {

using Params = CudaAttentionParams;

template <class Cfg>
struct Traits {
  using Element = typename Cfg::Element;
  static constexpr int num_threads = Cfg::num_warps * 32;
  static constexpr int m_tiles = Cfg::block_m / 16 / Cfg::num_warps;  // of 16 rows, per warp
  static_assert(m_tiles * 16 * Cfg::num_warps == Cfg::block_m, "warps own whole tiles of rows");
  static_assert(m_tiles <= 2, "row_bit has 32 rows a warp");
  static_assert(Cfg::block_n % 16 == 0, "a k step of P V is 16 keys");

  using QTile = tile::SmemTile<Element, Cfg::block_m, Cfg::head_dim>;
  using KTile = tile::SmemTile<Element, Cfg::block_n, Cfg::head_dim>;
  using VTile = KTile;
  using Scores = tile::Accumulator<m_tiles, Cfg::block_n>;
  using Output = tile::Accumulator<m_tiles, Cfg::head_dim>;
  using Largest = tile::LargestScores<m_tiles, num_threads>;
  static constexpr int tile_bytes = QTile::bytes + KTile::bytes + VTile::bytes;
  static constexpr int smem_bytes = tile_bytes + Largest::bytes + Cfg::num_warps * 4;
  // Eight warps on a multiprocessor have 255 registers a thread.
  static constexpr int blocks_per_sm = std::max(8 / Cfg::num_warps, 1);
};

// What a thread block works on, the same for all of its threads.
template <class Cfg>
struct Block {
  using T = Traits<Cfg>;
  using Element = typename T::Element;

  __device__ __forceinline__ Block(const Params& params, uint32_t block)
      : p(params), warp(arch::thread_idx() / 32), lane(arch::thread_idx() % 32) {
    const tile::ForwardWork work = tile::forward_work(p, block);
    const auto s = tile::find_sequence<Cfg, false>(p, work);
    const int head_kv = work.head_kv;
    batch_q = s.batch_q, slots = s.slots;
    first_row = s.block * Cfg::block_m;
    rows = {head_kv, p.group, s.rows};
    k_head = static_cast<const Element*>(p.k.data) + s.batch_kv * p.k.batch + head_kv * p.k.head;
    v_head = static_cast<const Element*>(p.v.data) + s.batch_kv * p.v.batch + head_kv * p.v.head;
    scale = p.scale_first ? 1.f : p.scale_log2;
  }

  __device__ __forceinline__ typename T::QTile q() const { return {arch::dynamic_smem()}; }
  __device__ __forceinline__ typename T::KTile k() const { return {q().base + T::QTile::bytes}; }
  __device__ __forceinline__ typename T::VTile v() const { return {k().base + T::KTile::bytes}; }
  __device__ __forceinline__ typename T::Largest largest() const {
    return {q().base + static_cast<uint32_t>(T::tile_bytes)};
  }
  __device__ __forceinline__ uint32_t rows_left() const {
    return q().base + static_cast<uint32_t>(T::smem_bytes - (Cfg::num_warps - warp) * 4);
  }

  // What only the epilogue derives from this takes no registers before.
  __device__ __forceinline__ Block afresh() const {
    Block b = *this;
    b.lane = arch::opaque(lane);
    b.batch_q = arch::opaque(batch_q);
    b.first_row = arch::opaque(first_row);
    b.rows.head_kv = arch::opaque(rows.head_kv);
    return b;
  }

  __device__ __forceinline__ int warp_row() const { return warp * T::m_tiles * 16; }
  __device__ __forceinline__ int first_key(int n_block) const {
    return slots.begin + n_block * Cfg::block_n;
  }

  const Params& p;
  int warp, lane;
  int batch_q;    // as tile::Sequence has it
  int first_row;  // of the block, among the rows of its KV head
  tile::PackedRows rows;
  tile::SlotsOf<Cfg> slots;
  const Element* k_head;
  const Element* v_head;
  float scale;  // of S to log2, applied by the exponential
};

// Blocks of keys, counted from the first visible slot: [first, last) hold a key that some row sees,
// [full_first, full_last) among them hold only keys that every row sees.
struct KeyBlocks {
  int first, full_first, full_last, last;
};

template <class Cfg>
__device__ __forceinline__ KeyBlocks key_blocks(const Block<Cfg>& b) {
  const int last_row = std::min(b.first_row + Cfg::block_m, b.rows.rows) - 1;
  const int first_query = b.rows[b.first_row].query;
  const int last_query = b.rows[last_row].query;
  const Visibility visible = b.slots.visibility(b.p);
  const KeyRange some = visible.rows(first_query, last_query);
  if (some.empty() || (Cfg::ragged && b.first_row >= b.rows.rows)) return {0, 0, 0, 0};
  // Slots number less than 2^30: from here on 32 bits do.
  constexpr int block_n = Cfg::block_n;
  const int origin = b.slots.begin;
  KeyBlocks n;
  n.first = (static_cast<int>(some.begin) - origin) / block_n;
  n.last = (static_cast<int>(some.end) - origin + block_n - 1) / block_n;
  const int every_begin = static_cast<int>(visible.row(last_query).begin) - origin;
  const int every_end = static_cast<int>(visible.row(first_query).end) - origin;
  n.full_last = std::max(every_end / block_n, n.first);
  n.full_first = (every_begin + block_n - 1) / block_n;
  n.full_first = std::max(std::min(n.full_first, n.full_last), n.first);
  // What scales first has no step without masking.
  if (b.p.scale_first) n.full_first = n.full_last = n.last;
  return n;
}

template <class Cfg>
__device__ __forceinline__ void load_q(const Block<Cfg>& b) {
  using Element = typename Cfg::Element;
  const Element* sequence = static_cast<const Element*>(b.p.q.data) + b.batch_q * b.p.q.batch;
  const tile::PackedRowView<const Element> source{sequence, b.p.q.seqlen, b.p.q.head, b.rows,
                                                  b.first_row};
  tile::load_rows<Traits<Cfg>::num_threads>(b.q(), source, static_cast<int>(b.p.head_dim),
                                            b.p.vector_q, arch::thread_idx());
}

template <class Cfg>
__device__ __forceinline__ void load_k(const Block<Cfg>& b, int n_block) {
  const tile::KvRows<typename Cfg::Element> source{b.k_head, b.p.k.seqlen, b.first_key(n_block),
                                                   b.slots.end};
  tile::load_rows<Traits<Cfg>::num_threads>(b.k(), source, static_cast<int>(b.p.head_dim),
                                            b.p.vector_k, arch::thread_idx());
  arch::cp_async_commit();
}

template <class Cfg>
__device__ __forceinline__ void load_v(const Block<Cfg>& b, int n_block) {
  const tile::KvRows<typename Cfg::Element> source{b.v_head, b.p.v.seqlen, b.first_key(n_block),
                                                   b.slots.end};
  tile::load_rows<Traits<Cfg>::num_threads>(b.v(), source, static_cast<int>(b.p.head_dim_v),
                                            b.p.vector_v, arch::thread_idx());
  arch::cp_async_commit();
}

// What a pass over the keys stands on. kExact is kOnline that minds values that are not finite; the
// bits of rows that meet only finite ones are the same.
enum class Pass : uint8_t { kUnified, kOnline, kExact };

// One block of keys. On entry K(n) has landed and no warp reads V any more; on return the same of
// K(n - 1). Without kMasked every row sees every key of the block.
template <bool kMasked, class Cfg>
__device__ __forceinline__ void step(const Block<Cfg>& b, int n_block, bool is_last, Pass pass,
                                     tile::SoftmaxState<Traits<Cfg>::m_tiles>& state,
                                     typename Traits<Cfg>::Output& acc_o) {
  using T = Traits<Cfg>;
  typename T::Scores acc_s;
  tile::clear(acc_s);
  load_v(b, n_block);
  tile::qk_gemm(b.q(), b.warp_row(), b.k(), acc_s, b.lane);

  arch::cp_async_wait<0>();
  arch::sync_threads();  // V(n) has landed for all; no warp reads K(n) any more
  if (!is_last) load_k(b, n_block - 1);

  if constexpr (kMasked) {
    const tile::ScoreOrigin at{b.batch_q, b.first_row + b.warp_row(), b.first_key(n_block)};
    if (b.p.scale_first) tile::scale_scores(acc_s, b.p, b.rows, b.slots, at, b.lane);
    tile::hide_scores(acc_s, b.p, b.rows, b.slots, at, b.lane);
  }
  if (pass == Pass::kUnified) {
    b.largest().raise(acc_s);
  } else {
    tile::raise_base(acc_s, b.scale, state, acc_o);
  }
  tile::exponentials<kMasked>(acc_s, b.scale, state);
  if (kMasked && pass == Pass::kExact) {
    tile::add_visible_non_finite(acc_s, b.v(), acc_o, b.lane);
    arch::sync_threads();  // every warp has seen V(n) as it was
    tile::zero_non_finite<T::num_threads>(b.v(), arch::thread_idx());
    arch::sync_threads();  // and now sees it finite
  }
  tile::pv_gemm(acc_s, b.v(), acc_o, b.lane);

  arch::cp_async_wait<0>();
  arch::sync_threads();  // K(n - 1) has landed for all; no warp reads V(n) any more
}

// The state before any key: unified, each row stands on the phi of its head.
template <class Cfg>
__device__ __forceinline__ void reset(const Block<Cfg>& b, Pass pass,
                                      tile::SoftmaxState<Traits<Cfg>::m_tiles>& state) {
  state.reset();
  if (pass != Pass::kUnified) return;
  b.largest().reset();
#pragma unroll
  for (int m = 0; m < Traits<Cfg>::m_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = b.first_row + b.warp_row() + m * 16 + half * 8 + b.lane / 4;
      state.row_max[m][half] = tile::phi_log2(b.p, b.rows[r].head);
    }
  }
}

// All blocks of keys, from the last to the first.
template <class Cfg>
__device__ __forceinline__ void attend(const Block<Cfg>& b, const KeyBlocks& blocks, Pass pass,
                                       tile::SoftmaxState<Traits<Cfg>::m_tiles>& state,
                                       typename Traits<Cfg>::Output& acc_o) {
  reset(b, pass, state);
  tile::clear(acc_o);
  if (blocks.first == blocks.last) return;
  load_k(b, blocks.last - 1);
  arch::cp_async_wait<0>();
  arch::sync_threads();  // Q and the first K have landed for all

#pragma unroll 1
  for (int n = blocks.last - 1; n >= blocks.first; --n) {
    const bool is_last = n == blocks.first;
    if (pass != Pass::kExact && n >= blocks.full_first && n < blocks.full_last) {
      step<false>(b, n, is_last, pass, state, acc_o);
    } else {
      step<true>(b, n, is_last, pass, state, acc_o);
    }
  }
}

// The bit of the warp's row r in a mask of its rows: a vote gives those of eight rows, one a quad.
__device__ __forceinline__ uint32_t row_bit(int r) { return 1u << (r % 8 * 4 + r / 8); }
constexpr uint32_t kVotesOfQuads = 0x11111111u;

// The rows that a mask of the warp's rows has.
template <class View>
struct SomeRows {
  View view;
  int warp_row;
  uint32_t mask;

  __device__ __forceinline__ auto* row(int r) const { return view.row(r); }
  __device__ __forceinline__ bool valid(int r) const {
    return view.valid(r) && (mask & row_bit(r - warp_row)) != 0;
  }
};

// After a unified pass: normalises the rows, and says which of the warp's are left to the online
// softmax.
template <class Cfg>
__device__ __forceinline__ uint32_t settle(const Block<Cfg>& b,
                                           const tile::SoftmaxState<Traits<Cfg>::m_tiles>& state,
                                           typename Traits<Cfg>::Output& acc_o,
                                           float (&lse)[Traits<Cfg>::m_tiles][2]) {
  using T = Traits<Cfg>;
  uint32_t checked = 0;
  uint32_t left = 0;
#pragma unroll
  for (int m = 0; m < T::m_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = m * 16 + half * 8 + b.lane / 4;
      tile::UnifiedRow row;
      row.phi = state.row_max[m][half];
      row.row_max = b.largest().row_max(m, half, b.scale);
      row.row_sum = tile::quad_sum(state.row_sum[m][half]);
      row.largest = 0;
#pragma unroll
      for (int n = 0; n < Cfg::head_dim / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          row.largest = std::max(row.largest, tile::magnitude(acc_o[m][n][e]));
      row.largest = tile::quad_max(row.largest);
      const RowVerdict verdict = row.template verdict<typename Cfg::Element>();
      const bool empty = verdict == RowVerdict::kNoKey;
      const bool exists = b.first_row + b.warp_row() + r < b.rows.rows;
      const bool violated = exists && verdict == RowVerdict::kViolated;
      checked |= (arch::ballot(exists && !empty) & kVotesOfQuads) << (2 * m + half);
      left |= (arch::ballot(violated) & kVotesOfQuads) << (2 * m + half);
      const float inverse = 1.f / row.row_sum;
      lse[m][half] = empty ? tile::kMinusInf : row.lse();
#pragma unroll
      for (int n = 0; n < Cfg::head_dim / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          acc_o[m][n][e] = empty ? 0.f : acc_o[m][n][e] * inverse;
    }
  }
  if (b.lane == 0) {
    arch::sts(b.rows_left(), left);
    tile::count_rows(b.p.row_counters, static_cast<uint32_t>(std::popcount(checked)),
                     static_cast<uint32_t>(std::popcount(left)));
  }
  return left;
}

// Writes the warp's rows that the mask has.
template <class Cfg>
__device__ __forceinline__ void store_out_lse(const Block<Cfg>& block,
                                              const typename Traits<Cfg>::Output& acc_o,
                                              const float (&lse)[Traits<Cfg>::m_tiles][2],
                                              uint32_t mask) {
  using Element = typename Cfg::Element;
  using T = Traits<Cfg>;
  const Block<Cfg> b = block.afresh();
  const Params& p = b.p;
  Element* sequence = static_cast<Element*>(p.out.data) + b.batch_q * p.out.batch;
  const tile::PackedRowView<Element> view{sequence, p.out.seqlen, p.out.head, b.rows, b.first_row};
  const SomeRows<tile::PackedRowView<Element>> target{view, b.warp_row(), mask};
  tile::store_rows(acc_o, b.q(), b.warp_row(), target, static_cast<int>(p.head_dim_v), p.vector_out,
                   b.lane);
  if (b.lane % 4 != 0) return;  // the quad holds one row
#pragma unroll
  for (int m = 0; m < T::m_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = b.warp_row() + m * 16 + half * 8 + b.lane / 4;
      if (!arch::predicate(target.valid(r))) continue;
      const tile::Row row = b.rows[b.first_row + r];
      const int64_t at = tile::lse_index<Cfg>(p, b.batch_q, row);
      arch::stg(static_cast<float*>(p.lse) + at, lse[m][half]);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Traits<Cfg>::num_threads, Traits<Cfg>::blocks_per_sm)
    attention_fwd_sm80(const __grid_constant__ Params p) {
  const Block<Cfg> b(p, static_cast<uint32_t>(arch::block_idx()));
  const KeyBlocks blocks = key_blocks(b);
  if (blocks.first != blocks.last) load_q(b);  // travels with the first K

  tile::SoftmaxState<Traits<Cfg>::m_tiles> state;
  typename Traits<Cfg>::Output acc_o;
  float lse[Traits<Cfg>::m_tiles][2];
  Pass pass = p.unified ? Pass::kUnified : Pass::kOnline;
#pragma unroll 1
  for (;;) {
    attend(b, blocks, pass, state, acc_o);
    if (pass == Pass::kUnified) {
      const uint32_t left = settle(b, state, acc_o, lse);
      const bool done = !arch::sync_threads_or(left != 0);
      store_out_lse(b, acc_o, lse, ~left);
      if (done) return;
      arch::sync_threads();  // no warp reads out in Q's rows any more
      load_q(b);
      pass = Pass::kOnline;
    } else {
      if (pass == Pass::kExact || !arch::sync_threads_or(!tile::all_finite(acc_o))) break;
      pass = Pass::kExact;  // a value that is not finite was met: once more, with care
    }
  }
  tile::normalise(state, acc_o, lse);
  store_out_lse(b, acc_o, lse, p.unified ? arch::lds<uint32_t>(b.rows_left()) : ~0u);
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = attention_fwd::Params;
  static constexpr int smem_bytes = Traits<Cfg>::smem_bytes;

  static Status launch(const Params& p, Stream stream) {
    const auto blocks = static_cast<uint32_t>(p.num_m_blocks * p.num_heads_kv * p.batch_size);
    const uint32_t bytes = p.unified ? smem_bytes : Traits<Cfg>::tile_bytes;
    const LaunchConfig config{blocks, Traits<Cfg>::num_threads, bytes, smem_bytes};
    constexpr auto launch_ragged = arch::launch<attention_fwd_sm80<tile::Ragged<Cfg>>, Params>;
    constexpr auto launch_dense = arch::launch<attention_fwd_sm80<tile::Dense<Cfg>>, Params>;
    return (p.is_ragged() ? launch_ragged : launch_dense)(config, stream, p);
  }
};

}  // namespace flashinfer_lite::attention_fwd
