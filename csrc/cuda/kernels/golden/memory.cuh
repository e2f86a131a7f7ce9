// Golden cases: loads, stores, atomics and asynchronous copies.
#pragma once

#include "cuda/kernels/golden/case.cuh"

namespace flashinfer_lite::golden {

// A T travels as one word, or as as many as it fills; unused bits of the word are zero.
template <class T>
inline constexpr int kWordsOf = sizeof(T) < 4 ? 1 : static_cast<int>(sizeof(T)) / 4;

template <class T>
__device__ __forceinline__ T assemble(const Params& p, int i) {
  if constexpr (sizeof(T) == 1) {
    return std::bit_cast<T>(static_cast<uint8_t>(read(p, i)));
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(static_cast<uint16_t>(read(p, i)));
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(read(p, i));
  } else if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(arch::U32x2{read(p, i), read(p, i + 1)});
  } else {
    return std::bit_cast<T>(
        arch::U32x4{read(p, i), read(p, i + 1), read(p, i + 2), read(p, i + 3)});
  }
}

template <class T>
__device__ __forceinline__ void disassemble(const Params& p, int i, T value) {
  if constexpr (sizeof(T) == 1) {
    write(p, i, std::bit_cast<uint8_t>(value));
  } else if constexpr (sizeof(T) == 2) {
    write(p, i, std::bit_cast<uint16_t>(value));
  } else if constexpr (sizeof(T) == 4) {
    write(p, i, std::bit_cast<uint32_t>(value));
  } else if constexpr (sizeof(T) == 8) {
    const auto words = std::bit_cast<arch::U32x2>(value);
    write(p, i, words.x);
    write(p, i + 1, words.y);
  } else {
    const auto words = std::bit_cast<arch::U32x4>(value);
    write(p, i, words.x);
    write(p, i + 1, words.y);
    write(p, i + 2, words.z);
    write(p, i + 3, words.w);
  }
}

// in: a T of each lane, then the words of 32 Ts in memory. out: the words that the stored Ts make
// in memory, then the Ts loaded from the words.
template <class T>
struct SharedAccess : OneWarp {
  static __device__ void run(const Params& p) {
    constexpr int kMemoryWords = static_cast<int>(sizeof(T)) * kWarpSize / 4;
    const int lane = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    const uint32_t mine = smem + static_cast<uint32_t>(sizeof(T)) * lane;
    arch::sts(mine, assemble<T>(p, kWordsOf<T> * lane));
    arch::sync_warp();  // all have written
    for (int i = lane; i < kMemoryWords; i += kWarpSize) {
      write(p, i, arch::lds<uint32_t>(smem + 4 * i));
    }
    arch::sync_warp();  // all have read
    for (int i = lane; i < kMemoryWords; i += kWarpSize) {
      arch::sts(smem + 4 * i, read(p, kWordsOf<T> * kWarpSize + i));
    }
    arch::sync_warp();  // all have written
    disassemble(p, kMemoryWords + kWordsOf<T> * lane, arch::lds<T>(mine));
  }
};

// As SharedAccess; the words in memory are those of the buffers themselves.
template <class T>
struct GlobalAccess : OneWarp {
  static __device__ void run(const Params& p) {
    constexpr int kMemoryWords = static_cast<int>(sizeof(T)) * kWarpSize / 4;
    const int lane = arch::thread_idx();
    const auto* source = reinterpret_cast<const T*>(p.in + kWordsOf<T> * kWarpSize);
    arch::stg(reinterpret_cast<T*>(p.out) + lane, assemble<T>(p, kWordsOf<T> * lane));
    disassemble(p, kMemoryWords + kWordsOf<T> * lane, arch::ldg(source + lane));
  }
};

// A prefetch changes nothing that a program can see.
struct PrefetchL2 : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    arch::prefetch_l2(p.in + lane);
    write(p, lane, read(p, lane));
  }
};

