// Writes new keys and values into a cache, the keys rotated (Su et al., arXiv 2104.09864):
//
//   slot = seqlens_kv[batch] + t      (x, y) -> (x cos - y sin, x sin + y cos)
//
//   k, v [batch, seqlen_new, num_heads_kv, head_dim or head_dim_v]
//   k_cache, v_cache the same with slots, or pages and their slots, in the place of tokens
//
// A warp takes a token's key and value of one head, neighbouring lanes neighbouring elements. A
// token without a slot, a page or an angle is not written. Some kilobytes per call: bound by
// latency, whatever the width of a load.
#pragma once

#include "common/params/append_kv_cuda.h"
#include "common/types.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/scores.cuh"

namespace flashinfer_lite::append_kv {

using Params = CudaAppendKvParams;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

template <class Element>
__device__ __forceinline__ float load(const void* table, bool is_float, int64_t at) {
  if (is_float) return arch::ldg(static_cast<const float*>(table) + at);
  return arch::to_float(arch::ldg(static_cast<const Element*>(table) + at));
}

template <class Element>
__device__ __forceinline__ void rotate(const RotaryTable& rotary, int64_t position,
                                       const Element* in, Element* out, int lane) {
  const auto half = static_cast<int>(rotary.dim / 2);
  for (int i = lane; i < half; i += 32) {
    const int first = rotary.interleaved ? 2 * i : i;
    const int second = rotary.interleaved ? first + 1 : i + half;
    const float x = arch::to_float(arch::ldg(in + first));
    const float y = arch::to_float(arch::ldg(in + second));
    const int64_t cos_at = position * rotary.cos_row + i, sin_at = position * rotary.sin_row + i;
    const float cos = load<Element>(rotary.cos, rotary.in_accumulator, cos_at);
    const float sin = load<Element>(rotary.sin, rotary.in_accumulator, sin_at);
    arch::stg(out + first, arch::from_float<Element>(x * cos - y * sin));
    arch::stg(out + second, arch::from_float<Element>(x * sin + y * cos));
  }
}

template <class Element>
__device__ __forceinline__ void copy(const Element* in, int first, int64_t count, Element* out,
                                     int lane) {
  for (int i = first + lane; i < static_cast<int>(count); i += 32) {
    arch::stg(out + i, arch::ldg(in + i));
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads) append_kv_sm80(const __grid_constant__ Params p) {
  using Element = typename Cfg::Element;
  const int lane = arch::thread_idx() % 32;
  const int64_t warp = int64_t{arch::block_idx()} * kWarps + arch::thread_idx() / 32;
  if (!arch::predicate(warp < p.batch_size * p.seqlen_new * p.num_heads_kv)) return;
  const int64_t head = warp % p.num_heads_kv;
  const int64_t t = warp / p.num_heads_kv % p.seqlen_new;
  const auto batch_idx = static_cast<int>(warp / p.num_heads_kv / p.seqlen_new);

  const int64_t used = tile::read_length(p.device_seqlens_kv, batch_idx, 0);
  const bool fits = used >= 0 && used < p.capacity && used + t < p.capacity;
  const int64_t position = used + t;
  if (!arch::predicate(fits && (p.rotary.cos == nullptr || position < p.rotary.positions))) return;
  int64_t page = batch_idx, slot = position;
  if (p.device_block_table.data != nullptr) {
    const int64_t i = position / p.block_table.page_size;
    page = tile::read_page(p.device_block_table, batch_idx, i);
    slot = position - i * p.block_table.page_size;
    if (!arch::predicate(page >= 0 && page < p.block_table.num_pages)) return;
  }

  const auto* k = static_cast<const Element*>(p.k.data) + batch_idx * p.k.batch + t * p.k.seqlen +
                  head * p.k.head;
  const auto* v = static_cast<const Element*>(p.v.data) + batch_idx * p.v.batch + t * p.v.seqlen +
                  head * p.v.head;
  auto* k_slot = static_cast<Element*>(p.k_cache.data) + page * p.k_cache.batch +
                 slot * p.k_cache.seqlen + head * p.k_cache.head;
  auto* v_slot = static_cast<Element*>(p.v_cache.data) + page * p.v_cache.batch +
                 slot * p.v_cache.seqlen + head * p.v_cache.head;
  int rotated = 0;
  if (p.rotary.cos != nullptr) {
    rotate(p.rotary, position, k, k_slot, lane);
    rotated = static_cast<int>(p.rotary.dim);
  }
  copy(k, rotated, p.head_dim, k_slot, lane);
  copy(v, 0, p.head_dim_v, v_slot, lane);
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = append_kv::Params;
  static constexpr int smem_bytes = 0;

  static Status launch(const Params& p, Stream stream) {
    const int64_t warps = p.batch_size * p.seqlen_new * p.num_heads_kv;
    const auto blocks = static_cast<uint32_t>((warps + kWarps - 1) / kWarps);
    const LaunchConfig config{blocks, kThreads, smem_bytes};
    return arch::launch<append_kv_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::append_kv
