// Loads, stores, atomics, fences and asynchronous copies as PTX; see ptx.cuh. Global addresses are
// converted from generic ones, so that the instructions need not find out which memory is meant.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/arch/types.h"

namespace flashinfer_lite::arch {

// ---- Shared and global memory

// The sizes that one load or store instruction moves.
template <class T>
constexpr bool kIsAccessSize =
    sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

// Data Movement and Conversion Instructions: ld (.shared). A byte lands in the low bits of a
// 32-bit register: inline PTX has no 8-bit operands.
template <class T>
__device__ __forceinline__ T lds(uint32_t addr) {
  static_assert(kIsAccessSize<T>, "lds moves 1, 2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 1) {
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return std::bit_cast<T>(static_cast<uint8_t>(v));
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else {
    U32x4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
    return std::bit_cast<T>(v);
  }
}

// Data Movement and Conversion Instructions: st (.shared)
template <class T>
__device__ __forceinline__ void sts(uint32_t addr, T value) {
  static_assert(kIsAccessSize<T>, "sts moves 1, 2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 1) {
    const uint32_t v = std::bit_cast<uint8_t>(value);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    const uint16_t v = std::bit_cast<uint16_t>(value);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(addr), "h"(v) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t v = std::bit_cast<uint32_t>(value);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const U32x2 v = std::bit_cast<U32x2>(value);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(addr), "r"(v.x), "r"(v.y) : "memory");
  } else {
    const U32x4 v = std::bit_cast<U32x4>(value);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

// Data Movement and Conversion Instructions: ld (.global)
template <class T>
__device__ __forceinline__ T ldg(const T* p) {
  static_assert(kIsAccessSize<T>, "ldg moves 1, 2, 4, 8 or 16 bytes");
  const size_t addr = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 1) {
    uint32_t v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(addr) : "memory");
    return std::bit_cast<T>(static_cast<uint8_t>(v));
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(v) : "l"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 v;
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(addr) : "memory");
    return std::bit_cast<T>(v);
  } else {
    U32x4 v;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(addr)
                 : "memory");
    return std::bit_cast<T>(v);
  }
}

// Data Movement and Conversion Instructions: st (.global)
template <class T>
__device__ __forceinline__ void stg(T* p, T value) {
  static_assert(kIsAccessSize<T>, "stg moves 1, 2, 4, 8 or 16 bytes");
  const size_t addr = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 1) {
    const uint32_t v = std::bit_cast<uint8_t>(value);
    asm volatile("st.global.u8 [%0], %1;" ::"l"(addr), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    const uint16_t v = std::bit_cast<uint16_t>(value);
    asm volatile("st.global.b16 [%0], %1;" ::"l"(addr), "h"(v) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t v = std::bit_cast<uint32_t>(value);
    asm volatile("st.global.b32 [%0], %1;" ::"l"(addr), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const U32x2 v = std::bit_cast<U32x2>(value);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(addr), "r"(v.x), "r"(v.y) : "memory");
  } else {
    const U32x4 v = std::bit_cast<U32x4>(value);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(addr), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

// Data Movement and Conversion Instructions: prefetch, prefetchu
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// Parallel Synchronization and Communication Instructions: atom (.add); returns the old value.
template <class T>
__device__ __forceinline__ T atomic_add(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> ||
                    std::is_same_v<T, uint64_t> || std::is_same_v<T, float>,
                "atomic_add takes int32_t, uint32_t, uint64_t or float");
  if constexpr (std::is_same_v<T, uint64_t>) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), value);
  } else {
    return atomicAdd(p, value);
  }
}

// Parallel Synchronization and Communication Instructions: atom (.inc). Returns the old value; the
// counter goes 0, 1, ..., last, 0, so a launch leaves it as it found it.
__device__ __forceinline__ uint32_t ticket(uint32_t* counter, uint32_t last) {
  return atomicInc(counter, last);
}

// Parallel Synchronization and Communication Instructions: membar, fence
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- Asynchronous copies
// Data Movement and Conversion Instructions: cp.async. valid_bytes is src-size: 0 reads nothing.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(valid_bytes)
               : "memory");
}

// Data Movement and Conversion Instructions: cp.async.commit_group
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Data Movement and Conversion Instructions: cp.async.wait_group. At most N groups stay in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace flashinfer_lite::arch
