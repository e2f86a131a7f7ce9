#include "cpu/kernels/prelude.h"

#define FIL_CPU_LEVEL baseline
#define FIL_VECTOR_BYTES 16
#include "cpu/isa/baseline.h"
#include "cpu/kernels/kernels.h"

namespace flashinfer_lite::cpu {

const KernelTable* baseline_table() {
  static constexpr KernelTable table = {
      baseline::kernels_of<double>(), baseline::kernels_of<float>(),
      baseline::kernels_of<BFloat16>(), baseline::kernels_of<Float16>()};
  return &table;
}

}  // namespace flashinfer_lite::cpu
