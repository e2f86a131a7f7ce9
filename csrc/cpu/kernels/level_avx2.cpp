#include "cpu/kernels/prelude.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FIL_CPU_LEVEL avx2
#define FIL_VECTOR_BYTES 32
#include "cpu/isa/avx2.h"
#include "cpu/kernels/kernels.h"
#pragma GCC pop_options
#endif

namespace flashinfer_lite::cpu {

const KernelTable* avx2_table() {
#if defined(__x86_64__)
  static constexpr KernelTable table = {avx2::kernels_of<double>(), avx2::kernels_of<float>(),
                                        avx2::kernels_of<BFloat16>(), avx2::kernels_of<Float16>()};
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace flashinfer_lite::cpu
