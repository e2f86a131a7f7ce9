#include "cpu/kernels/table.h"

namespace flashinfer_lite::cpu {

const KernelTable* table_of(Level level) {
  switch (level) {
    case Level::kBaseline:
      return baseline_table();
#if defined(__x86_64__)
    case Level::kAvx2: {
      const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("f16c");
      return has ? avx2_table() : nullptr;
    }
    case Level::kAvx512: {
      const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
      return has ? avx512_table() : nullptr;
    }
#endif
    default:
      return nullptr;
  }
}

}  // namespace flashinfer_lite::cpu
