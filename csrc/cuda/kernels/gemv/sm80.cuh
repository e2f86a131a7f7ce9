// Matrix times vector, or a few of them, on CUDA cores:
//
//   out = x weight^T + bias      x [M, K], weight [N, K], out [M, N], M to about 4
//
// Bound by memory: each byte of the weight is read once, 16 at a time, straight into registers.
// Below about 4 rows the tensor cores' padding to 8 buys nothing, and neither does staging.
//
// A thread block owns block_n rows of the weight and block_m of x, and its threads walk along K
// side by side, 8 columns each. At the end the warps' sums are added by shuffles and the block's in
// shared memory, always in the same order. x is read again by each block, from the caches.
//
// Shared memory: the warps' sums.
#pragma once

#include <algorithm>

#include "common/params/flat_linear_cuda.h"
#include "cuda/tile/ragged.cuh"

namespace flashinfer_lite::gemv {

using Params = CudaFlatLinearParams;

template <class Cfg>
struct Traits {
  using Element = typename Cfg::Element;
  static constexpr int num_threads = Cfg::num_warps * 32;
  static constexpr int sums = Cfg::block_m * Cfg::block_n;  // [block_m, block_n] of each thread
  static constexpr int smem_bytes = Cfg::num_warps * sums * 4;
  // As many as the registers allow: each has 8 or 16 KB of the weight under way.
  static constexpr int blocks_per_sm = sums <= 4 ? 8 : sums <= 16 ? 4 : 3;
  static_assert(sums <= 32 && 32 % sums == 0, "a warp's lanes share its sums out evenly");
};

// What a thread block works on.
template <class Cfg>
struct Block {
  using Element = typename Cfg::Element;

  __device__ __forceinline__ Block(const Params& params, uint32_t block)
      : p(params), thread(arch::thread_idx()) {
    const auto num_m_blocks = static_cast<uint32_t>(p.num_m_blocks);
    first_m = static_cast<int>(block % num_m_blocks) * Cfg::block_m;
    first_n = static_cast<int>(block / num_m_blocks) * Cfg::block_n;
    // A row that does not exist is the last one again: what comes of it is not stored.
    const int last_m = static_cast<int>(p.m) - 1, last_n = static_cast<int>(p.n) - 1;
#pragma unroll
    for (int m = 0; m < Cfg::block_m; ++m) {
      x[m] = static_cast<const Element*>(p.x) + std::min(first_m + m, last_m) * p.x_row;
    }
#pragma unroll
    for (int n = 0; n < Cfg::block_n; ++n) {
      weight[n] =
          static_cast<const Element*>(p.weight) + std::min(first_n + n, last_n) * p.weight_row;
    }
  }

  const Params& p;
  int thread;
  int first_m, first_n;
  const Element* x[Cfg::block_m];
  const Element* weight[Cfg::block_n];
};

template <class Element>
__device__ __forceinline__ void unpack(const arch::U32x4& from, float (&to)[8]) {
  const uint32_t word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = arch::to_float(Element{static_cast<uint16_t>(word[i])});
    to[2 * i + 1] = arch::to_float(Element{static_cast<uint16_t>(word[i] >> 16)});
  }
}

// Adds eight columns' products to all sums.
template <class Cfg>
__device__ __forceinline__ void add_products(const arch::U32x4 (&x)[Cfg::block_m],
                                             const arch::U32x4 (&weight)[Cfg::block_n],
                                             float (&sum)[Traits<Cfg>::sums]) {
  using Element = typename Cfg::Element;
  float a[Cfg::block_m][8];
#pragma unroll
  for (int m = 0; m < Cfg::block_m; ++m) unpack<Element>(x[m], a[m]);
#pragma unroll
  for (int n = 0; n < Cfg::block_n; ++n) {
    float w[8];
    unpack<Element>(weight[n], w);
#pragma unroll
    for (int m = 0; m < Cfg::block_m; ++m) {
      float& s = sum[m * Cfg::block_n + n];
#pragma unroll
      for (int i = 0; i < 8; ++i) s = fmaf(w[i], a[m][i], s);
    }
  }
}

template <class Element>
__device__ __forceinline__ arch::U32x4 load_chunk(const Element* p) {
  return arch::ldg(reinterpret_cast<const arch::U32x4*>(p));
}

