// Hopper's barriers in shared memory and its bulk copies as PTX; see ptx.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/types.h"

// Code for an older architecture compiles and traps where it meets one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FIL_ASM_SM90(...) __trap()
#else
#define FIL_ASM_SM90(...) asm volatile(__VA_ARGS__)
#endif

namespace flashinfer_lite::arch {

// Parallel Synchronization and Communication Instructions: mbarrier.init
__device__ __forceinline__ void mbarrier_init(uint32_t addr, uint32_t count) {
  FIL_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(addr), "r"(count) : "memory");
}

// Parallel Synchronization and Communication Instructions: mbarrier.arrive
__device__ __forceinline__ void mbarrier_arrive(uint32_t addr) {
  FIL_ASM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(addr) : "memory");
}

// Parallel Synchronization and Communication Instructions: mbarrier.arrive (.expect_tx)
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes) {
  FIL_ASM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(addr),
               "r"(bytes) : "memory");
}

// Parallel Synchronization and Communication Instructions: mbarrier.test_wait, mbarrier.try_wait.
// try_wait may suspend the thread for a while, so the loop spins little.
__device__ __forceinline__ void mbarrier_wait(uint32_t addr, uint32_t parity) {
  FIL_ASM_SM90(
      "{\n"
      ".reg .pred p;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra retry;\n"
      "}" ::"r"(addr),
      "r"(parity) : "memory");
}

// Parallel Synchronization and Communication Instructions: mbarrier.test_wait, mbarrier.try_wait
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t addr, uint32_t parity) {
  uint32_t complete = 0;
  FIL_ASM_SM90(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}" : "=r"(complete) : "r"(addr),
      "r"(parity) : "memory");
  return complete != 0;
}

// Parallel Synchronization and Communication Instructions: membar, fence (.mbarrier_init). Makes
// initialised barriers visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  FIL_ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// Parallel Synchronization and Communication Instructions: membar, fence (.proxy.async). Orders
// ordinary accesses to shared memory before bulk copies.
__device__ __forceinline__ void fence_proxy_async() {
  FIL_ASM_SM90("fence.proxy.async.shared::cta;" :: : "memory");
}

// Data Movement and Conversion Instructions: cp.async.bulk.tensor. c0 is the coordinate of the
// dimension whose elements lie next to each other.
__device__ __forceinline__ void tma_load_2d(uint32_t dst, const TensorMap* map, int c0, int c1,
                                            uint32_t mbarrier) {
  FIL_ASM_SM90(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
      "l"(map), "r"(c0), "r"(c1), "r"(mbarrier) : "memory");
}

}  // namespace flashinfer_lite::arch

#undef FIL_ASM_SM90
