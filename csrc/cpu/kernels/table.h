// The table of compiled CPU kernels: one row per level and element type.
#pragma once

#include <cstdint>

#include "common/params/append_kv.h"
#include "common/params/attention.h"
#include "common/params/flat_linear.h"

namespace flashinfer_lite::cpu {

// A kernel runs one task at a time on one worker's scratch; any order, any worker.
template <class Params>
struct Kernel {
  int64_t (*tasks)(const Params&) = nullptr;
  int64_t (*scratch)(const Params&) = nullptr;  // bytes
  void (*run)(const Params&, int64_t task, void* scratch) = nullptr;
};

struct Kernels {
  CpuForwardPlan (*forward_plan)(const AttentionParams&);  // the choices of attention_fwd
  Kernel<AttentionFwdParams> attention_fwd;
  Kernel<AttentionBwdParams> attention_bwd;
  Kernel<CombineParams> combine;
  Kernel<AttentionFwdParams> unified_merge;
  Kernel<AppendKvParams> append_kv;
  Kernel<FlatLinearParams> gemv, flat_gemm;  // not for float64
};

struct KernelTable {
  Kernels float64, float32, bfloat16, float16;
};

// Ascending: where nothing is asked for, the highest runs whose table is not null, that the
// processor has and that is_fast there. Behind them are levels for tests, which run only where they
// are asked for by name.
enum class Level : int {
  kBaseline,
  kAvx2,
  kAvx512,
  kAvx512Bf16,
  kAmx,
  kAvx512Bf16Emulated,
  kAmxEmulated
};
constexpr int kNumLevels = 5;  // to choose from
constexpr int kNumLevelsWithTests = 7;
constexpr const char* kLevelNames[kNumLevelsWithTests] = {
    "baseline", "avx2", "avx512", "avx512-bf16", "amx", "avx512-bf16-emulated", "amx-emulated"};

// Null where they are not compiled in.
const KernelTable* baseline_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* avx512_bf16_table();
const KernelTable* amx_table();
const KernelTable* avx512_bf16_emulated_table();
const KernelTable* amx_emulated_table();

// The level's table if this build has it and this processor can run it, else null.
const KernelTable* table_of(Level level);

// Whether a level that this processor can run is faster here than those below it.
bool is_fast(Level level);

}  // namespace flashinfer_lite::cpu
