// Golden cases that need Hopper.
#pragma once

#include "cuda/kernels/golden/case.cuh"

namespace flashinfer_lite::golden {

// in: 3 rounds of 64 words. out: the words as read across the barrier.
struct Mbarrier : OneWarp {
  static constexpr uint32_t threads = 2 * kWarpSize;

  static __device__ void run(const Params& p) {
    const int thread = arch::thread_idx();
    const uint32_t barrier = arch::dynamic_smem();
    const uint32_t words = barrier + 1024;
    if (thread == 0) arch::mbarrier_init(barrier, threads);
    arch::fence_mbarrier_init();
    arch::sync_threads();  // the barrier is initialised
    for (int phase = 0; phase < 3; ++phase) {
      const int begin = phase * static_cast<int>(threads);
      const int source = static_cast<int>(threads) - 1 - thread;
      arch::sts(words + 4 * (begin + thread), read(p, begin + thread));
      arch::mbarrier_arrive(barrier);
      arch::mbarrier_wait(barrier, static_cast<uint32_t>(phase % 2));
      write(p, begin + thread, arch::lds<uint32_t>(words + 4 * (begin + source)));
    }
  }
};

// out: tests of either parity during the first phase, and during the second.
struct MbarrierTestWait : OneWarp {
  static __device__ void run(const Params& p) {
    if (arch::thread_idx() != 0) return;
    const uint32_t barrier = arch::dynamic_smem();
    arch::mbarrier_init(barrier, 1);
    for (int phase = 0; phase < 2; ++phase) {
      write(p, 2 * phase, arch::mbarrier_test_wait(barrier, 0));
      write(p, 2 * phase + 1, arch::mbarrier_test_wait(barrier, 1));
      arch::mbarrier_arrive(barrier);
    }
  }
};

// A box of 8 rows of 128 bytes, swizzled by 128 bytes. in: the coordinates of three copies, then
// (from word 64) the matrix that the map describes. out: the shared memory after each copy.
struct TmaLoad : OneWarp {
  static constexpr int kBoxRows = 8;
  static constexpr int kBoxCols = 32;
  static constexpr int kBoxBytes = 4 * kBoxRows * kBoxCols;

  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const uint32_t box = arch::dynamic_smem();
    const uint32_t barrier = box + kBoxBytes;
    if (lane == 0) arch::mbarrier_init(barrier, 1);
    arch::fence_mbarrier_init();
    for (uint32_t copy = 0; copy < 3; ++copy) {
      for (int i = lane; i < kBoxRows * kBoxCols; i += kWarpSize) arch::sts(box + 4 * i, ~0u);
      arch::fence_proxy_async();  // my stores before the copy's
      arch::sync_warp();          // those of all lanes
      if (lane == 0) {
        const int c0 = static_cast<int>(read(p, 2 * copy));
        const int c1 = static_cast<int>(read(p, 2 * copy + 1));
        arch::mbarrier_arrive_expect_tx(barrier, kBoxBytes);
        arch::tma_load_2d(box, &p.map, c0, c1, barrier);
      }
      arch::mbarrier_wait(barrier, copy % 2);
      for (int i = lane; i < kBoxRows * kBoxCols; i += kWarpSize) {
        const int begin = static_cast<int>(copy) * kBoxRows * kBoxCols;
        write(p, begin + i, arch::lds<uint32_t>(box + 4 * i));
      }
      arch::sync_warp();  // all have read before the next round overwrites
    }
  }
};

}  // namespace flashinfer_lite::golden
