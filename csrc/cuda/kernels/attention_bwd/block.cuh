// What the kernels of the backward share: sizes, where things are, and P and dS from the scores.
#pragma once

#include <algorithm>

#include "common/params/attention_cuda.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/gemm_tiles.cuh"
#include "cuda/tile/scheduler.cuh"
#include "cuda/tile/scores.cuh"
#include "cuda/tile/sequence.cuh"

namespace flashinfer_lite::attention_bwd {

using Params = CudaAttentionBwdParams;

// What every kernel of a row agrees on; each has the rest of its own.
template <class Cfg>
struct Sizes {
  using Element = typename Cfg::Element;
  static constexpr int block_m = Cfg::block_m;  // packed rows
  static constexpr int head_dim = Cfg::head_dim;
  static_assert(block_m % 16 == 0, "fragments have 16 rows");
  using RowTile = tile::SmemTile<Element, block_m, head_dim>;  // of Q, dO or out
  static constexpr int stats_bytes = block_m * 8;
  // Kernels whose warps own 16 rows each.
  static constexpr int row_threads = block_m / 16 * 32;
};

// A (batch, KV head) and its rows.
template <class Cfg>
struct Head {
  template <class Sequence>
  __device__ __forceinline__ Head(const Params& params, const Sequence& s, int head_kv)
      : p(params),
        batch_q(s.batch_q),
        place(Cfg::ragged ? head_kv * params.padded_rows + int64_t{s.blocks_before} * Cfg::block_m
                          : int64_t{s.batch_q} * params.num_heads_kv + head_kv),
        rows{head_kv, params.group, s.rows} {}

  // The rows of a tensor from packed row `first` on.
  template <class Element, class Pointer>
  __device__ __forceinline__ tile::PackedRowView<Element> row_view(const Strided<Pointer>& x,
                                                                   int first) const {
    return {static_cast<Element*>(x.data) + batch_q * x.batch, x.seqlen, x.head, rows, first};
  }

  // Of packed row r in row_stats.
  __device__ __forceinline__ float* stats(int r) const {
    return p.row_stats + (padded_row() + r) * 2;
  }

  // Where 16 rows from r on begin in dQ's accumulator.
  __device__ __forceinline__ float* dq_accum(int r) const {
    return p.dq_accum + (padded_row() + r) * Cfg::head_dim;
  }

  const Params& p;
  int batch_q;    // as tile::Sequence has it
  int64_t place;  // padded_row(); but of a dense batch which of all (batch, KV head)
  tile::PackedRows rows;

 private:
  // Where packed row 0 is in row_stats and dq_accum.
  __device__ __forceinline__ int64_t padded_row() const {
    return Cfg::ragged ? place : place * p.padded_rows;
  }
};

// Keys or values of a head from slot `first` on. Slots outside of the sequence hold anything.
template <class Element>
struct SlotRows {
  Element* head;  // slot 0
  int64_t stride;
  int first;
  tile::KeySlots slots;

  __device__ __forceinline__ Element* row(int r) const {
    return head + int64_t{first + r} * stride;
  }
  static __device__ __forceinline__ bool evenly(int) { return true; }
  __device__ __forceinline__ Element* next(Element* at, int rows_on) const {
    return at + rows_on * stride;
  }
  __device__ __forceinline__ bool valid(int r) const {
    return first + r >= slots.begin && first + r < slots.end;
  }
};

// Of the keys of `batch_kv`, as tile::Sequence has it.
template <class Element, class Pointer>
__device__ __forceinline__ SlotRows<Element> slot_rows(const Strided<Pointer>& x, int batch_kv,
                                                       int head_kv, int first,
                                                       const tile::KeySlots& slots) {
  Element* head = static_cast<Element*>(x.data) + batch_kv * x.batch + head_kv * x.head;
  return {head, x.seqlen, first, slots};
}

// Q, dO and the statistics of a block of rows, as they lie in shared memory.
template <class Cfg>
struct RowBlock {
  using S = Sizes<Cfg>;
  using Tile = typename S::RowTile;
  static constexpr int bytes = 2 * Tile::bytes + S::stats_bytes;

  uint32_t base;

  __device__ __forceinline__ Tile q() const { return {base}; }
  __device__ __forceinline__ Tile dout() const { return {base + Tile::bytes}; }
  __device__ __forceinline__ uint32_t stats(int row) const {
    return base + static_cast<uint32_t>(2 * Tile::bytes + row * 8);
  }

  // Starts the copies; the caller commits and waits.
  template <int kThreads>
  __device__ __forceinline__ void load(const Head<Cfg>& h, int first_row) const {
    using Element = const typename Cfg::Element;
    const Params& p = h.p;
    const int thread = arch::thread_idx();
    tile::load_rows<kThreads>(q(), h.template row_view<Element>(p.q, first_row),
                              static_cast<int>(p.head_dim), p.vector_q, thread);
    tile::load_rows<kThreads>(dout(), h.template row_view<Element>(p.dout, first_row),
                              static_cast<int>(p.head_dim_v), p.vector_dout, thread);
    static_assert(S::block_m / 2 <= kThreads, "a thread copies two rows' statistics");
    if (thread >= S::block_m / 2) return;
    arch::cp_async_16(stats(2 * thread), h.stats(first_row + 2 * thread), 16);
  }

