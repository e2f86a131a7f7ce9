// Tile and split choices as pure functions of the problem.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashinfer_lite {

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Tile {
  int64_t block_m;  // rows: queries times the heads of a group
  int64_t block_n;  // keys per step
};

constexpr int64_t kMaxHeads = 64;  // that may walk together: the kernel has a bit for each

struct CpuForwardPlan {
  Tile tile;
  bool pack;               // copy each tile of K and V into the products' layout, or read in place
  int64_t heads_together;  // KV heads that a task may walk along the keys with: speed, never bits
};

// What the forward's choices depend on: one sequence's shape and the layout of K, and for what is
// speed and never bits, how many threads share how many of them.
struct CpuForwardProblem {
  int64_t batch_size, threads;
  int64_t rows;  // per KV head: queries times the heads of a group
  int64_t num_heads_kv;
  int64_t head_dim;
  int64_t head_dim_v;
  int64_t element_size;
  bool heads_side_by_side;  // in K and in V: a key's heads are one run, one head's keys lie apart
  int64_t least_tile_rows;  // that a matrix unit takes; 0: the level has none
};

constexpr int64_t kMatrixRows = 32;         // rows that a matrix unit's kernel takes at a time
constexpr int64_t kMatrixKeys = 512;        // and keys
constexpr int64_t kMatrixKeysInPlace = 64;  // keys at a time of few rows, as the next are fetched

// Rows that a matrix unit's kernel takes without packing K: at most the columns of one of its
// registers. Fewer than `least` would leave too much of it idle.
constexpr bool runs_on_tiles_in_place(int64_t rows, int64_t least) {
  return least > 0 && rows >= least && rows <= 16;
}

inline CpuForwardPlan cpu_forward_plan(const CpuForwardProblem& p) {
  const bool tiles_in_place = runs_on_tiles_in_place(p.rows, p.least_tile_rows);
  // Below 12 rows a packed tile is not read often enough to pay for packing.
  const bool pack = p.rows >= 12 && !tiles_in_place;
  if (pack && p.least_tile_rows > 0) {
    // Products are over so soon that packing wants many rows to pay for it, in row blocks of one
    // size for the threads' sake. K and V pass once for every 32 rows, from a second-level cache:
    // half a megabyte of them, beside 0.4 of Q and the accumulator at head_dim 128.
    const int64_t even = ceil_div(p.rows, ceil_div(p.rows, 512));
    const int64_t block_m = ceil_div(even, kMatrixRows) * kMatrixRows;
    const int64_t keys = (int64_t{1} << 18) / std::max<int64_t>(p.head_dim + p.head_dim_v, 1);
    const int64_t units = std::clamp<int64_t>(keys / kMatrixKeys, 1, 2048 / kMatrixKeys);
    return {{std::min(p.rows, block_m), units * kMatrixKeys}, true, 1};
  }
  // K and V are packed once for each row block, so these are long where that leaves tasks enough
  // for the threads; sums are added up over a block of keys in registers. At 192 x 256 and head_dim
  // 128 Q, S, the accumulator, K and V are 0.66 MB of fp32, of which S and a panel of K or V at a
  // time are what a product needs. Wide heads take less.
  const bool wide = std::max(p.head_dim, p.head_dim_v) > 128;
  const bool long_blocks =
      !wide && p.batch_size * p.num_heads_kv * ceil_div(p.rows, 192) >= 4 * p.threads;
  CpuForwardPlan plan{{long_blocks ? 192 : 96, wide ? 64 : 256}, pack, 1};
  if (!pack) {
    plan.tile.block_n = 256;
    if (p.heads_side_by_side) {
      // One head at a time would read some hundred bytes of every few kilobytes: heads that fill a
      // page go together, with fewer keys, for all their scores are kept.
      const int64_t heads = 4096 / (p.head_dim * p.element_size);
      plan.heads_together = std::clamp<int64_t>(heads, 1, std::min(p.num_heads_kv, kMaxHeads));
      if (plan.heads_together > 1) plan.tile.block_n = 64;
    }
    if (tiles_in_place) plan.tile.block_n = kMatrixKeysInPlace;
  }
  plan.tile.block_m = std::clamp<int64_t>(p.rows, 1, plan.tile.block_m);
  return plan;
}

// The backward holds about three times as many tiles as the forward.
inline Tile cpu_backward_tile() { return {64, 64}; }

// With a matrix unit each block of rows is transposed for each block of keys, which wants many keys
// to pay for it, if enough blocks are left for the threads. At 128 x 256 and head_dim 128 it is
// 0.7 MB; what one product along the rows reads for 32 keys, 24 KB with head_dim 64, stays in a
// first-level cache.
inline Tile cpu_backward_matrix_tile(int64_t seqlen_kv) {
  return {128, seqlen_kv >= 1024 ? 256 : 128};
}

