// Golden cases: matrix loads and tensor cores.
#pragma once

#include "cuda/kernels/golden/case.cuh"

namespace flashinfer_lite::golden {

// in: the byte offset of each lane's row, then 128 words of shared memory. out: 4 registers a lane.
template <bool kTrans>
struct LdMatrix : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    const uint32_t smem = arch::dynamic_smem();
    for (int i = lane; i < 4 * kWarpSize; i += kWarpSize) {
      arch::sts(smem + 4 * i, read(p, kWarpSize + i));
    }
    arch::sync_warp();  // the rows were written by other lanes
    uint32_t r[4];
    if constexpr (kTrans) {
      arch::ldmatrix_x4_trans(r, smem + read(p, lane));
    } else {
      arch::ldmatrix_x4(r, smem + read(p, lane));
    }
    for (int i = 0; i < 4; ++i) write(p, 4 * lane + i, r[i]);
  }
};

// in: the registers of a, b and d, each lane's own together. out: those of d.
template <class Element>
struct Mma : OneWarp {
  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    uint32_t a[4];
    uint32_t b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = read(p, 4 * lane + i);
    for (int i = 0; i < 2; ++i) b[i] = read(p, 4 * kWarpSize + 2 * lane + i);
    for (int i = 0; i < 4; ++i) d[i] = read_float(p, 6 * kWarpSize + 4 * lane + i);
    arch::mma_m16n8k16<Element>(d, a, b);
    for (int i = 0; i < 4; ++i) write_float(p, 4 * lane + i, d[i]);
  }
};

// As Mma, with three b and three d, one after the other.
template <class Element>
struct MmaRow : OneWarp {
  static constexpr int kTiles = 3;

  static __device__ void run(const Params& p) {
    const int lane = arch::thread_idx();
    uint32_t a[4];
    uint32_t b[kTiles][2];
    float d[kTiles][4];
    for (int i = 0; i < 4; ++i) a[i] = read(p, 4 * lane + i);
    for (int tile = 0; tile < kTiles; ++tile) {
      const int b_begin = (4 + 2 * tile) * kWarpSize;
      const int d_begin = (4 + 2 * kTiles + 4 * tile) * kWarpSize;
      for (int i = 0; i < 2; ++i) b[tile][i] = read(p, b_begin + 2 * lane + i);
      for (int i = 0; i < 4; ++i) d[tile][i] = read_float(p, d_begin + 4 * lane + i);
    }
    arch::mma_m16n8k16_row<Element, kTiles>(d, a, b);
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) {
        write_float(p, 4 * (kWarpSize * tile + lane) + i, d[tile][i]);
      }
    }
  }
};

}  // namespace flashinfer_lite::golden
