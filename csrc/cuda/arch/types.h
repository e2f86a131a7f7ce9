// Types shared by the two sides of the wrapper layer.
#pragma once

#include <cstdint>

namespace flashinfer_lite {

struct alignas(8) U32x2 {
  uint32_t x, y;
};

struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};

inline constexpr uint32_t kFullMask = 0xffffffffu;

using Stream = void*;  // a cudaStream_t; the executor ignores it
using Status = int;    // 0 = success; on a GPU a cudaError_t

// Grids and blocks are one-dimensional everywhere.
struct LaunchConfig {
  uint32_t blocks;
  uint32_t threads;
  uint32_t smem_bytes;  // dynamic shared memory per block
  // The most that any launch of the kernel takes, where they differ. The driver keeps one limit for
  // the kernel: lowered by one launch, it would refuse a larger one that another thread is making.
  uint32_t smem_limit = 0;
};

// A CUtensorMap, encoded by the driver or by the executor; opaque to kernels.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

namespace arch {
using flashinfer_lite::kFullMask;
using flashinfer_lite::LaunchConfig;
using flashinfer_lite::Status;
using flashinfer_lite::Stream;
using flashinfer_lite::TensorMap;
using flashinfer_lite::U32x2;
using flashinfer_lite::U32x4;
}  // namespace arch

}  // namespace flashinfer_lite
