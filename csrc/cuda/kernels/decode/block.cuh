// What a thread block of decode works on, and where it puts its results.
#pragma once

#include <algorithm>

#include "common/params/attention_cuda.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/scores.cuh"
#include "cuda/tile/softmax.cuh"
#include "cuda/tile/unified.cuh"

namespace flashinfer_lite::decode_kernel {

using Params = CudaAttentionParams;

template <class Cfg>
struct Traits {
  using Element = typename Cfg::Element;
  static constexpr int num_threads = Cfg::num_warps * 32;
  static_assert(Cfg::block_m == 16, "one fragment of rows; more rows are more thread blocks");
  static_assert(Cfg::block_n % 16 == 0, "a k step of P V is 16 keys");

  using QTile = tile::SmemTile<Element, Cfg::block_m, Cfg::head_dim>;
  using KTile = tile::SmemTile<Element, Cfg::block_n, Cfg::head_dim>;
  using VTile = KTile;
  using Scores = tile::Accumulator<1, Cfg::block_n>;
  using Output = tile::Accumulator<1, Cfg::head_dim>;
  using State = tile::SoftmaxState<1>;

  static constexpr int stage_bytes = KTile::bytes + VTile::bytes;
  static constexpr int ring_bytes = stage_bytes * Cfg::num_stages * Cfg::num_warps;

  // The merge's view of the ring: each warp's accumulator, then each warp's row_max and row_sum.
  using OutputTile = tile::SmemAccumulator<Cfg::block_m, Cfg::head_dim>;
  static constexpr int merge_bytes = Cfg::num_warps * (OutputTile::bytes + Cfg::block_m * 8);
  static constexpr int online_bytes = QTile::bytes + std::max(ring_bytes, merge_bytes);
  // Unified besides: each lane's largest scores, a word for each row, the ticket.
  using Largest = tile::LargestScores<1, num_threads>;
  static constexpr int smem_bytes = online_bytes + Largest::bytes + (Cfg::block_m + 1) * 4;
  // As many as 227 KB hold: three of four warps have 168 registers a thread, up to eight warps 255.
  static constexpr int blocks_per_sm = Cfg::num_warps == 4 ? 3 : std::max(8 / Cfg::num_warps, 1);
};

// What a thread block works on, the same for all of its threads.
template <class Cfg>
struct Block {
  using T = Traits<Cfg>;
  using Element = typename T::Element;

  __device__ __forceinline__ Block(const Params& params, uint32_t block)
      : p(params),
        // From lane 0, so that the compiler sees one value for the warp and its loops converge.
        warp(arch::shfl(arch::thread_idx() / 32, 0)),
        lane(arch::thread_idx() % 32) {
    // KV heads first: in the cache's usual layout their keys lie side by side.
    const auto num_heads_kv = static_cast<uint32_t>(p.num_heads_kv);
    const auto num_m_blocks = static_cast<uint32_t>(p.num_m_blocks);
    const auto kv_splits = static_cast<uint32_t>(p.kv_splits);
    const auto head_kv = static_cast<int>(block % num_heads_kv);
    block /= num_heads_kv;
    first_row = static_cast<int>(block % num_m_blocks) * Cfg::block_m;
    block /= num_m_blocks;
    split = static_cast<int>(block % kv_splits);
    batch_idx = static_cast<int>(block / kv_splits);

    rows = {head_kv, p.group, p.rows};
    const int page = p.device_block_table.data == nullptr ? batch_idx : 0;
    k_head = static_cast<const Element*>(p.k.data) + page * p.k.batch + head_kv * p.k.head;
    v_head = static_cast<const Element*>(p.v.data) + page * p.v.batch + head_kv * p.v.head;
    scale = p.scale_first ? 1.f : p.scale_log2;
  }

  __device__ __forceinline__ typename T::QTile q() const { return {arch::dynamic_smem()}; }
  __device__ __forceinline__ uint32_t ring() const { return q().base + T::QTile::bytes; }
  __device__ __forceinline__ typename T::KTile k(int stage) const {
    return {ring() + static_cast<uint32_t>((warp * Cfg::num_stages + stage) * T::stage_bytes)};
  }
  __device__ __forceinline__ typename T::VTile v(int stage) const {
    return {k(stage).base + T::KTile::bytes};
  }
  __device__ __forceinline__ typename T::Largest largest() const {
    return {q().base + static_cast<uint32_t>(T::online_bytes)};
  }
  // The same block, of which the compiler knows nothing: what follows from it is not kept in
  // registers through the loop over the keys.
  __device__ __forceinline__ Block opaque() const {
    Block copy = *this;
    copy.lane = arch::opaque(lane);
    copy.first_row = arch::opaque(first_row);
    copy.batch_idx = arch::opaque(batch_idx);
    copy.rows.head_kv = arch::opaque(rows.head_kv);
    return copy;
  }