  // Once landed: a row that saw no key keeps nothing of its q and dO, which may be NaN (a loss that
  // divides by the zero output), or 0 * NaN would reach dK and dV.
  template <int kThreads>
  __device__ __forceinline__ void drop_rows_without_keys() const {
    const int thread = arch::thread_idx();
    bool found = false;
    for (int row = thread % 32; row < S::block_m; row += 32) found = found || saw_no_key(row);
    if (!arch::any(found)) return;  // the same for every warp
#pragma unroll 1
    for (int i = thread; i < S::block_m * Tile::chunks; i += kThreads) {
      const int row = i / Tile::chunks;
      if (!arch::predicate(saw_no_key(row))) continue;
      arch::sts(q().chunk(row, i % Tile::chunks), arch::U32x4{0, 0, 0, 0});
      arch::sts(dout().chunk(row, i % Tile::chunks), arch::U32x4{0, 0, 0, 0});
    }
    arch::sync_threads();  // zeros are there for all
  }

 private:
  __device__ __forceinline__ bool saw_no_key(int row) const {
    // Both, though one would do: neighbouring lanes read neighbouring words.
    return arch::lds<tile::Float2>(stats(row)).x == tile::kMinusInf;
  }
};

// A walk over blocks [first, last) through a ring of kStages places in shared memory:
// load(block, stage) starts copies, step(block, stage, load_rest) finds them landed for all. With
// two stages the copies of the block to come are started before the step by kEarlyThreads, and by
// the others where the step calls load_rest(): their addresses are computed beside the products of
// the former, which else all warps would wait to begin with.
template <int kStages, int kThreads, int kEarlyThreads, class Load, class Step>
__device__ __forceinline__ void walk(int first, int last, const Load& load, const Step& step) {
  static_assert(kStages == 1 || kStages == 2, "one place, or one to compute from and one to fill");
  const bool is_early = kEarlyThreads == kThreads || arch::thread_idx() < kEarlyThreads;
  int stage = 0;
  load(first, stage);
  arch::cp_async_commit();
#pragma unroll 1
  for (int block = first; block < last; ++block) {
    arch::cp_async_wait<0>();
    arch::sync_threads();  // the block has landed for all; no warp reads the one before any more
    const auto load_ahead = [&](bool mine) {
      if (kStages == 1 || !mine || block + 1 == last) return;
      load(block + 1, 1 - stage);
      arch::cp_async_commit();
    };
    load_ahead(is_early);
    step(block, stage, [&] { load_ahead(!is_early); });
    if (kStages == 2) stage = 1 - stage;
    if (kStages == 1 && block + 1 < last) {
      arch::sync_threads();  // no warp reads the block any more
      load(block + 1, stage);
      arch::cp_async_commit();
    }
  }
}

// Whether every one of the rows [first, last] sees every one of the keys.
__device__ __forceinline__ bool see_all(const Visibility& visible, int first_query, int last_query,
                                        int first_key, int keys) {
  return visible.row(last_query).begin <= first_key &&
         visible.row(first_query).end >= int64_t{first_key} + keys;
}

// The products s = q k^T and dp = dO v^T become P and dS = P (dp - delta), times the softcap's
// slope if that is wanted. `stats` is the shared address of the warp's first row's. Without kMasked
// every row sees every key, and the scores want no more than a scale.
template <bool kMasked, class Cfg, int kM, int kTiles>
__device__ __forceinline__ void score_gradients(float (&s)[kM][kTiles][4],
                                                float (&dp)[kM][kTiles][4], const Head<Cfg>& h,
                                                const tile::SlotsOf<Cfg>& slots,
                                                const tile::ScoreOrigin& at, uint32_t stats,
                                                bool wants_slope, int lane) {
  const Params& p = h.p;
  if (kMasked && p.scale_first) tile::scale_or_cap(s, p);
  // tanh of the capped score, which a bias would hide.
  const bool sloped = kMasked && wants_slope && p.softcap != 0;
  const float to_tanh = sloped ? 1.f / p.from_cap : 0.f;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto row = arch::lds<tile::Float2>(
          stats + static_cast<uint32_t>((m * 16 + half * 8 + lane / 4) * 8));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          dp[m][n][e] -= row.y;
          if (sloped) {
            const float tanh = s[m][n][e] * to_tanh;
            dp[m][n][e] *= fmaf(-tanh, tanh, 1.f);
          }
        }
      }
    }
  }
  if (kMasked) {
    if (p.scale_first) tile::add_biases(s, p, h.rows, slots, at, lane);
    tile::hide_scores(s, p, h.rows, slots, at, lane);
  }
  const float scale = p.scale_first ? 1.f : p.scale_log2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto lse =
          arch::lds<float>(stats + static_cast<uint32_t>((m * 16 + half * 8 + lane / 4) * 8));
      // Of a row without keys: every P is 0.
      const float base = lse == tile::kMinusInf ? -tile::kMinusInf : lse;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          // A hidden score is -inf, whatever the base. P <= 1: the rounding of a large lse must
          // not push it over.
          const float exponent = fmaf(s[m][n][e], scale, -base);
          const float prob = arch::exp2(exponent > 0.f ? 0.f : exponent);
          s[m][n][e] = prob;
          dp[m][n][e] *= prob;
        }
      }
    }
  }
}

}  // namespace flashinfer_lite::attention_bwd
