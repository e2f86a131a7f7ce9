#include "ops/runtime_cpu.h"

namespace flashinfer_lite {
namespace {

std::string levels_present(int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    if (!cpu::table_of(static_cast<cpu::Level>(i))) continue;
    if (!text.empty()) text += ' ';
    text += cpu::kLevelNames[i];
  }
  return text;
}

// Index of a level present by name. `source` is what the name came from.
int level_named(const std::string& name, const char* source) {
  for (int i = 0; i < cpu::kNumLevelsWithTests; ++i) {
    if (name == cpu::kLevelNames[i] && cpu::table_of(static_cast<cpu::Level>(i))) return i;
  }
  fail(source, ": expected one of the levels present (", levels_present(cpu::kNumLevels), "), got ",
       name);
}

int default_level() {
  if (const char* name = std::getenv("FLASHINFER_LITE_ISA"); name && *name) {
    return level_named(name, "FLASHINFER_LITE_ISA");
  }
  int best = 0;
  for (int i = 0; i < cpu::kNumLevels; ++i) {
    const auto level = static_cast<cpu::Level>(i);
    if (cpu::table_of(level) && cpu::is_fast(level)) best = i;
  }
  return best;
}

std::atomic<int> level_in_force{-1};
std::atomic<int64_t> calls{0}, rows_checked{0}, rows_recomputed{0};

int current_level() {
  int level = level_in_force.load(std::memory_order_relaxed);
  if (level < 0) {
    level = default_level();
    level_in_force.store(level, std::memory_order_relaxed);
  }
  return level;
}

// cpu_isa(name=None) -> str: the level in force, after switching to `name` ("" is the default).
std::string cpu_isa(std::optional<std::string> name) {
  if (name) level_in_force = name->empty() ? default_level() : level_named(*name, "cpu_isa");
  return cpu::kLevelNames[current_level()];
}

// cpu_isas(with_tests=False) -> str: the levels present; with those that only tests ask for, too.
std::string cpu_isas(bool with_tests) {
  return levels_present(with_tests ? cpu::kNumLevelsWithTests : cpu::kNumLevels);
}

// stats(reset) -> int64 [calls, rows_checked, rows_recomputed].
Tensor stats(bool reset) {
  Tensor out = torch::stable::empty({3}, ScalarType::Long);
  int64_t* values = static_cast<int64_t*>(out.data_ptr());
  for (std::atomic<int64_t>* counter : {&calls, &rows_checked, &rows_recomputed}) {
    *values++ = reset ? counter->exchange(0) : counter->load();
  }
  return out;
}

}  // namespace

const cpu::Kernels& cpu_kernels(ScalarType element) {
  const cpu::KernelTable& table = *cpu::table_of(static_cast<cpu::Level>(current_level()));
  switch (element) {
    case ScalarType::Double:
      return table.float64;
    case ScalarType::Float:
      return table.float32;
    case ScalarType::BFloat16:
      return table.bfloat16;
    case ScalarType::Half:
      return table.float16;
    default:
      fail("expected a floating point dtype, got ", dtype_text(element));
  }
}

void count_call() { calls.fetch_add(1, std::memory_order_relaxed); }

void count_rows(int64_t checked, int64_t recomputed) {
  rows_checked.fetch_add(checked, std::memory_order_relaxed);
  rows_recomputed.fetch_add(recomputed, std::memory_order_relaxed);
}

}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", FIL_BOX(flashinfer_lite::cpu_isa));
  m.impl("cpu_isas", FIL_BOX(flashinfer_lite::cpu_isas));
  m.impl("stats", FIL_BOX(flashinfer_lite::stats));
}
