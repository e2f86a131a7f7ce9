// The wrapper layer on the SIMT executor (csrc/simt). Each function has the signature of its twin
// in ptx.cuh, plus the call site.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/types.h"
#include "cuda/arch/types.h"
#include "simt/kernel_api.h"

namespace flashinfer_lite::arch {

using simt::Site;

// ---- Indices

FIL_SIMT_INLINE int thread_idx() { return simt::current_lane->thread; }
FIL_SIMT_INLINE int block_idx() { return simt::block_index(); }
FIL_SIMT_INLINE int num_blocks() { return simt::num_blocks(); }
FIL_SIMT_INLINE uint32_t dynamic_smem() { return simt::kSharedBase; }

// ---- Warp

FIL_SIMT_INLINE void sync_warp(uint32_t mask = kFullMask, Site site = Site::here()) {
  simt::sync_warp(mask, site);
}

template <class T>
FIL_SIMT_INLINE T shfl_xor(T value, int lane_mask, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  const uint32_t source = simt::current_lane->index ^ static_cast<uint32_t>(lane_mask);
  return std::bit_cast<T>(simt::shuffle(std::bit_cast<uint32_t>(value), source, site));
}

template <class T>
FIL_SIMT_INLINE T shfl(T value, int src_lane, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  const uint32_t source = static_cast<uint32_t>(src_lane);
  return std::bit_cast<T>(simt::shuffle(std::bit_cast<uint32_t>(value), source, site));
}

FIL_SIMT_INLINE uint32_t ballot(bool predicate, Site site = Site::here()) {
  return simt::vote(predicate, site);
}

FIL_SIMT_INLINE bool any(bool predicate, Site site = Site::here()) {
  return simt::vote(predicate, site) != 0;
}

FIL_SIMT_INLINE bool all(bool predicate, Site site = Site::here()) {
  return simt::vote(!predicate, site) == 0;
}

FIL_SIMT_INLINE bool elect_one() { return simt::current_lane->index == 0; }

// ---- Block

FIL_SIMT_INLINE void sync_threads(Site site = Site::here()) { simt::sync_threads(site); }

FIL_SIMT_INLINE bool sync_threads_or(bool predicate, Site site = Site::here()) {
  return simt::sync_threads_or(predicate, site);
}

FIL_SIMT_INLINE void bar_sync(uint32_t id, uint32_t threads, Site site = Site::here()) {
  simt::bar_sync(id, threads, site);
}

FIL_SIMT_INLINE void bar_arrive(uint32_t id, uint32_t threads, Site site = Site::here()) {
  simt::bar_arrive(id, threads, site);
}

// ---- Shared and global memory

template <class T>
FIL_SIMT_INLINE T lds(uint32_t addr, Site site = Site::here()) {
  T value;
  simt::load_shared<sizeof(T)>(addr, &value, site);
  return value;
}

template <class T>
FIL_SIMT_INLINE void sts(uint32_t addr, T value, Site site = Site::here()) {
  simt::store_shared<sizeof(T)>(addr, &value, site);
}

template <class T>
FIL_SIMT_INLINE T ldg(const T* p, Site site = Site::here()) {
  T value;
  simt::load_global<sizeof(T)>(p, &value, site);
  return value;
}

template <class T>
FIL_SIMT_INLINE void stg(T* p, T value, Site site = Site::here()) {
  simt::store_global<sizeof(T)>(p, &value, site);
}

FIL_SIMT_INLINE void prefetch_l2(const void* p, Site site = Site::here()) {
  simt::prefetch_l2(p, site);
}

template <class T>
FIL_SIMT_INLINE T atomic_add(T* p, T value, Site site = Site::here()) {
  return simt::atomic_add(p, value, site);
}

FIL_SIMT_INLINE uint32_t ticket(uint32_t* counter, uint32_t last, Site site = Site::here()) {
  return simt::ticket(counter, last, site);
}

FIL_SIMT_INLINE void fence_gpu(Site site = Site::here()) { simt::fence_gpu(site); }

// A guard of memory accesses. The executor can force one to true, to prove that it is needed.
FIL_SIMT_INLINE bool predicate(bool p, Site site = Site::here()) {
  return simt::predicate(p, site);
}

// Means something to nvcc's register allocation only.
template <class T>
FIL_SIMT_INLINE T opaque(T value) {
  static_assert(sizeof(T) == 4, "opaque takes a 32-bit register");
  return value;
}

// ---- Asynchronous copies

FIL_SIMT_INLINE void cp_async_16(uint32_t dst, const void* src, int valid_bytes,
                                 Site site = Site::here()) {
  simt::cp_async_16(dst, src, valid_bytes, site);
}

FIL_SIMT_INLINE void cp_async_commit(Site site = Site::here()) { simt::cp_async_commit(site); }

template <int N>
FIL_SIMT_INLINE void cp_async_wait(Site site = Site::here()) {
  simt::cp_async_wait(N, site);
}

// ---- Tensor cores

FIL_SIMT_INLINE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr, Site site = Site::here()) {
  simt::ldmatrix_x4(r, addr, false, site);
}

