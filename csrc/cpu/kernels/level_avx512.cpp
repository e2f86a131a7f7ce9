#include "cpu/kernels/prelude.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
// GCC 12's own AVX-512 header starts its don't-care operands uninitialised and then warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FIL_CPU_LEVEL avx512
#define FIL_VECTOR_BYTES 64
#include "cpu/isa/avx512.h"
#include "cpu/kernels/kernels.h"
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif

namespace flashinfer_lite::cpu {

const KernelTable* avx512_table() {
#if defined(__x86_64__)
  // fp64 gains little from 64-byte vectors: it runs at the AVX2 level.
  static const KernelTable table = {avx2_table()->float64, avx512::kernels_of<float>(),
                                    avx512::kernels_of<BFloat16>(), avx512::kernels_of<Float16>()};
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace flashinfer_lite::cpu
