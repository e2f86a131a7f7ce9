// Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023): few queries over a long KV cache, compute
// capability 8.0 and up. Bound by memory: 16 rows read each byte of the cache once.
//
//   out = softmax(softmax_scale q k^T + masks) v      lse = log sum exp of the row's scores
//
//   q [batch, seqlen_q, num_heads_q, head_dim]
//   k, v [batch, capacity, num_heads_kv, head_dim or head_dim_v]
//   out_partial [kv_splits, batch, seqlen_q, num_heads_q, head_dim_v] and lse_partial, float32
//
// A thread block owns 16 rows (the queries of a group, packed) of one (batch, KV head) and one
// split of its keys. The warps share Q and nothing else: each streams its own key blocks through a
// ring of num_stages buffers, so that no barrier of the block stands between a byte's arrival and
// its use, and several blocks of each warp are under way at any time:
//
//   wait for stage n | S = Q K^T | mask, online softmax | O += P V | refill the stage
//
// At the end the warps' states are merged in shared memory, in the order of the warps, into out and
// lse, or into the split's partials, which the combine kernel merges. An empty split writes
// lse_partial = -inf and leaves out_partial alone.
//
// Shared memory: Q | per warp, per stage: K, V. The merge reuses the stages.
#pragma once

#include <algorithm>

#include "common/params/attention_cuda.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/exact.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/scores.cuh"
#include "cuda/tile/softmax.cuh"

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
  static constexpr int smem_bytes = QTile::bytes + std::max(ring_bytes, merge_bytes);
  // Eight warps on a multiprocessor have 255 registers a thread.
  static constexpr int blocks_per_sm = std::max(8 / Cfg::num_warps, 1);
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
    k_head = static_cast<const Element*>(p.k.data) + batch_idx * p.k.batch + head_kv * p.k.head;
    v_head = static_cast<const Element*>(p.v.data) + batch_idx * p.v.batch + head_kv * p.v.head;
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

  const Params& p;
  int warp, lane;
  int batch_idx, split;
  int first_row;  // of the block, among the rows of its KV head
  tile::PackedRows rows;
  tile::KeySlots slots;
  const Element* k_head;
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

template <class Cfg>
__device__ __forceinline__ void load_q(const Block<Cfg>& b) {
  using Element = typename Cfg::Element;
  const Element* sequence = static_cast<const Element*>(b.p.q.data) + b.batch_idx * b.p.q.batch;
  const tile::PackedRowView<const Element> source{sequence, b.p.q.seqlen, b.p.q.head, b.rows,
                                                  b.first_row};
  tile::load_rows<Traits<Cfg>::num_threads>(b.q(), source, static_cast<int>(b.p.head_dim),
                                            b.p.vector_q, arch::thread_idx());
  arch::cp_async_commit();
}

// Starts the copy of key block n into a stage of the warp; beyond the last block an empty group, so
// that groups and blocks stay in step.
template <class Cfg>
__device__ __forceinline__ void load_stage(const Block<Cfg>& b, const SplitKeys& keys, int n,
                                           int stage) {
  using Element = typename Cfg::Element;
  if (n < keys.count) {
    const int first = keys.first + n * Cfg::block_n;
    const tile::KvRows<Element> k{b.k_head, b.p.k.seqlen, first, keys.end};
    const tile::KvRows<Element> v{b.v_head, b.p.v.seqlen, first, keys.end};
    tile::load_rows<32>(b.k(stage), k, static_cast<int>(b.p.head_dim), b.p.vector_k, b.lane);
    tile::load_rows<32>(b.v(stage), v, static_cast<int>(b.p.head_dim_v), b.p.vector_v, b.lane);
  }
  arch::cp_async_commit();
}

