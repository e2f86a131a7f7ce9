#include "cpu/kernels/table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashinfer_lite::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
#if defined(__linux__)
  if (!has_avx512_bf16() || !__builtin_cpu_supports("amx-tile") ||
      !__builtin_cpu_supports("amx-bf16")) {
    return false;
  }
  // The tiles' 8 KB of state per thread are the kernel's to grant, once and for all threads.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

}  // namespace

const KernelTable* table_of(Level level) {
  switch (level) {
    case Level::kBaseline:
      return baseline_table();
#if defined(__x86_64__)
    case Level::kAvx2:
      return has_avx2() ? avx2_table() : nullptr;
    case Level::kAvx512:
      return has_avx512() ? avx512_table() : nullptr;
    case Level::kAvx512Bf16:
      return has_avx512_bf16() ? avx512_bf16_table() : nullptr;
    case Level::kAmx:
      return has_amx() ? amx_table() : nullptr;
    case Level::kAvx512Bf16Emulated:
      return has_avx2() ? avx512_bf16_emulated_table() : nullptr;
    case Level::kAmxEmulated:
      return has_avx2() ? amx_emulated_table() : nullptr;
#endif
    default:
      return nullptr;
  }
}

bool is_fast([[maybe_unused]] Level level) {
#if defined(__x86_64__)
  // Intel's cores multiply pairs of bfloat16 more slowly than float32: docs/kernels/cpu.md.
  if (level == Level::kAvx512Bf16) return !__builtin_cpu_is("intel");
#endif
  return true;
}

}  // namespace flashinfer_lite::cpu
