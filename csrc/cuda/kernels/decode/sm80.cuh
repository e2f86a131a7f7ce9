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
// With a unified maximum (FlashDecoding++) the warps' states and the splits' partials are sums: the
// split that arrives last adds them up, in the same launch: unified.cuh.
//
// Shared memory: Q | per warp, per stage: K, V | unified besides: block.cuh. The merge reuses the
// stages.
#pragma once

#include "cuda/kernels/decode/block.cuh"
#include "cuda/kernels/decode/unified.cuh"
#include "cuda/tile/exact.cuh"

namespace flashinfer_lite::decode_kernel {

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

// Where the rows of a key block are, `own` that of the lane's number, and whether they are slots in
// a row from `first` on.
struct BlockSlots {
  tile::PageSlot first;
  tile::PageSlot own;
  bool in_a_row;
};

template <class Cfg>
__device__ __forceinline__ BlockSlots find_slots(const Block<Cfg>& b, int first, int end) {
  static_assert(Cfg::block_n <= 32, "a lane for each row");
  const Params& p = b.p;
  if (p.device_block_table.data == nullptr) return {{0, first}, {}, true};
  const int slot = std::min(first + b.lane, end - 1);  // no page is there for what is not
  const tile::PageSlot own =
      tile::find_slot(p.block_table, p.device_block_table, b.batch_idx, slot);
  const tile::PageSlot of_first{arch::shfl(own.page, 0), arch::shfl(own.slot, 0)};
  return {of_first, own, of_first.slot + Cfg::block_n <= static_cast<int>(p.block_table.page_size)};
}

// Starts the copy of `count` rows of K or V, or of as many as the tile has, into a tile of the
// warp.
template <class Cfg, class Tile>
__device__ __forceinline__ void load_slots(const Block<Cfg>& b, const Tile& tile,
                                           const Strided<const void*>& x,
                                           const typename Cfg::Element* head,
                                           const BlockSlots& slots, int count, int cols,
                                           bool vector) {
  using Element = typename Cfg::Element;
  if (slots.in_a_row) {
    const Element* page = head + int64_t{slots.first.page} * x.batch;
    const int first = slots.first.slot;
    const tile::KvRows<Element> rows{page, x.seqlen, first, first + count};
    tile::load_rows<32>(tile, rows, cols, vector, b.lane);
  } else {
    const tile::PagedRows<Element> rows{head, x.batch, x.seqlen, slots.own, count};
    tile::load_rows<32>(tile, rows, cols, vector, b.lane);
  }
}

// Starts the copy of key block n into a stage of the warp; beyond the last block an empty group, so
// that groups and blocks stay in step.
template <class Cfg>
__device__ __forceinline__ void load_stage(const Block<Cfg>& b, const SplitKeys& keys, int n,
                                           int stage) {
  if (n < keys.count) {
    const Params& p = b.p;
    const int first = keys.first + n * Cfg::block_n;
    const int count = keys.end - first;
    const BlockSlots slots = find_slots(b, first, keys.end);
    load_slots(b, b.k(stage), p.k, b.k_head, slots, count, static_cast<int>(p.head_dim),
               p.vector_k);
    load_slots(b, b.v(stage), p.v, b.v_head, slots, count, static_cast<int>(p.head_dim_v),
               p.vector_v);
  }
  arch::cp_async_commit();
}

// What a pass over the keys stands on. kExact is kOnline that minds values that are not finite.
enum class Pass : uint8_t { kUnified, kOnline, kExact };

// One key block of the warp, which has landed in `stage`.
template <class Cfg>
__device__ __forceinline__ void step(const Block<Cfg>& b, const SplitKeys& keys, int n, int stage,
                                     Pass pass, typename Traits<Cfg>::State& state,
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
  if (pass == Pass::kUnified) {
    b.largest().raise(acc_s);
  } else {
    tile::raise_base(acc_s, b.scale, state, acc_o);
  }
  tile::exponentials<true>(acc_s, b.scale, state);
  if (pass == Pass::kExact) {
    tile::add_visible_non_finite(acc_s, b.v(stage), acc_o, b.lane);
    arch::sync_warp();  // every lane has seen V as it was
    tile::zero_non_finite<32>(b.v(stage), b.lane);
    arch::sync_warp();  // and now sees it finite
  }
  tile::pv_gemm(acc_s, b.v(stage), acc_o, b.lane);
}

// The warp's key blocks: warp, warp + num_warps, and so on.
template <class Cfg>
__device__ __forceinline__ void attend(const Block<Cfg>& b, const SplitKeys& keys, Pass pass,
                                       typename Traits<Cfg>::State& state,
                                       typename Traits<Cfg>::Output& acc_o) {
  state.reset();
  if (pass == Pass::kUnified) stand_on_phi(b, state);
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
    step(b, keys, n, stage, pass, state, acc_o);
    arch::sync_warp();  // no lane reads the stage any more
    load_stage(b, keys, n + Cfg::num_stages * Cfg::num_warps, stage);
    stage = stage + 1 == Cfg::num_stages ? 0 : stage + 1;
  }
}

