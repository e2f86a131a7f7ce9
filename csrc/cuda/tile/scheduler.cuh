// Which block of work a thread block takes, on a one-dimensional grid.
#pragma once

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::tile {

struct ForwardWork {
  int m_block;
  int head_kv;
  int batch_idx;
};

// (batch, KV head) pairs are taken in sections whose K and V fit the L2 together. Within a section
// the last row blocks come first, for every head: under a causal mask they are the longest, and
// what runs last should be short. The section that is not full comes first for the same reason: a
// head of its own at the end would have the longest blocks start when the others are done.
template <class Params>
__device__ __forceinline__ ForwardWork forward_work(const Params& p, uint32_t block) {
  const auto num_m_blocks = static_cast<uint32_t>(p.num_m_blocks);
  const auto heads = static_cast<uint32_t>(p.batch_size * p.num_heads_kv);
  const auto section_heads = static_cast<uint32_t>(p.heads_per_section);
  const uint32_t odd_heads = heads % section_heads;
  uint32_t first_head = 0;
  uint32_t here = odd_heads;
  if (block >= odd_heads * num_m_blocks) {
    const uint32_t section = (block - odd_heads * num_m_blocks) / (section_heads * num_m_blocks);
    first_head = odd_heads + section * section_heads;
    here = section_heads;
  }
  const uint32_t index = block - first_head * num_m_blocks;
  const uint32_t head = first_head + index % here;
  const auto num_heads_kv = static_cast<uint32_t>(p.num_heads_kv);
  return {static_cast<int>(num_m_blocks - 1 - index / here), static_cast<int>(head % num_heads_kv),
          static_cast<int>(head / num_heads_kv)};
}

}  // namespace flashinfer_lite::tile
