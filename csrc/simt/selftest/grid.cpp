// What orders the threads of different blocks, and of one block through global memory.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

constexpr int kThreads = 64;

void global_exchange(const Params& p) {
  const int thread = arch::thread_idx();
  arch::stg(p.out + thread, static_cast<uint32_t>(thread));
  if (!p.is("no barrier")) arch::sync_threads();
  arch::stg(p.out + kThreads + thread, arch::ldg(p.out + kThreads - 1 - thread));
}

// All threads of a block read a word, then one of them writes it.
void read_then_write(const Params& p) {
  const int thread = arch::thread_idx();
  const bool last_writes = p.is("the last writes") || p.is("the last writes, no barrier");
  arch::ldg(p.state);
  if (!p.is("the first writes, no barrier") && !p.is("the last writes, no barrier")) {
    arch::sync_threads();
  }
  if (thread == (last_writes ? kThreads - 1 : 0)) arch::stg(p.state, 1u);
}

// Block 0 tells block 1 of its word, and block 1 tells block 2.
void relay(const Params& p) {
  const int block = arch::block_idx();
  if (arch::thread_idx() != 0) return;
  if (block == 0) arch::stg(p.state + 8, 1u);
  if (block != 0) arch::atomic_add(p.state + block - 1, 1u);
  arch::fence_gpu();
  if (block != 2) arch::atomic_add(p.state + block, 1u);
  if (block == 2) arch::ldg(p.state + 8);
}

// Thread 0 tells thread 1 of its word without a barrier.
void atomic_within_block(const Params& p) {
  const int thread = arch::thread_idx();
  if (thread == 0) {
    arch::stg(p.state + 8, 1u);
    arch::fence_gpu();
    arch::atomic_add(p.state, 1u);
  } else if (thread == 1) {
    arch::atomic_add(p.state, 1u);
    arch::fence_gpu();
    arch::ldg(p.state + 8);
  }
}

void blocks_write(const Params& p) {
  const int block = arch::block_idx();
  if (arch::thread_idx() != 0) return;
  if (p.is("reads the next block's word") && block + 1 < arch::num_blocks()) {
    arch::ldg(p.state + block + 1);
  }
  if (p.is("reads the previous block's word") && block > 0) arch::ldg(p.state + block - 1);
  arch::stg(p.state + (p.is("the same word") ? 0 : block), static_cast<uint32_t>(block));
}

uint32_t draw_ticket(const Params& p) {
  const uint32_t last = static_cast<uint32_t>(arch::num_blocks()) - 1;
  uint32_t number = 0;
  if (!p.is("no fence before the ticket")) arch::fence_gpu();
  if (p.is("written after the fence")) arch::stg(p.out + kThreads * arch::block_idx(), 0u);
  if (p.is("atomic_add instead")) {
    number = arch::atomic_add(p.state, 1u);
  } else if (p.is("a float counts")) {
    number = static_cast<uint32_t>(arch::atomic_add(reinterpret_cast<float*>(p.state), 1.0f));
  } else if (p.is("each block its counter")) {
    arch::ticket(p.state + arch::block_idx(), 0);
    number = static_cast<uint32_t>(arch::block_idx());
  } else {
    number = arch::ticket(p.state, last);
  }
  if (!p.is("no fence after the ticket")) arch::fence_gpu();
  return number;
}

bool is_last(const Params& p, uint32_t number) {
  const uint32_t last = static_cast<uint32_t>(arch::num_blocks()) - 1;
  if (p.is("without a ticket")) return static_cast<uint32_t>(arch::block_idx()) == last;
  if (p.is("the first to arrive reads")) return number == 0;
  return number == last;
}

// The last block to arrive adds up what all have written.
void last_block_sums(const Params& p) {
  const int thread = arch::thread_idx();
  arch::stg(p.out + kThreads * arch::block_idx() + thread, static_cast<uint32_t>(thread));
  if (!p.is("no barrier before the ticket")) arch::sync_threads();
  if (thread == 0) arch::sts(word_address(0), p.is("without a ticket") ? 0 : draw_ticket(p));
  arch::sync_threads();
  if (!is_last(p, arch::lds<uint32_t>(word_address(0)))) return;
  uint32_t sum = 0;
  for (int block = 0; block < arch::num_blocks(); ++block) {
    sum += arch::ldg(p.out + kThreads * block + kThreads - 1 - thread);
  }
  arch::stg(p.state + kThreads + thread, sum);
}

void atomic_sum(const Params& p) {
  const uint32_t term = static_cast<uint32_t>(arch::block_idx() * kWarpSize + lane_idx());
  const bool first = arch::thread_idx() == 0 && arch::block_idx() == 0;
  if (p.is("plain adds")) {
    arch::stg(p.state, arch::ldg(p.state) + term);
  } else {
    arch::atomic_add(p.state, term);
  }
  arch::atomic_add(reinterpret_cast<int32_t*>(p.state + 1), -1);
  arch::atomic_add(reinterpret_cast<float*>(p.state + 2), 0.5f);
  if (p.is("a plain write too") && first) arch::stg(p.state, 0u);
  if (p.is("a plain read too") && first) arch::ldg(p.state);
}

// Right by the rules, but its output depends on the order of the blocks.
void arrival_order(const Params& p) {
  if (arch::thread_idx() != 0) return;
  const uint32_t last = static_cast<uint32_t>(arch::num_blocks()) - 1;
  arch::stg(p.out + arch::block_idx(), arch::ticket(p.state, last));
}

constexpr Case kCases[] = {
    make_case<global_exchange>("global_exchange", kThreads),
    make_case<read_then_write>("read_then_write", kThreads),
    make_case<relay>("relay", 32, 3),
    make_case<atomic_within_block>("atomic_within_block", 32),
    make_case<blocks_write>("blocks_write", 32, 4),
    make_case<last_block_sums>("last_block_sums", kThreads, 4),
    make_case<atomic_sum>("atomic_sum", 32, 4),
    make_case<arrival_order>("arrival_order", 32, 8),
};

}  // namespace

std::span<const Case> grid_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