// The thread's columns: 8 at a time, whole ones where every row begins on 16 bytes. What is left
// over, or lies at any address, comes element by element.
template <class Cfg>
__device__ __forceinline__ void accumulate(const Block<Cfg>& b, float (&sum)[Traits<Cfg>::sums]) {
  using T = Traits<Cfg>;
  constexpr int kColumns = 8;  // of a thread at a time: 16 bytes
  constexpr int kStep = T::num_threads * kColumns;
  const auto end = static_cast<int>(b.p.k);
#pragma unroll
  for (int i = 0; i < T::sums; ++i) sum[i] = 0.f;
  arch::U32x4 x[Cfg::block_m];
  arch::U32x4 weight[Cfg::block_n];
  int k = b.thread * kColumns;
  if (b.p.vector_x && b.p.vector_weight) {
#pragma unroll 1
    for (; k + kColumns <= end; k += kStep) {
#pragma unroll
      for (int n = 0; n < Cfg::block_n; ++n) weight[n] = load_chunk(b.weight[n] + k);
#pragma unroll
      for (int m = 0; m < Cfg::block_m; ++m) x[m] = load_chunk(b.x[m] + k);
      add_products<Cfg>(x, weight, sum);
    }
  }
#pragma unroll 1
  for (; k < end; k += kStep) {
    const int left = std::min(end - k, kColumns);
#pragma unroll
    for (int n = 0; n < Cfg::block_n; ++n) weight[n] = tile::load_ragged(b.weight[n] + k, left);
#pragma unroll
    for (int m = 0; m < Cfg::block_m; ++m) x[m] = tile::load_ragged(b.x[m] + k, left);
    add_products<Cfg>(x, weight, sum);
  }
}

// Adds each sum over the lanes of the warp: at every distance lanes give half of what they hold for
// half of what the other holds, until each has one, which then goes on as it is. Lane l ends with
// sum l / (32 / kSums).
template <int kDistance, int kHeld>
__device__ __forceinline__ float add_lanes(float (&sum)[kHeld], int lane) {
  if constexpr (kDistance == 0) {
    return sum[0];
  } else if constexpr (kHeld == 1) {
    sum[0] += arch::shfl_xor(sum[0], kDistance);
    return add_lanes<kDistance / 2>(sum, lane);
  } else {
    const bool upper = (lane & kDistance) != 0;
    float half[kHeld / 2];
#pragma unroll
    for (int i = 0; i < kHeld / 2; ++i) {
      const float given = upper ? sum[i] : sum[i + kHeld / 2];
      const float kept = upper ? sum[i + kHeld / 2] : sum[i];
      half[i] = kept + arch::shfl_xor(given, kDistance);
    }
    return add_lanes<kDistance / 2>(half, lane);
  }
}

// Adds up the warps' sums in their order, one a thread, and stores them with the bias.
template <class Cfg>
__device__ __forceinline__ void store_out(const Block<Cfg>& b, uint32_t warp_sums) {
  using T = Traits<Cfg>;
  using Element = typename Cfg::Element;
  const int m = b.first_m + b.thread / Cfg::block_n;
  const int n = b.first_n + b.thread % Cfg::block_n;
  if (b.thread >= T::sums || !arch::predicate(m < b.p.m && n < b.p.n)) return;
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < Cfg::num_warps; ++warp) {
    sum += arch::lds<float>(warp_sums + static_cast<uint32_t>((warp * T::sums + b.thread) * 4));
  }
  if (b.p.bias != nullptr) {
    sum += arch::to_float(arch::ldg(static_cast<const Element*>(b.p.bias) + n));
  }
  arch::stg(static_cast<Element*>(b.p.out) + m * b.p.out_row + n, arch::from_float<Element>(sum));
}

template <class Cfg>
__global__ void __launch_bounds__(Traits<Cfg>::num_threads, Traits<Cfg>::blocks_per_sm)
    gemv_sm80(const __grid_constant__ Params p) {
  using T = Traits<Cfg>;
  const Block<Cfg> b(p, static_cast<uint32_t>(arch::block_idx()));
  float sum[T::sums];
  accumulate(b, sum);
  const int lane = b.thread % 32;
  const float of_warp = add_lanes<16>(sum, lane);
  constexpr int kLanesPerSum = 32 / T::sums;
  if (lane % kLanesPerSum == 0) {
    const int at = b.thread / 32 * T::sums + lane / kLanesPerSum;
    arch::sts(arch::dynamic_smem() + static_cast<uint32_t>(at * 4), of_warp);
  }
  arch::sync_threads();  // every warp's sums are there
  store_out(b, arch::dynamic_smem());
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = gemv::Params;
  static constexpr int smem_bytes = Traits<Cfg>::smem_bytes;

  static Status launch(const Params& p, Stream stream) {
    const int64_t blocks = p.num_m_blocks * p.num_n_blocks;
    const LaunchConfig config{static_cast<uint32_t>(blocks), Traits<Cfg>::num_threads, smem_bytes};
    return arch::launch<gemv_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::gemv