// One key block of the warp, which has landed in `stage`. `exact` minds values that are not finite.
template <class Cfg>
__device__ __forceinline__ void step(const Block<Cfg>& b, const SplitKeys& keys, int n, int stage,
                                     bool exact, typename Traits<Cfg>::State& state,
                                     typename Traits<Cfg>::Output& acc_o) {
  typename Traits<Cfg>::Scores acc_s;
  tile::clear(acc_s);
  tile::qk_gemm(b.q(), 0, b.k(stage), acc_s, b.lane);

  const int key = keys.first + n * Cfg::block_n;
  const tile::ScoreOrigin at{b.batch_idx, b.first_row, key};
  if (b.p.scale_first) tile::scale_scores(acc_s, b.p, b.rows, b.slots, at, b.lane);
  if (key < keys.every_begin || key + Cfg::block_n > keys.every_end) {
    tile::hide_scores(acc_s, b.p, b.rows, b.slots, at, b.lane);
  }
  tile::softmax_step<true>(acc_s, b.scale, state, acc_o);
  if (exact) {
    tile::add_visible_non_finite(acc_s, b.v(stage), acc_o, b.lane);
    arch::sync_warp();  // every lane has seen V as it was
    tile::zero_non_finite<32>(b.v(stage), b.lane);
    arch::sync_warp();  // and now sees it finite
  }
  tile::pv_gemm(acc_s, b.v(stage), acc_o, b.lane);
}

// The warp's key blocks: warp, warp + num_warps, and so on.
template <class Cfg>
__device__ __forceinline__ void attend(const Block<Cfg>& b, const SplitKeys& keys, bool exact,
                                       typename Traits<Cfg>::State& state,
                                       typename Traits<Cfg>::Output& acc_o) {
  state.reset();
  tile::clear(acc_o);
#pragma unroll 1
  for (int stage = 0; stage < Cfg::num_stages; ++stage) {
    load_stage(b, keys, b.warp + stage * Cfg::num_warps, stage);
  }
  arch::cp_async_wait<Cfg::num_stages>();
  arch::sync_threads();  // Q, older than the stages, has landed for all
  int stage = 0;
#pragma unroll 1
  for (int n = b.warp; n < keys.count; n += Cfg::num_warps) {
    arch::cp_async_wait<Cfg::num_stages - 1>();
    arch::sync_warp();  // the other lanes' part of the block has landed too
    step(b, keys, n, stage, exact, state, acc_o);
    arch::sync_warp();  // no lane reads the stage any more
    load_stage(b, keys, n + Cfg::num_stages * Cfg::num_warps, stage);
    stage = stage + 1 == Cfg::num_stages ? 0 : stage + 1;
  }
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

template <class Cfg>
__device__ __forceinline__ void store_state(const Block<Cfg>& b,
                                            const typename Traits<Cfg>::State& state,
                                            const typename Traits<Cfg>::Output& acc_o) {
  const MergeStorage<Cfg> storage{b.ring()};
  const auto output = storage.output(b.warp);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + b.lane / 4;
#pragma unroll
    for (int n = 0; n < Cfg::head_dim / 8; ++n) {
      const tile::Float2 pair{acc_o[0][n][2 * half], acc_o[0][n][2 * half + 1]};
      arch::sts(output.at(row, n * 8 + b.lane % 4 * 2), pair);
    }
    const float row_sum = tile::quad_sum(state.row_sum[0][half]);
    if (b.lane % 4 == 0) {
      arch::sts(storage.state(b.warp, row), tile::Float2{state.row_max[0][half], row_sum});
    }
  }
}

// The state of a row over all warps: 1 / row_sum, the lse, and each warp's weight.
template <class Cfg>
struct MergedRow {
  float inverse;
  float lse;
  float weight[Cfg::num_warps];
};

template <class Cfg>
__device__ __forceinline__ MergedRow<Cfg> merge_row(const MergeStorage<Cfg>& storage, int row) {
  MergedRow<Cfg> merged;
  tile::Float2 state[Cfg::num_warps];
  float row_max = tile::kMinusInf;
#pragma unroll
  for (int warp = 0; warp < Cfg::num_warps; ++warp) {
    state[warp] = arch::lds<tile::Float2>(storage.state(warp, row));
    row_max = fmaxf(row_max, state[warp].x);
  }
  float row_sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < Cfg::num_warps; ++warp) {
    const bool empty = state[warp].x == tile::kMinusInf;
    merged.weight[warp] = empty ? 0.f : arch::exp2(state[warp].x - row_max);
    row_sum += merged.weight[warp] * state[warp].y;
  }
  merged.inverse = row_sum == 0.f ? 0.f : 1.f / row_sum;
  merged.lse = row_sum == 0.f ? tile::kMinusInf : (row_max + arch::log2(row_sum)) * tile::kLn2;
  return merged;
}

