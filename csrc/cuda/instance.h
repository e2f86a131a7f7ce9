// One compiled kernel: what the host code that chooses among them needs to know. The instances are
// generated from the table in csrc/instances.py.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/arch/types.h"

namespace flashinfer_lite::cuda {

enum class ElementType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// A field that means nothing to a kernel is 0: combine has no tile.
struct Instance {
  const char* name = nullptr;
  const char* kernel = nullptr;
  int arch = 0;  // 80 runs on every later one too; 90 on compute capability 9.0 alone
  ElementType element = ElementType::kFloat32;
  ElementType partial = ElementType::kFloat32;  // of the partial results, combine only
  int head_dim = 0;
  int block_m = 0;
  int block_n = 0;
  int block_k = 0;
  int num_warps = 0;
  int num_stages = 0;
  int smem_bytes = 0;  // dynamic shared memory of a block
  Status (*launch)(const void* params, Stream stream) = nullptr;  // params: the kernel's own Params
};

template <class Kernel>
Status launch_erased(const void* params, Stream stream) {
  return Kernel::launch(*static_cast<const typename Kernel::Params*>(params), stream);
}

// Completes the fields of a row with what its kernel knows.
template <class Kernel>
constexpr Instance make_instance(Instance row) {
  row.smem_bytes = Kernel::smem_bytes;
  row.launch = &launch_erased<Kernel>;
  return row;
}

extern const Instance* const kInstances[];
extern const int kNumInstances;

}  // namespace flashinfer_lite::cuda
