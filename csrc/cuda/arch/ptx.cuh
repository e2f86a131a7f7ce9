// One PTX instruction, one function; above each stands the section of the PTX ISA that defines it.
// cpu.cuh declares the same functions for the executor. Memory accesses and Hopper's asynchronous
// instructions are in files of their own.
//
// `volatile` keeps an instruction where it stands relative to the others; a "memory" clobber is on
// whatever reads or writes memory or orders such accesses. An mma touches registers only, so it has
// no clobber; a conversion is a pure function of its operand and is not volatile either.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cuda/arch/ptx_hopper.cuh"
#include "cuda/arch/ptx_memory.cuh"
#include "cuda/arch/types.h"

namespace flashinfer_lite::arch {

// ---- Where am I

// Special Registers: %tid
__device__ __forceinline__ int thread_idx() { return static_cast<int>(threadIdx.x); }

// Special Registers: %ctaid
__device__ __forceinline__ int block_idx() { return static_cast<int>(blockIdx.x); }

// Special Registers: %nctaid
__device__ __forceinline__ int num_blocks() { return static_cast<int>(gridDim.x); }

// Data Movement and Conversion Instructions: cvta. Kernels declare no shared memory of their own,
// so this is where a block's shared memory begins; the swizzles rely on the 1024-byte alignment.
__device__ __forceinline__ uint32_t dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char dynamic_smem_begin[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_smem_begin));
}

// ---- Within a warp

// Parallel Synchronization and Communication Instructions: bar.warp.sync
__device__ __forceinline__ void sync_warp(uint32_t mask = kFullMask) { __syncwarp(mask); }

// Parallel Synchronization and Communication Instructions: shfl.sync (.bfly)
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return std::bit_cast<T>(__shfl_xor_sync(kFullMask, std::bit_cast<uint32_t>(value), lane_mask));
}

// Parallel Synchronization and Communication Instructions: shfl.sync (.idx)
template <class T>
__device__ __forceinline__ T shfl(T value, int src_lane) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return std::bit_cast<T>(__shfl_sync(kFullMask, std::bit_cast<uint32_t>(value), src_lane));
}

// Parallel Synchronization and Communication Instructions: vote.sync (.ballot)
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(kFullMask, predicate);
}

// Parallel Synchronization and Communication Instructions: vote.sync (.any)
__device__ __forceinline__ bool any(bool predicate) { return __any_sync(kFullMask, predicate); }

// Parallel Synchronization and Communication Instructions: vote.sync (.all)
__device__ __forceinline__ bool all(bool predicate) { return __all_sync(kFullMask, predicate); }

// Parallel Synchronization and Communication Instructions: elect.sync; before sm_90 lane 0 is the
// elected one (Special Registers: %laneid).
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .u32 lane;\n"
      "mov.u32 lane, %%laneid;\n"
      "setp.eq.u32 p, lane, 0;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
#else
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
#endif
  return elected != 0;
}

// ---- Within a block

// Parallel Synchronization and Communication Instructions: bar, barrier (barrier 0, all threads)
__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// Parallel Synchronization and Communication Instructions: bar, barrier (.red.or)
__device__ __forceinline__ bool sync_threads_or(bool predicate) {
  return __syncthreads_or(predicate) != 0;
}

// Parallel Synchronization and Communication Instructions: bar, barrier (.sync)
__device__ __forceinline__ void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Parallel Synchronization and Communication Instructions: bar, barrier (.arrive)
__device__ __forceinline__ void bar_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Tensor cores

// Warp-level matrix instructions: ldmatrix
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

// Warp-level matrix instructions: ldmatrix (.trans)
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

// Matrix Fragments for mma.m16n8k16 with floating point type; Multiply-and-Accumulate Instruction:
// mma. d += a b.
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<Element, Float16>, "mma takes BFloat16 or Float16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// kTiles mma_m16n8k16 that share a: one call, so that the executor's lanes meet once for all.
template <class Element, int kTiles>
__device__ __forceinline__ void mma_m16n8k16_row(float (*d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (*b)[2]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) mma_m16n8k16<Element>(d[i], a, b[i]);
}

// ---- Scalar arithmetic

// Floating Point Instructions: ex2
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Floating Point Instructions: lg2
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The one function that is not an instruction: tanh.approx keeps only about 11 bits.
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }

// Data Movement and Conversion Instructions: cvt (.f16x2, .bf16x2). The instruction's first source
// becomes the upper half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  } else {
    static_assert(std::is_same_v<Element, Float16>, "pack makes BFloat16 or Float16 pairs");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  }
  return packed;
}

// A bfloat16 is the upper half of a float; cvt.f32.bf16 exists from sm_90 only.
__device__ __forceinline__ float to_float(BFloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

// Data Movement and Conversion Instructions: cvt
__device__ __forceinline__ float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ float to_float(float x) { return x; }

// Data Movement and Conversion Instructions: cvt (.rn)
template <class Element>
__device__ __forceinline__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return x;
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    BFloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  } else {
    static_assert(std::is_same_v<Element, Float16>, "from_float makes BFloat16, Float16 or float");
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
}

// A guard of memory accesses. The executor can force one to true, to prove that it is needed.
__device__ __forceinline__ bool predicate(bool p) { return p; }

// No instruction: the same value, of which the compiler knows nothing. What is computed from it
// inside a loop stays there, where hoisting would cost registers that the loop does not have.
template <class T>
__device__ __forceinline__ T opaque(T value) {
  static_assert(sizeof(T) == 4, "opaque takes a 32-bit register");
  asm volatile("" : "+r"(value));
  return value;
}

// ---- Launch

// The limit up to which a kernel may take dynamic shared memory without asking.
inline constexpr uint32_t kDefaultSmemBytes = 48 * 1024;

// Starts kernel(params) on the stream; returns a cudaError_t. The runtime also keeps an error for
// whoever asks next: it is taken back here, since the caller is told.
template <auto kernel, class Params>
Status launch(const LaunchConfig& config, Stream stream, const Params& params) {
  if (config.smem_bytes > kDefaultSmemBytes) {
    const auto limit = static_cast<int>(std::max(config.smem_bytes, config.smem_limit));
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (refused != cudaSuccess) {
      cudaGetLastError();
      return static_cast<Status>(refused);
    }
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.blocks;
  launch_config.blockDim = config.threads;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&launch_config, kernel, params);
  if (status != cudaSuccess) cudaGetLastError();
  return static_cast<Status>(status);
}

}  // namespace flashinfer_lite::arch