// Four columns of one row, to out or to the split's partial.
template <class Cfg>
__device__ __forceinline__ void store_columns(const Block<Cfg>& b, tile::Row row, int col,
                                              const tile::Float4& x) {
  using Element = typename Cfg::Element;
  const Params& p = b.p;
  if (p.kv_splits > 1) {
    const int64_t at =
        ((b.split * p.batch_size + b.batch_idx) * p.seqlen_q + row.query) * p.num_heads_q +
        row.head;
    arch::stg(reinterpret_cast<tile::Float4*>(static_cast<float*>(p.out_partial) +
                                              at * p.head_dim_v + col),
              x);
    return;
  }
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

// Merges the warps' states, a thread for four columns of a row at a time.
template <class Cfg>
__device__ __forceinline__ void store_out_lse(const Block<Cfg>& b, bool empty) {
  const Params& p = b.p;
  const MergeStorage<Cfg> storage{b.ring()};
  constexpr int kColumns = Cfg::head_dim / 4;
#pragma unroll 1
  for (int i = arch::thread_idx(); i < Cfg::block_m * kColumns; i += Traits<Cfg>::num_threads) {
    const int r = i / kColumns;
    const int col = i % kColumns * 4;
    const bool inside =
        arch::predicate(b.first_row + r < b.rows.rows && col < static_cast<int>(p.head_dim_v));
    if (!inside) continue;
    const tile::Row row = b.rows[b.first_row + r];
    const MergedRow<Cfg> merged = merge_row(storage, r);
    if (p.kv_splits == 1 || !empty) {
      tile::Float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int warp = 0; warp < Cfg::num_warps; ++warp) {
        const auto x = arch::lds<tile::Float4>(storage.output(warp).at(r, col));
        const float weight = merged.weight[warp] * merged.inverse;
        sum = {fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z),
               fmaf(weight, x.w, sum.w)};
      }
      store_columns(b, row, col, sum);
    }
    if (col == 0) {
      float* lse = static_cast<float*>(p.kv_splits > 1 ? p.lse_partial : p.lse);
      const int64_t batch = p.kv_splits > 1 ? b.split * p.batch_size + b.batch_idx : b.batch_idx;
      arch::stg(lse + (batch * p.num_heads_q + row.head) * p.seqlen_q + row.query, merged.lse);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Traits<Cfg>::num_threads, Traits<Cfg>::blocks_per_sm)
    decode_sm80(const __grid_constant__ Params p) {
  Block<Cfg> b(p, static_cast<uint32_t>(arch::block_idx()));
  load_q(b);  // on its way while the lengths are
  b.slots = tile::read_key_slots(p, b.batch_idx);
  const SplitKeys keys = split_keys(b);

  typename Traits<Cfg>::State state;
  typename Traits<Cfg>::Output acc_o;
  bool exact = false;
#pragma unroll 1
  for (;;) {
    attend(b, keys, exact, state, acc_o);
    // This is also where no warp reads its stages any more.
    if (!arch::sync_threads_or(!exact && !tile::all_finite(acc_o))) break;
    exact = true;  // a value that is not finite was met: once more, with care
  }
  store_state(b, state, acc_o);
  arch::sync_threads();  // every warp's state is there
  store_out_lse(b, keys.count == 0);
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = decode_kernel::Params;
  static constexpr int smem_bytes = Traits<Cfg>::smem_bytes;

  static Status launch(const Params& p, Stream stream) {
    const int64_t blocks = p.num_m_blocks * p.num_heads_kv * p.batch_size * p.kv_splits;
    const LaunchConfig config{static_cast<uint32_t>(blocks), Traits<Cfg>::num_threads, smem_bytes};
    return arch::launch<decode_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::decode_kernel
