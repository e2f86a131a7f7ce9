// The list of golden cases and their launch by name, the same for a GPU and the executor.
#pragma once

#include <string_view>

#include "cuda/kernels/golden/hopper.cuh"
#include "cuda/kernels/golden/math.cuh"
#include "cuda/kernels/golden/memory.cuh"
#include "cuda/kernels/golden/tensor.cuh"
#include "cuda/kernels/golden/warp.cuh"

namespace flashinfer_lite::golden {

template <class Case>
__global__ void __launch_bounds__(Case::threads) golden_case(const __grid_constant__ Params p) {
  Case::run(p);
}

template <class Case>
arch::Status launch_case(const Params& params, arch::Stream stream) {
  const arch::LaunchConfig config{Case::blocks, Case::threads, Case::smem_bytes};
  return arch::launch<golden_case<Case>>(config, stream, params);
}

struct Entry {
  std::string_view name;
  arch::Status (*launch)(const Params& params, arch::Stream stream);
};

inline constexpr Entry kEntries[] = {
    {"Indices", launch_case<Indices>},
    {"DynamicSmem", launch_case<DynamicSmem>},
    {"SyncWarp", launch_case<SyncWarp>},
    {"ShflXor", launch_case<ShflXor>},
    {"Shfl", launch_case<Shfl>},
    {"Vote", launch_case<Vote>},
    {"ElectOne", launch_case<ElectOne>},
    {"SyncThreads", launch_case<SyncThreads>},
    {"SyncThreadsOr", launch_case<SyncThreadsOr>},
    {"NamedBarriers", launch_case<NamedBarriers>},
    {"SharedAccess<1>", launch_case<SharedAccess<uint8_t>>},
    {"SharedAccess<2>", launch_case<SharedAccess<BFloat16>>},
    {"SharedAccess<4>", launch_case<SharedAccess<float>>},
    {"SharedAccess<8>", launch_case<SharedAccess<arch::U32x2>>},
    {"SharedAccess<16>", launch_case<SharedAccess<arch::U32x4>>},
    {"GlobalAccess<1>", launch_case<GlobalAccess<uint8_t>>},
    {"GlobalAccess<2>", launch_case<GlobalAccess<BFloat16>>},
    {"GlobalAccess<4>", launch_case<GlobalAccess<float>>},
    {"GlobalAccess<8>", launch_case<GlobalAccess<arch::U32x2>>},
    {"GlobalAccess<16>", launch_case<GlobalAccess<arch::U32x4>>},
    {"PrefetchL2", launch_case<PrefetchL2>},
    {"AtomicAdd<int32>", launch_case<AtomicAdd<int32_t>>},
    {"AtomicAdd<uint32>", launch_case<AtomicAdd<uint32_t>>},
    {"AtomicAdd<float>", launch_case<AtomicAdd<float>>},
    {"AtomicAdd64", launch_case<AtomicAdd64>},
    {"Ticket", launch_case<Ticket>},
    {"LastBlock", launch_case<LastBlock>},
    {"CpAsync", launch_case<CpAsync>},
    {"LdMatrix", launch_case<LdMatrix<false>>},
    {"LdMatrix<trans>", launch_case<LdMatrix<true>>},
    {"Mma<bfloat16>", launch_case<Mma<BFloat16>>},
    {"Mma<float16>", launch_case<Mma<Float16>>},
    {"MmaRow<bfloat16>", launch_case<MmaRow<BFloat16>>},
    {"MmaRow<float16>", launch_case<MmaRow<Float16>>},
    {"Exp2", launch_case<Exp2>},
    {"Log2", launch_case<Log2>},
    {"Tanh", launch_case<Tanh>},
    {"Pack<bfloat16>", launch_case<Pack<BFloat16>>},
    {"Pack<float16>", launch_case<Pack<Float16>>},
    {"ToFloat<bfloat16>", launch_case<ToFloat<BFloat16>>},
    {"ToFloat<float16>", launch_case<ToFloat<Float16>>},
    {"ToFloat<float32>", launch_case<ToFloat<float>>},
    {"FromFloat<bfloat16>", launch_case<FromFloat<BFloat16>>},
    {"FromFloat<float16>", launch_case<FromFloat<Float16>>},
    {"FromFloat<float32>", launch_case<FromFloat<float>>},
    {"Predicate", launch_case<Predicate>},
    {"Opaque", launch_case<Opaque>},
    {"Mbarrier", launch_case<Mbarrier>},
    {"MbarrierTestWait", launch_case<MbarrierTestWait>},
    {"TmaLoad", launch_case<TmaLoad>},
};

inline const Entry* find(std::string_view name) {
  for (const Entry& entry : kEntries) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

}  // namespace flashinfer_lite::golden