// in: a T of each lane. out: two sums, started from what they hold; from word 32 the old values
// that the lanes got from the first, one lane after the other. All lanes add to the second at once.
template <class T>
struct AtomicAdd : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    T* sums = reinterpret_cast<T*>(p.out);
    const T value = std::bit_cast<T>(read(p, lane));
    for (int i = 0; i < kWarpSize; ++i) {
      if (lane == i) {
        const T old = arch::atomic_add(sums, value);
        write(p, kWarpSize + lane, std::bit_cast<uint32_t>(old));
      }
      arch::sync_warp();  // the next lane goes after this one
    }
    arch::atomic_add(sums + 1, value);
  }
};

// in: a word of each lane, which all add at once, times 2^28: the sum is two words.
struct AtomicAdd64 : OneWarp {
  static __device__ void run(const Params& p) {
    const uint64_t value = uint64_t{read(p, arch::thread_idx())} << 28;
    arch::atomic_add(reinterpret_cast<uint64_t*>(p.out), value);
  }
};

// in: `last` of two counters, which out starts with. From word 32 the tickets the lanes drew from
// the first, one lane after the other; then those from the second.
struct Ticket : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    for (int i = 0; i < kWarpSize; ++i) {
      if (lane == i) {
        write(p, kWarpSize + lane, arch::ticket(p.out, read(p, 0)));
        write(p, 2 * kWarpSize + lane, arch::ticket(p.out + 1, read(p, 1)));
      }
      arch::sync_warp();  // the next lane goes after this one
    }
  }
};

// How split kernels combine: each block stores its words and draws a ticket, the last one adds up.
// out: the counter, from word 32 the blocks' words, then their sums.
struct LastBlock : OneWarp {
  static constexpr uint32_t blocks = 4;

  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const int mine = arch::block_idx() * kWarpSize + lane;
    write(p, kWarpSize + mine, read(p, mine));
    arch::sync_warp();  // the words of all lanes before lane 0's fence
    uint32_t drawn = 0;
    if (lane == 0) {
      arch::fence_gpu();  // those words before the ticket
      drawn = arch::ticket(p.out, blocks - 1);
      arch::fence_gpu();  // the ticket before the other blocks' words
    }
    if (arch::shfl(drawn, 0) != blocks - 1) return;
    arch::sync_warp();  // lane 0's fence before the reads of all lanes
    uint32_t sum = 0;
    for (int i = 1; i <= static_cast<int>(blocks); ++i) {
      sum += arch::ldg<uint32_t>(p.out + i * kWarpSize + lane);
    }
    write(p, (1 + static_cast<int>(blocks)) * kWarpSize + lane, sum);
  }
};

// in: valid_bytes of each lane, 16 bytes of each lane to be cut there, 16 bytes of each lane to be
// copied whole. The two copies are two groups; each lane writes what its neighbour's copies left.
struct CpAsync : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const int neighbour = lane ^ 1;
    const uint32_t cut = arch::dynamic_smem();
    const uint32_t whole = cut + 16 * kWarpSize;
    const uint32_t* source = p.in + kWarpSize;
    arch::sts(cut + 16 * lane, arch::U32x4{~0u, ~0u, ~0u, ~0u});
    const int valid_bytes = static_cast<int>(read(p, lane));
    arch::cp_async_16(cut + 16 * lane, source + 4 * lane, valid_bytes);
    arch::cp_async_commit();
    arch::cp_async_16(whole + 16 * lane, source + 4 * (kWarpSize + lane), 16);
    arch::cp_async_commit();
    arch::cp_async_wait<1>();
    arch::sync_warp();  // the first group of every lane has landed
    for (int i = 0; i < 4; ++i) {
      write(p, 4 * lane + i, arch::lds<uint32_t>(cut + 16 * neighbour + 4 * i));
    }
    arch::cp_async_wait<0>();
    arch::sync_warp();  // so has the second
    for (int i = 0; i < 4; ++i) {
      write(p, 4 * (kWarpSize + lane) + i, arch::lds<uint32_t>(whole + 16 * neighbour + 4 * i));
    }
  }
};

}  // namespace flashinfer_lite::golden
