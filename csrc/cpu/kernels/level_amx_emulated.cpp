// For tests on a processor without AMX: the amx level's kernels on emulated tiles.
#include "cpu/kernels/prelude.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FIL_CPU_LEVEL amx_emulated
#define FIL_VECTOR_BYTES 32
#include "cpu/isa/avx2.h"
// avx2.h first: the emulation multiplies with its fma.
#include "cpu/isa/amx_emulation.h"
#include "cpu/kernels/tile_kernels.h"
#pragma GCC pop_options
#endif

namespace flashinfer_lite::cpu {

const KernelTable* amx_emulated_table() {
#if defined(__x86_64__)
  static const KernelTable table = amx_emulated::with_tiles<avx2_table>();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace flashinfer_lite::cpu