// The keys of a task of the fused backward. With few heads there are two parts of them, each with a
// dQ of its own: three tasks keep two threads 3/4 busy, and with a causal mask the parts have 3/4
// and 1/4 of the work and keep them busy all the time. A part reads and packs all rows again, so it
// has 512 keys or more; the second dQ of a sequence is at most 16 MB, so that memory stays linear.
// One sequence's shape decides: its bits depend on neither the batch nor the threads.
inline int64_t cpu_backward_keys_per_part(int64_t num_heads_kv, int64_t seqlen_kv,
                                          int64_t elements_of_dq) {
  const bool two = num_heads_kv <= 6 && seqlen_kv >= 1024 && elements_of_dq <= int64_t{4} << 20;
  constexpr int64_t align = 64;  // block_n of the vector levels: no block is cut
  return ceil_div(seqlen_kv, (two ? 2 : 1) * align) * align;
}

// Keys per split in batch-invariant mode: fixed, so that a sequence's own length decides.
constexpr int64_t kBatchInvariantSplit = 1024;

// KV heads per task: as many as may walk together, as long as every thread has a task.
inline int64_t cpu_heads_per_task(const CpuForwardPlan& plan, int64_t tasks_by_head,
                                  int64_t threads) {
  return std::clamp<int64_t>(tasks_by_head / threads, 1, plan.heads_together);
}

constexpr int64_t kMergedColumns = 64;  // that a warp of CUDA's merge takes at once, two a lane

constexpr int64_t kMinKeysPerSplit = 256;  // below, merging costs more than splitting spreads

// Splits for `tasks` equal tasks on `threads` threads. Three tasks on two threads keep them 3/4
// busy, twice as many halves keep them busy all the time: the fewest splits that gain a tenth each
// time.
inline int64_t cpu_kv_splits(int64_t tasks, int64_t threads, int64_t longest) {
  const auto busy = [&](int64_t splits) {
    const int64_t rounds = ceil_div(tasks * splits, threads);
    return static_cast<double>(tasks * splits) / static_cast<double>(rounds * threads);
  };
  int64_t best = 1;
  if (tasks <= 0) return best;
  for (int64_t splits = 2; splits <= std::min<int64_t>(longest / kMinKeysPerSplit, 256); ++splits) {
    if (busy(splits) > 1.1 * busy(best)) best = splits;
  }
  return best;
}

// How many thread blocks share a multiprocessor, as far as shared memory goes.
inline int64_t blocks_per_sm(int64_t smem_bytes, int64_t smem_per_sm) {
  constexpr int64_t kReserved = 1024;  // the driver's own, per block
  return std::max<int64_t>(smem_per_sm / (smem_bytes + kReserved), 1);
}

// (batch, KV head) pairs whose K and V stay in the L2 together while their row blocks read them;
// 5/8 of it, for q and out pass through as well.
inline int64_t heads_per_section(int64_t heads, int64_t bytes_per_head, int64_t l2_bytes) {
  return std::clamp<int64_t>(l2_bytes * 5 / 8 / std::max<int64_t>(bytes_per_head, 1), 1,
                             std::max<int64_t>(heads, 1));
}

constexpr int64_t kMinKeysPerCudaSplit = 128;  // of the cache's capacity
constexpr int64_t kMaxCudaSplits = 128;

// Splits so that `work` equal pieces keep `slots` resident thread blocks busy: the fewest whose
// last wave is within 15 % of as full as any gets.
inline int64_t cuda_kv_splits(int64_t work, int64_t slots, int64_t longest) {
  if (work <= 0 || work * 5 >= slots * 4) return 1;
  const int64_t most = std::clamp<int64_t>(longest / kMinKeysPerCudaSplit, 1, kMaxCudaSplits);
  const auto fill = [&](int64_t splits) {
    const int64_t waves = ceil_div(work * splits, slots);
    return static_cast<double>(work * splits) / static_cast<double>(waves * slots);
  };
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, fill(splits));
  int64_t splits = 1;
  while (fill(splits) < 0.85 * best) ++splits;
  return splits;
}

constexpr int64_t kFlatGemmStep = 64;     // of K: what splits are multiples of, for every row
constexpr int64_t kFlatGemmBlocks = 256;  // about two for each multiprocessor of an H200, 132
// The partials of such a split are M / 128 of its weight's bytes; not measured yet.
constexpr int64_t kMinStepsPerFlatSplit = 8;
constexpr int64_t kMaxFlatSplits = 16;
// Rows of x that one launch splits K for: its partials take 4 splits M N bytes.
constexpr int64_t kFlatGemmRowsPerLaunch = 1024;

// Splits of K for a weight [n, k]: the fewest that give kFlatGemmBlocks thread blocks, of 64 rows
// of the weight each. Neither M nor the device's size has a say, so that a row's bits depend on
// neither.
inline int64_t flat_gemm_splits(int64_t n, int64_t k) {
  const int64_t tiles = std::max<int64_t>(ceil_div(n, 64), 1);
  const int64_t most = ceil_div(k, kFlatGemmStep) / kMinStepsPerFlatSplit;
  return std::clamp<int64_t>(ceil_div(kFlatGemmBlocks, tiles), 1,
                             std::clamp<int64_t>(most, 1, kMaxFlatSplits));
}

}  // namespace flashinfer_lite
