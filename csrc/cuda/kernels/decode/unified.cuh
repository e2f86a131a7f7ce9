// The end of decode's pass with a unified maximum (FlashDecoding++): what warps and splits have are
// sums, so that the split that arrives last adds them up in their order, and no second launch
// merges. The guard decides there, once for each row; rows that it leaves to the online softmax get
// it from the same block: every split's partial, and the merge that combine does.
#pragma once

#include <algorithm>

#include "cuda/kernels/decode/block.cuh"
#include "cuda/tile/merge.cuh"

namespace flashinfer_lite::decode_kernel {

// Each row's base is the phi of its head.
template <class Cfg>
__device__ __forceinline__ void stand_on_phi(const Block<Cfg>& b,
                                             typename Traits<Cfg>::State& state) {
  b.largest().reset();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = b.first_row + half * 8 + b.lane / 4;
    state.row_max[0][half] = tile::phi_log2(b.p, b.rows[r].head);
  }
}

// Sums of one row, of which a warp's lane has the columns col(i, lane) to col(i, lane) + 3.
template <class Cfg>
struct RowSums {
  static constexpr int parts = (Cfg::head_dim + 127) / 128;

  float row_max = tile::kMinusInf;
  float row_sum = 0.f;
  tile::Float4 x[parts] = {};

  static __device__ __forceinline__ int col(int i, int lane) { return i * 128 + lane * 4; }

  __device__ __forceinline__ void add(int i, const tile::Float4& y) {
    x[i] = {x[i].x + y.x, x[i].y + y.y, x[i].z + y.z, x[i].w + y.w};
  }

  // A part without keys for the row; its numerators may be NaN, out of hidden values.
  static __device__ __forceinline__ bool saw_nothing(float row_max, float row_sum) {
    return row_max == tile::kMinusInf && row_sum == 0.f;
  }

  // The largest magnitude() of the row's numerators, for all lanes.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      bits = std::max({bits, tile::magnitude(x[i].x), tile::magnitude(x[i].y),
                       tile::magnitude(x[i].z), tile::magnitude(x[i].w)});
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      bits = std::max(bits, arch::shfl_xor(bits, distance));
    }
    return bits;
  }
};

// Over the warps of the block.
template <class Cfg>
__device__ __forceinline__ RowSums<Cfg> sum_warps(const Block<Cfg>& b, int r) {
  using Sums = RowSums<Cfg>;
  const MergeStorage<Cfg> storage{b.ring()};
  Sums sums;
#pragma unroll
  for (int warp = 0; warp < Cfg::num_warps; ++warp) {
    const auto state = arch::lds<tile::Float2>(storage.state(warp, r));
    sums.row_max = fmaxf(sums.row_max, state.x);
    sums.row_sum += state.y;
    if (Sums::saw_nothing(state.x, state.y)) continue;
#pragma unroll
    for (int i = 0; i < Sums::parts; ++i) {
      const int col = Sums::col(i, b.lane);
      if (col < Cfg::head_dim)
        sums.add(i, arch::lds<tile::Float4>(storage.output(warp).at(r, col)));
    }
  }
  return sums;
}

