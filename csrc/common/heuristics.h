// Tile and split choices as pure functions of the problem.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashinfer_lite {

struct Tile {
  int64_t block_m;  // rows: queries times the heads of a group
  int64_t block_n;  // keys per step
};

// The forward keeps Q, S, the accumulator and one packed tile of K and V: at 96 x 128 and head_dim
// 128 that is 0.27 MB of fp32, half of a small L2. Wide heads take fewer keys for the same bytes.
inline Tile cpu_forward_tile(int64_t head_dim, int64_t head_dim_v) {
  return {96, std::max(head_dim, head_dim_v) > 128 ? 64 : 128};
}

// The backward holds about three times as many tiles as the forward.
inline Tile cpu_backward_tile() { return {64, 64}; }

// Below this many rows per KV head a packed tile of K and V is not read often enough to pay for
// packing, and the kernel reads K and V in place instead.
constexpr int64_t kCpuPackRows = 12;

// Keys per split in batch-invariant mode: fixed, so that a sequence's own length decides.
constexpr int64_t kBatchInvariantSplit = 1024;

// Splits for `tasks` independent (batch, KV head, row block) tasks on `threads` threads: enough for
// every thread to have work, never so many that a split has fewer than 256 keys, where merging
// costs more than it spreads.
inline int64_t cpu_kv_splits(int64_t tasks, int64_t threads, int64_t seqlen_kv) {
  if (tasks <= 0 || tasks >= threads) return 1;
  const int64_t wanted = (threads + tasks - 1) / tasks;
  return std::clamp<int64_t>(std::min(wanted, seqlen_kv / 256), 1, 256);
}

}  // namespace flashinfer_lite