template <class Cfg>
__device__ __forceinline__ void store_state(const Block<Cfg>& b, Pass pass,
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
    float row_max = state.row_max[0][half];
    if (pass == Pass::kUnified) row_max = b.largest().row_max(0, half, b.scale);
    if (b.lane % 4 == 0) arch::sts(storage.state(b.warp, row), tile::Float2{row_max, row_sum});
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

// Merges the warps' states, a thread for four columns of a row at a time.
template <class Cfg>
__device__ __forceinline__ void store_out_lse(const Block<Cfg>& b, bool empty) {
  const Params& p = b.p;
  const MergeStorage<Cfg> storage{b.ring()};
  constexpr int kColumns = Cfg::head_dim / 4;
#pragma unroll 1
  for (int i = arch::opaque(arch::thread_idx()); i < Cfg::block_m * kColumns;
       i += Traits<Cfg>::num_threads) {
    const int r = i / kColumns;
    const int col = i % kColumns * 4;
    const bool inside =
        arch::predicate(b.first_row + r < b.rows.rows && col < static_cast<int>(p.head_dim_v));
    if (!inside) continue;
    if (p.unified && arch::lds<uint32_t>(b.row_left(r)) == 0) continue;
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
      if (p.kv_splits > 1) {
        store_partial(b, row, col, sum);
      } else {
        store_columns(b, row, col, sum);
      }
    }
    if (col == 0) {
      float* lse = static_cast<float*>(p.kv_splits > 1 ? p.lse_partial : p.lse);
      const int64_t batch = p.kv_splits > 1 ? b.split * p.batch_size + b.batch_idx : b.batch_idx;
      arch::stg(lse + b.lse_index(batch, row), merged.lse);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Traits<Cfg>::num_threads, Traits<Cfg>::blocks_per_sm)
    decode_sm80(const __grid_constant__ Params p) {
  Block<Cfg> b(p, static_cast<uint32_t>(arch::block_idx()));
  load_q(b);  // on its way while the lengths are
  b.slots = tile::read_key_slots(p, b.batch_idx, p.seqlen_kv);
  SplitKeys keys = split_keys(b);

  typename Traits<Cfg>::State state;
  typename Traits<Cfg>::Output acc_o;
  Pass pass = p.unified ? Pass::kUnified : Pass::kOnline;
#pragma unroll 1
  for (;;) {
    attend(b, keys, pass, state, acc_o);
    // This is also where no warp reads its stages any more.
    if (arch::sync_threads_or(pass == Pass::kOnline && !tile::all_finite(acc_o))) {
      pass = Pass::kExact;  // a value that is not finite was met: once more, with care
      continue;
    }
    const Block<Cfg> end = b.opaque();
    store_state(end, pass, state, acc_o);
    arch::sync_threads();  // every warp's state is there
    if (pass == Pass::kUnified) {
      if (!settle(end)) return;
      b.split = 0;  // rows are left: the online softmax, one split after another
    } else {
      store_out_lse(end, keys.count == 0);
      if (!p.unified) return;
      arch::sync_threads();  // no warp reads the states any more, and the partials are written
      if (++b.split == static_cast<int>(p.kv_splits)) break;
    }
    pass = Pass::kOnline;
    keys = split_keys(b);
  }
  if (p.kv_splits > 1) merge_left(b);
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = decode_kernel::Params;
  static constexpr int smem_bytes = Traits<Cfg>::smem_bytes;

  static Status launch(const Params& p, Stream stream) {
    const int64_t blocks = p.num_m_blocks * p.num_heads_kv * p.batch_size * p.kv_splits;
    const int bytes = p.unified ? smem_bytes : Traits<Cfg>::online_bytes;
    const LaunchConfig config{static_cast<uint32_t>(blocks), Traits<Cfg>::num_threads,
                              static_cast<uint32_t>(bytes), smem_bytes};
    return arch::launch<decode_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::decode_kernel