FIL_SIMT_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr, Site site = Site::here()) {
  simt::ldmatrix_x4(r, addr, true, site);
}

template <class Element>
FIL_SIMT_INLINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  Site site = Site::here()) {
  simt::mma_m16n8k16<Element>(d, a, b, 1, site);
}

template <class Element, int kTiles>
FIL_SIMT_INLINE void mma_m16n8k16_row(float (*d)[4], const uint32_t (&a)[4], const uint32_t (*b)[2],
                                      Site site = Site::here()) {
  simt::mma_m16n8k16<Element>(d[0], a, b[0], kTiles, site);
}

// ---- Arithmetic. The GPU's approximations of exp2 and log2 take subnormals for zero.

FIL_SIMT_INLINE float flush_subnormal(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

FIL_SIMT_INLINE float exp2(float x) { return flush_subnormal(::exp2f(flush_subnormal(x))); }

FIL_SIMT_INLINE float log2(float x) { return ::log2f(flush_subnormal(x)); }

FIL_SIMT_INLINE float tanh(float x) { return ::tanhf(x); }

FIL_SIMT_INLINE float to_float(BFloat16 x) { return flashinfer_lite::to_float(x); }
FIL_SIMT_INLINE float to_float(Float16 x) { return flashinfer_lite::to_float(x); }
FIL_SIMT_INLINE float to_float(float x) { return x; }

template <class Element>
FIL_SIMT_INLINE Element from_float(float x) {
  return flashinfer_lite::from_float<Element>(x);
}

// `lo` goes to the lower half.
template <class Element>
FIL_SIMT_INLINE uint32_t pack(float lo, float hi) {
  const uint32_t high = flashinfer_lite::from_float<Element>(hi).bits;
  return high << 16 | flashinfer_lite::from_float<Element>(lo).bits;
}

// ---- Transaction barriers and TMA

FIL_SIMT_INLINE void mbarrier_init(uint32_t addr, uint32_t count, Site site = Site::here()) {
  simt::mbarrier_init(addr, count, site);
}

FIL_SIMT_INLINE void mbarrier_arrive(uint32_t addr, Site site = Site::here()) {
  simt::mbarrier_arrive(addr, 0, site);
}

FIL_SIMT_INLINE void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes,
                                               Site site = Site::here()) {
  simt::mbarrier_arrive(addr, bytes, site);
}

FIL_SIMT_INLINE void mbarrier_wait(uint32_t addr, uint32_t parity, Site site = Site::here()) {
  simt::mbarrier_wait(addr, parity, site);
}

FIL_SIMT_INLINE bool mbarrier_test_wait(uint32_t addr, uint32_t parity, Site site = Site::here()) {
  return simt::mbarrier_test_wait(addr, parity, site);
}

FIL_SIMT_INLINE void fence_mbarrier_init(Site site = Site::here()) {
  simt::fence_mbarrier_init(site);
}

FIL_SIMT_INLINE void fence_proxy_async(Site site = Site::here()) { simt::fence_proxy_async(site); }

FIL_SIMT_INLINE void tma_load_2d(uint32_t dst, const TensorMap* map, int c0, int c1,
                                 uint32_t mbarrier, Site site = Site::here()) {
  simt::tma_load_2d(dst, map, c0, c1, mbarrier, site);
}

// ---- Launch

// Runs kernel(params) in the current session of the executor, whose report has the findings.
template <auto kernel, class Params>
Status launch(const LaunchConfig& config, Stream, const Params& params) {
  const auto call = [](const void* p) { kernel(*static_cast<const Params*>(p)); };
  return simt::launch(config.blocks, config.threads, config.smem_bytes, call, &params);
}

}  // namespace flashinfer_lite::arch
