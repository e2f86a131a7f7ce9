// For tests on a processor without AVX512-BF16: that level's kernels on emulated products.
#include "cpu/kernels/prelude.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FIL_CPU_LEVEL avx512_bf16_emulated
#define FIL_VECTOR_BYTES 32
#include "cpu/isa/avx2.h"
// avx2.h first: the emulation multiplies with its fma.
#include "cpu/isa/avx512_bf16_emulation.h"
#include "cpu/isa/dot_tiles.h"
#include "cpu/kernels/tile_kernels.h"
#pragma GCC pop_options
#endif

namespace flashinfer_lite::cpu {

const KernelTable* avx512_bf16_emulated_table() {
#if defined(__x86_64__)
  static const KernelTable table = avx512_bf16_emulated::with_tiles<avx2_table>();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace flashinfer_lite::cpu
