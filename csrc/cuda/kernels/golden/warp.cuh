// Golden cases: indices, and what the threads of a warp or block do together.
#pragma once

#include "cuda/kernels/golden/case.cuh"

namespace flashinfer_lite::golden {

struct Indices : OneWarp {
  static constexpr uint32_t blocks = 3;
  static constexpr uint32_t threads = 2 * kWarpSize;

  static __device__ void run(const Params& p) {
    const int thread = arch::block_idx() * static_cast<int>(threads) + arch::thread_idx();
    write(p, 3 * thread, static_cast<uint32_t>(arch::thread_idx()));
    write(p, 3 * thread + 1, static_cast<uint32_t>(arch::block_idx()));
    write(p, 3 * thread + 2, static_cast<uint32_t>(arch::num_blocks()));
  }
};

// More shared memory than a kernel gets unasked, used up to its last word.
struct DynamicSmem : OneWarp {
  static constexpr uint32_t smem_bytes = 64 * 1024;

  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    const uint32_t last_words = smem + smem_bytes - 4 * kWarpSize;
    arch::sts(last_words + 4 * lane, read(p, lane));
    arch::sync_warp();  // the words were written by other lanes
    write(p, lane, smem % 1024);
    write(p, kWarpSize + lane, arch::lds<uint32_t>(last_words + 4 * (kWarpSize - 1 - lane)));
  }
};

// The halves of a warp exchange words, each under its own mask.
struct SyncWarp : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    arch::sts(smem + 4 * lane, read(p, lane));
    arch::sync_warp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
    write(p, lane, arch::lds<uint32_t>(smem + 4 * (lane ^ 15)));
    arch::sync_warp();  // all have read
    arch::sts(smem + 4 * lane, read(p, kWarpSize + lane));
    arch::sync_warp();  // all have written
    write(p, kWarpSize + lane, arch::lds<uint32_t>(smem + 4 * (lane ^ 31)));
  }
};

// in: 32 words, then 6 masks.
struct ShflXor : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    for (int i = 0; i < 6; ++i) {
      const int mask = static_cast<int>(read(p, kWarpSize + i));
      write(p, 2 * i * kWarpSize + lane, arch::shfl_xor(read(p, lane), mask));
      write_float(p, (2 * i + 1) * kWarpSize + lane, arch::shfl_xor(read_float(p, lane), mask));
    }
  }
};

// in: 32 words, then twice the source lane of each lane.
struct Shfl : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    for (int i = 0; i < 2; ++i) {
      const int source = static_cast<int>(read(p, (1 + i) * kWarpSize + lane));
      write(p, 2 * i * kWarpSize + lane, arch::shfl(read(p, lane), source));
      write_float(p, (2 * i + 1) * kWarpSize + lane, arch::shfl(read_float(p, lane), source));
    }
  }
};

// in: 5 rounds of 32 predicates.
struct Vote : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    for (int i = 0; i < 5; ++i) {
      const bool mine = read(p, i * kWarpSize + lane) != 0;
      write(p, 3 * i * kWarpSize + lane, arch::ballot(mine));
      write(p, (3 * i + 1) * kWarpSize + lane, arch::any(mine));
      write(p, (3 * i + 2) * kWarpSize + lane, arch::all(mine));
    }
  }
};

// Which lane is elected is not ours to know: the output is how many are.
struct ElectOne : OneWarp {
  static __device__ void run(const Params& p) {
    const uint32_t elected = arch::ballot(arch::elect_one());
    write(p, arch::thread_idx(), static_cast<uint32_t>(std::popcount(elected)));
  }
};

// Two exchanges through the same words; in: twice 128 words.
struct SyncThreads : FourWarps {
  static __device__ void run(const Params& p) {
    constexpr int kThreads = static_cast<int>(threads);
    const int thread = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    for (int i = 0; i < 2; ++i) {
      arch::sts(smem + 4 * thread, read(p, i * kThreads + thread));
      arch::sync_threads();  // all have written
      const int source = (thread * 37 + 11) % kThreads;
      write(p, i * kThreads + thread, arch::lds<uint32_t>(smem + 4 * source));
      arch::sync_threads();  // all have read
    }
  }
};

// in: 4 rounds of 128 predicates.
struct SyncThreadsOr : FourWarps {
  static __device__ void run(const Params& p) {
    constexpr int kThreads = static_cast<int>(threads);
    const int thread = arch::thread_idx();
    for (int i = 0; i < 4; ++i) {
      const bool mine = read(p, i * kThreads + thread) != 0;
      write(p, i * kThreads + thread, arch::sync_threads_or(mine));
    }
  }
};

// Two warps produce, two consume; in: two rounds of 64 words. Producers do not wait when they
// announce words (arrive on kFull), nor consumers when they are done with them (arrive on kEmpty).
struct NamedBarriers : FourWarps {
  enum Barrier : uint32_t { kFull = 1, kEmpty = 2, kConsumers = 3 };

  static __device__ void run(const Params& p) {
    constexpr int kHalf = static_cast<int>(threads) / 2;
    const int thread = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    if (thread < kHalf) {
      arch::sts(smem + 4 * thread, read(p, thread));
      arch::bar_arrive(kFull, threads);
      arch::bar_sync(kEmpty, threads);  // the first words have been read
      arch::sts(smem + 4 * thread, read(p, kHalf + thread));
      arch::bar_arrive(kFull, threads);
      return;
    }
    const int consumer = thread - kHalf;
    const int source = kHalf - 1 - consumer;
    arch::bar_sync(kFull, threads);
    write(p, consumer, arch::lds<uint32_t>(smem + 4 * source));
    arch::bar_arrive(kEmpty, threads);
    arch::bar_sync(kFull, threads);
    const uint32_t second = arch::lds<uint32_t>(smem + 4 * source);
    arch::bar_sync(kConsumers, kHalf);  // among the consumers alone: all have read
    arch::sts(smem + 4 * consumer, second);
    arch::bar_sync(kConsumers, kHalf);  // all have written
    write(p, kHalf + consumer, arch::lds<uint32_t>(smem + 4 * ((consumer + 5) % kHalf)));
  }
};

}  // namespace flashinfer_lite::golden