// Over the splits, in their order.
template <class Cfg>
__device__ __forceinline__ RowSums<Cfg> sum_splits(const Block<Cfg>& b, tile::Row row) {
  using Sums = RowSums<Cfg>;
  const Params& p = b.p;
  const auto kv_splits = static_cast<int>(p.kv_splits);
  const auto head_dim_v = static_cast<int>(p.head_dim_v);
  Sums sums;
#pragma unroll 1
  for (int first = 0; first < kv_splits; first += 32) {
    // A lane reads the state of one split and hands it to all.
    float row_max = tile::kMinusInf;
    float row_sum = 0.f;
    if (first + b.lane < kv_splits) {
      const int64_t at = b.lse_index((first + b.lane) * p.batch_size + b.batch_idx, row);
      row_max = arch::ldg(static_cast<const float*>(p.row_max_partial) + at);
      row_sum = arch::ldg(static_cast<const float*>(p.lse_partial) + at);
    }
    sums.row_max = fmaxf(sums.row_max, row_max);
    const uint32_t seen = arch::ballot(!Sums::saw_nothing(row_max, row_sum));
    const int here = std::min(kv_splits - first, 32);
#pragma unroll 4
    for (int s = 0; s < here; ++s) {
      sums.row_sum += arch::shfl(row_sum, s);
      if ((seen >> s & 1u) == 0) continue;
      const float* x =
          static_cast<const float*>(p.out_partial) + b.partial_index(first + s, row) * p.head_dim_v;
#pragma unroll
      for (int i = 0; i < Sums::parts; ++i) {
        const int col = Sums::col(i, b.lane);
        if (!arch::predicate(col < head_dim_v)) continue;
        sums.add(i, arch::ldg(reinterpret_cast<const tile::Float4*>(x + col)));
      }
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.row_max = fmaxf(sums.row_max, arch::shfl_xor(sums.row_max, distance));
  }
  return sums;
}

// The sums of the split, to the partials.
template <class Cfg>
__device__ __forceinline__ void store_sums(const Block<Cfg>& b) {
  using Sums = RowSums<Cfg>;
#pragma unroll 1
  for (int r = b.warp; r < Cfg::block_m; r += Cfg::num_warps) {
    if (!arch::predicate(b.first_row + r < b.rows.rows)) continue;
    const tile::Row row = b.rows[b.first_row + r];
    const Sums sums = sum_warps(b, r);
    if (b.lane == 0) {
      const int64_t at = b.lse_index(b.split * b.p.batch_size + b.batch_idx, row);
      arch::stg(static_cast<float*>(b.p.row_max_partial) + at, sums.row_max);
      arch::stg(static_cast<float*>(b.p.lse_partial) + at, sums.row_sum);
    }
    if (Sums::saw_nothing(sums.row_max, sums.row_sum)) continue;
#pragma unroll
    for (int i = 0; i < Sums::parts; ++i) {
      const int col = Sums::col(i, b.lane);
      if (!arch::predicate(col < static_cast<int>(b.p.head_dim_v))) continue;
      store_partial(b, row, col, sums.x[i]);
    }
  }
}

// Whether every other split of the block's rows has written its partials; they may be read then.
template <class Cfg>
__device__ __forceinline__ bool arrives_last(const Block<Cfg>& b) {
  const Params& p = b.p;
  const auto last = static_cast<uint32_t>(p.kv_splits - 1);
  arch::sync_threads();  // the block's own are written
  if (arch::thread_idx() == 0) {
    const int64_t m_block = b.first_row / Cfg::block_m;
    const int64_t at = (b.batch_idx * p.num_m_blocks + m_block) * p.num_heads_kv + b.rows.head_kv;
    arch::fence_gpu();  // they are seen before the ticket is
    const uint32_t drawn = arch::ticket(p.tickets + at, last);
    arch::fence_gpu();  // what is read from here on is no older than the ticket
    arch::sts(b.ticket(), drawn);
  }
  arch::sync_threads();  // the ticket is there, and the others' partials with it
  return arch::lds<uint32_t>(b.ticket()) == last;
}

template <class Cfg>
__device__ __forceinline__ RowVerdict settle_row(const Block<Cfg>& b, tile::Row row,
                                                 const RowSums<Cfg>& sums) {
  using Sums = RowSums<Cfg>;
  const Params& p = b.p;
  const tile::UnifiedRow unified{sums.row_max, sums.row_sum, tile::phi_log2(p, row.head),
                                 sums.largest()};
  const RowVerdict verdict = unified.verdict<typename Cfg::Element>();
  if (verdict == RowVerdict::kViolated) return verdict;
  const bool empty = verdict == RowVerdict::kNoKey;
  const float inverse = empty ? 0.f : 1.f / sums.row_sum;
#pragma unroll
  for (int i = 0; i < Sums::parts; ++i) {
    const int col = Sums::col(i, b.lane);
    if (!arch::predicate(col < static_cast<int>(p.head_dim_v))) continue;
    const tile::Float4& x = sums.x[i];
    store_columns(b, row, col, {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse});
  }
  if (b.lane == 0) {
    arch::stg(static_cast<float*>(p.lse) + b.lse_index(b.batch_idx, row),
              empty ? tile::kMinusInf : unified.lse());
  }
  return verdict;
}

// After a unified pass, when every warp's state is there: a warp takes a row at a time. True if the
// block has rows left for the online softmax; no warp reads the states any more then.
template <class Cfg>
__device__ __forceinline__ bool settle(const Block<Cfg>& b) {
  if (b.p.kv_splits > 1) {
    store_sums(b);
    if (!arrives_last(b)) return false;
  }
  uint32_t checked = 0;
  uint32_t left = 0;
#pragma unroll 1
  for (int r = b.warp; r < Cfg::block_m; r += Cfg::num_warps) {
    RowVerdict verdict = RowVerdict::kNoKey;
    if (arch::predicate(b.first_row + r < b.rows.rows)) {
      const tile::Row row = b.rows[b.first_row + r];
      verdict = settle_row(b, row, b.p.kv_splits > 1 ? sum_splits(b, row) : sum_warps(b, r));
    }
    const bool violated = verdict == RowVerdict::kViolated;
    checked += verdict != RowVerdict::kNoKey;
    left += violated;
    if (b.lane == 0) arch::sts(b.row_left(r), static_cast<uint32_t>(violated));
  }
  if (b.lane == 0) tile::count_rows(b.p.row_counters, checked, left);
  return arch::sync_threads_or(left != 0);
}

// The rows left, from the partials of all splits: what combine would do in a launch of its own.
template <class Cfg>
__device__ __forceinline__ void merge_left(const Block<Cfg>& b) {
  using Element = typename Cfg::Element;
  const Params& p = b.p;
  const int64_t rows = p.batch_size * p.seqlen_q * p.num_heads_q;
#pragma unroll 1
  for (int r = b.warp; r < Cfg::block_m; r += Cfg::num_warps) {
    if (arch::lds<uint32_t>(b.row_left(r)) == 0) continue;
    const tile::Row row = b.rows[b.first_row + r];
    const tile::RowStates<float> states{
        static_cast<const float*>(p.out_partial) + b.partial_index(0, row) * p.head_dim_v,
        static_cast<const float*>(p.lse_partial) + b.lse_index(b.batch_idx, row),
        rows * p.head_dim_v, rows, p.kv_splits};
    Element* out = static_cast<Element*>(p.out.data) + b.batch_idx * p.out.batch +
                   row.query * p.out.seqlen + row.head * p.out.head;
    const float lse = tile::merge_row(states, out, p.head_dim_v, b.lane);
    if (b.lane == 0) {
      arch::stg(static_cast<float*>(p.lse) + b.lse_index(b.batch_idx, row), lse);
    }
  }
}

}  // namespace flashinfer_lite::decode_kernel