  // Whether the row is left to the online softmax.
  __device__ __forceinline__ uint32_t row_left(int row) const {
    return q().base + static_cast<uint32_t>(T::online_bytes + T::Largest::bytes + row * 4);
  }
  __device__ __forceinline__ uint32_t ticket() const { return row_left(Cfg::block_m); }

  // Where a row is in out_partial, in rows, and in lse_partial.
  __device__ __forceinline__ int64_t partial_index(int of_split, tile::Row row) const {
    return ((of_split * p.batch_size + batch_idx) * p.seqlen_q + row.query) * p.num_heads_q +
           row.head;
  }
  __device__ __forceinline__ int64_t lse_index(int64_t of_batch, tile::Row row) const {
    return (of_batch * p.num_heads_q + row.head) * p.seqlen_q + row.query;
  }

  const Params& p;
  int warp, lane;
  int batch_idx, split;
  int first_row;  // of the block, among the rows of its KV head
  tile::PackedRows rows;
  tile::KeySlots slots;
  const Element* k_head;  // of the sequence, or of a paged cache's first page
  const Element* v_head;
  float scale;  // of S to log2, applied by the exponential
};

// The keys of a thread block: `count` blocks of block_n from slot `first`, none from `end` on.
// Blocks within [every_begin, every_end) hold only keys that every row sees.
struct SplitKeys {
  int first;
  int end;
  int count;
  int every_begin;
  int every_end;
};

// An equal part of what the rows see, or keys_per_split from the sequence's first slot, so that
// only the sequence itself decides where it is cut.
template <class Cfg>
__device__ __forceinline__ SplitKeys split_keys(const Block<Cfg>& b) {
  constexpr int block_n = Cfg::block_n;
  const int last_row = std::min(b.first_row + Cfg::block_m, b.rows.rows) - 1;
  const int first_query = b.rows[b.first_row].query;
  const int last_query = b.rows[last_row].query;
  const Visibility visible = b.slots.visibility(b.p);
  const KeyRange some = visible.rows(first_query, last_query);
  // Slots number less than 2^30: from here on 32 bits do, whose divisions are short.
  const auto seen_begin = static_cast<int>(some.begin);
  const auto seen_end = static_cast<int>(some.end);
  const auto kv_splits = static_cast<int>(b.p.kv_splits);
  const int first_seen = (seen_begin - b.slots.begin) / block_n * block_n + b.slots.begin;
  int first = b.slots.begin;
  auto keys = static_cast<int>(b.p.keys_per_split);
  if (keys == 0) {
    const int part = (seen_end - first_seen + kv_splits - 1) / kv_splits;
    keys = (part + block_n - 1) / block_n * block_n;
    first = first_seen;
  }
  first += b.split * keys;
  const int end = std::min(seen_end, first + keys);
  first = std::max(first, first_seen);
  const int count = some.empty() ? 0 : std::max((end - first + block_n - 1) / block_n, 0);
  return {first, end, count, static_cast<int>(visible.row(last_query).begin),
          static_cast<int>(visible.row(first_query).end)};
}

// Where the warps leave their states for the merge.
template <class Cfg>
struct MergeStorage {
  using OutputTile = typename Traits<Cfg>::OutputTile;

  uint32_t base;

  __device__ __forceinline__ OutputTile output(int warp) const {
    return {base + static_cast<uint32_t>(warp * OutputTile::bytes)};
  }
  // row_max, with row_sum in the 4 bytes after it
  __device__ __forceinline__ uint32_t state(int warp, int row) const {
    constexpr int offset = Cfg::num_warps * OutputTile::bytes;
    return base + static_cast<uint32_t>(offset + (warp * Cfg::block_m + row) * 8);
  }
};

// Four columns of one row, to out.
template <class Cfg>
__device__ __forceinline__ void store_columns(const Block<Cfg>& b, tile::Row row, int col,
                                              const tile::Float4& x) {
  using Element = typename Cfg::Element;
  const Params& p = b.p;
  Element* out = static_cast<Element*>(p.out.data) + b.batch_idx * p.out.batch +
                 row.query * p.out.seqlen + row.head * p.out.head + col;
  if constexpr (sizeof(Element) == 4) {
    if (p.vector_out) return arch::stg(reinterpret_cast<tile::Float4*>(out), x);
  } else if (p.vector_out) {
    const U32x2 packed{arch::pack<Element>(x.x, x.y), arch::pack<Element>(x.z, x.w)};
    return arch::stg(reinterpret_cast<U32x2*>(out), packed);
  }
  const float value[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) arch::stg(out + i, arch::from_float<Element>(value[i]));
}

// The same, to the split's partial.
template <class Cfg>
__device__ __forceinline__ void store_partial(const Block<Cfg>& b, tile::Row row, int col,
                                              const tile::Float4& x) {
  float* out = static_cast<float*>(b.p.out_partial);
  const int64_t at = b.partial_index(b.split, row) * b.p.head_dim_v + col;
  arch::stg(reinterpret_cast<tile::Float4*>(out + at), x);
}

}  // namespace flashinfer_lite::decode_kernel
