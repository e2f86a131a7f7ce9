// Small kernels that test the executor. Each is right as it stands; a variant, named in words,
// plants a defect in it or rewrites it in another right way. Python knows what to expect of which.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "cuda/arch/arch.cuh"

namespace flashinfer_lite::simt::selftest {

inline constexpr int kWords = 1024;  // of each buffer, and of a case's shared memory
inline constexpr uint32_t kSmemBytes = 4 * kWords;
inline constexpr int kWarpSize = 32;
inline constexpr int kMapColumns = 32;  // of `in` as a matrix of words

struct Params {
  const uint32_t* in;      // read-only
  uint32_t* out;           // nothing may be read before it is written
  uint32_t* state;         // zeros
  int number;              // what a case makes of it
  TensorMap map;           // of `in`
  TensorMap map_too_long;  // claims a row more than `in` has
  std::string_view variant;

  bool is(std::string_view name) const;
};

struct Case {
  std::string_view name;
  LaunchConfig config;
  Status (*launch)(const LaunchConfig& config, const Params& params);
};

template <auto kernel>
constexpr Case make_case(std::string_view name, uint32_t threads, uint32_t blocks = 1) {
  const auto launch = [](const LaunchConfig& config, const Params& params) {
    return arch::launch<kernel>(config, nullptr, params);
  };
  return {name, {blocks, threads, kSmemBytes}, launch};
}

// One list per file.
std::span<const Case> barrier_cases();
std::span<const Case> warp_cases();
std::span<const Case> mbarrier_cases();
std::span<const Case> tma_cases();
std::span<const Case> cp_async_cases();
std::span<const Case> memory_cases();
std::span<const Case> grid_cases();
std::span<const Case> counter_cases();
std::span<const Case> tensor_cases();
std::span<const Case> raw_cases();

inline int warp_idx() { return arch::thread_idx() / kWarpSize; }
inline int lane_idx() { return arch::thread_idx() % kWarpSize; }
inline uint32_t word_address(int i) { return arch::dynamic_smem() + 4 * static_cast<uint32_t>(i); }

}  // namespace flashinfer_lite::simt::selftest
