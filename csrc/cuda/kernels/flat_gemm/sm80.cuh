// The flat GEMM of FlashDecoding++ (Hong et al., 2023, section 4), compute capability 8.0 and up:
//
//   out = x weight^T + bias      x [M, K], weight [N, K], out [M, N], few rows in x
//
// Bound by memory: the weight, which is most of the bytes, is read once for up to block_m rows. It
// fills the 16-row side of the products and x the 8-column side, so that M is padded to 8 alone.
//
// A thread block owns block_n rows of the weight, block_m rows of x and one split of K. It streams
// both through a ring of num_stages buffers; with two stages this is the paper's double buffering:
//
//   wait for stage i, barrier | start the copy of i + num_stages - 1 | S += W x^T of stage i
//
// With splits, each leaves its sums in `partial` and draws a ticket; the last to arrive adds all of
// them up in the order of the splits, whoever it is. K is walked in the same order in every row of
// the table, so the bits of a row of out do not depend on M.
//
// Shared memory: per stage: weight, x. The epilogue reuses the first stages.
#pragma once

#include <algorithm>

#include "common/heuristics.h"
#include "common/params/flat_linear_cuda.h"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/ragged.cuh"

namespace flashinfer_lite::flat_gemm {

using Params = CudaFlatLinearParams;

template <class Cfg>
struct Traits {
  using Element = typename Cfg::Element;
  static constexpr int num_threads = Cfg::num_warps * 32;
  static constexpr int m_tiles = Cfg::block_m / 8;                    // columns of the products
  static constexpr int n_tiles = Cfg::block_n / 16 / Cfg::num_warps;  // rows of them, a warp
  static_assert(Cfg::block_m % 8 == 0, "x is padded to the 8 columns of a product");
  static_assert(n_tiles * 16 * Cfg::num_warps == Cfg::block_n, "every warp has whole products");
  static_assert(Cfg::block_k % 64 == 0, "a row of a tile is a multiple of 128 bytes");
  static_assert(kFlatGemmStep % Cfg::block_k == 0, "a split ends where a step does");
  static_assert(Cfg::num_stages >= 2, "one stage is read while another is filled");

  using WeightTile = tile::SmemTile<Element, Cfg::block_n, Cfg::block_k>;
  using XTile = tile::SmemTile<Element, Cfg::block_m, Cfg::block_k>;
  using Output = float[n_tiles][m_tiles][4];
  // The loads of a few splits are under way together where one split has only few.
  static constexpr int splits_together = std::max(4 / (n_tiles * m_tiles), 1);

  static constexpr int stage_bytes = WeightTile::bytes + XTile::bytes;
  static constexpr int ring_bytes = stage_bytes * Cfg::num_stages;
  // Of the rows of out in shared memory, in floats: with 4 more than block_n the two columns a lane
  // and the eight rows of a product meet 32 banks.
  static constexpr int staged_row = Cfg::block_n + 4;
  static constexpr int staged_bytes = Cfg::block_m * staged_row * 4;
  static constexpr int smem_bytes = std::max(ring_bytes, staged_bytes);
  // What the 228 KB of a multiprocessor hold, with the driver's 1 KB for each block.
  static constexpr int blocks_per_sm = std::min(228 * 1024 / (smem_bytes + 1024), 4);
};

// What a thread block works on, the same for all of its threads.
template <class Cfg>
struct Block {
  using T = Traits<Cfg>;
  using Element = typename T::Element;

  __device__ __forceinline__ Block(const Params& params, uint32_t block)
      : p(params),
        thread(arch::thread_idx()),
        // From lane 0, so that the compiler sees one value for the warp and its loops converge.
        warp(arch::shfl(arch::thread_idx() / 32, 0)),
        lane(arch::thread_idx() % 32) {
    // Blocks of the same weights first, which then come from the L2, then the splits, whose
    // partials are added up while they are there too.
    const auto num_m_blocks = static_cast<uint32_t>(p.num_m_blocks);
    const auto splits = static_cast<uint32_t>(p.splits);
    m_block = static_cast<int>(block % num_m_blocks);
    block /= num_m_blocks;
    split = static_cast<int>(block % splits);
    n_block = static_cast<int>(block / splits);

    const int first_m = m_block * Cfg::block_m;
    const int first_n = n_block * Cfg::block_n;
    const auto k = static_cast<int>(p.k);
    // A copy of part of a chunk would read all of it, beyond the tensor's end.
    const bool whole = k % T::WeightTile::chunk_elements == 0;
    x = {static_cast<const Element*>(p.x) + first_m * p.x_row, p.x_row,
         static_cast<int>(p.m) - first_m, k, p.vector_x && whole};
    weight = {static_cast<const Element*>(p.weight) + first_n * p.weight_row, p.weight_row,
              static_cast<int>(p.n) - first_n, k, p.vector_weight && whole};
    first_k = split * static_cast<int>(p.k_per_split);
    const int end_k = std::min(k, first_k + static_cast<int>(p.k_per_split));
    count = std::max((end_k - first_k + Cfg::block_k - 1) / Cfg::block_k, 0);
  }

  __device__ __forceinline__ typename T::WeightTile weight_tile(int stage) const {
    return {arch::dynamic_smem() + static_cast<uint32_t>(stage * T::stage_bytes)};
  }
  __device__ __forceinline__ typename T::XTile x_tile(int stage) const {
    return {weight_tile(stage).base + T::WeightTile::bytes};
  }
  // The row of the weight, among the block's, of a product's row `half * 8 + lane / 4`.
  __device__ __forceinline__ int weight_row(int n, int half) const {
    return (warp * T::n_tiles + n) * 16 + half * 8 + lane / 4;
  }

  const Params& p;
  int thread, warp, lane;
  int m_block, n_block, split;
  int first_k;
  int count;  // of blocks of block_k columns; an empty split has none
  tile::MatrixRows<Element> x, weight;
};

// Starts the copies of block i into a stage; beyond the last block an empty group, so that groups
// and blocks stay in step.
template <class Cfg>
__device__ __forceinline__ void load_stage(const Block<Cfg>& b, int i, int stage) {
  if (i < b.count) {
    const int col = b.first_k + i * Cfg::block_k;
    tile::load_columns<Traits<Cfg>::num_threads>(b.weight_tile(stage), b.weight, col, b.thread);
    tile::load_columns<Traits<Cfg>::num_threads>(b.x_tile(stage), b.x, col, b.thread);
  }
  arch::cp_async_commit();
}

// acc += weight x^T of a stage: fragments of m16n8, whose rows are the weight's and whose columns
// are x's.
template <class Cfg>
__device__ __forceinline__ void add_products(const Block<Cfg>& b, int stage,
                                             typename Traits<Cfg>::Output& acc) {
  using T = Traits<Cfg>;
  using Element = typename T::Element;
  const int first = b.warp * T::n_tiles * 16;
  // Opaque, as in tile/gemm.
  const uint32_t weight_lane =
      arch::opaque(b.weight_tile(stage).chunk(first + b.lane % 16, b.lane / 16));
  const uint32_t x_lane = arch::opaque(b.x_tile(stage).chunk(b.lane % 8, b.lane / 8));
#pragma unroll
  for (int step = 0; step < Cfg::block_k / 32; ++step) {
    uint32_t x[2][T::m_tiles][2];
#pragma unroll
    for (int m = 0; m < T::m_tiles; ++m) {  // one load brings 8 rows of x for two products
      uint32_t r[4];
      arch::ldmatrix_x4(r, T::XTile::advance(x_lane, m * 8, step * 4));
      x[0][m][0] = r[0];
      x[0][m][1] = r[1];
      x[1][m][0] = r[2];
      x[1][m][1] = r[3];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < T::n_tiles; ++n) {
        uint32_t w[4];
        arch::ldmatrix_x4(w, T::WeightTile::advance(weight_lane, n * 16, step * 4 + half * 2));
        arch::mma_m16n8k16_row<Element, T::m_tiles>(acc[n], w, x[half]);
      }
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void accumulate(const Block<Cfg>& b, typename Traits<Cfg>::Output& acc) {
  tile::clear(acc);
#pragma unroll 1
  for (int i = 0; i < Cfg::num_stages - 1; ++i) load_stage(b, i, i);
  int stage = 0;
  int freed = Cfg::num_stages - 1;
#pragma unroll 1
  for (int i = 0; i < b.count; ++i) {
    arch::cp_async_wait<Cfg::num_stages - 2>();
    // The other threads' part of block i has landed too, and nobody reads `freed` any more.
    arch::sync_threads();
    load_stage(b, i + Cfg::num_stages - 1, freed);
    add_products(b, stage, acc);
    freed = stage;
    stage = stage + 1 == Cfg::num_stages ? 0 : stage + 1;
  }
  arch::sync_threads();  // nobody reads the ring any more
}

// Where the thread finds its part of a split's partial: four floats for each product, neighbouring
// threads side by side.
template <class Cfg>
__device__ __forceinline__ tile::Float4* partial_of(const Block<Cfg>& b, int split) {
  const int64_t index = (b.n_block * b.p.splits + split) * b.p.num_m_blocks + b.m_block;
  return reinterpret_cast<tile::Float4*>(b.p.partial + index * Cfg::block_m * Cfg::block_n) +
         b.thread;
}

// True for the last block of a tile to arrive, which may then read what the others have written.
template <class Cfg>
__device__ __forceinline__ bool arrives_last(const Block<Cfg>& b) {
  arch::sync_threads();  // the whole block has written its partial
  bool last = false;
  if (b.thread == 0) {
    const auto end = static_cast<uint32_t>(b.p.splits) - 1;
    arch::fence_gpu();  // what the block has written is there before its ticket is
    last = arch::ticket(b.p.tickets + b.n_block * b.p.num_m_blocks + b.m_block, end) == end;
    arch::fence_gpu();  // what the others wrote before theirs is read after it
  }
  return arch::sync_threads_or(last);
}

// Adds up the splits of a tile in their order, in its last block; false in the others. Columns of x
// that do not exist are left out eight at a time.
template <class Cfg>
__device__ __forceinline__ bool merge_splits(const Block<Cfg>& b,
                                             typename Traits<Cfg>::Output& acc) {
  using T = Traits<Cfg>;
  tile::Float4* own = partial_of(b, b.split);
#pragma unroll
  for (int n = 0; n < T::n_tiles; ++n) {
#pragma unroll
    for (int m = 0; m < T::m_tiles; ++m) {
      if (m * 8 >= b.x.rows) continue;
      const float (&a)[4] = acc[n][m];
      arch::stg(own + (n * T::m_tiles + m) * T::num_threads, tile::Float4{a[0], a[1], a[2], a[3]});
    }
  }
  if (!arrives_last(b)) return false;
  tile::clear(acc);
#pragma unroll T::splits_together
  for (int split = 0; split < static_cast<int>(b.p.splits); ++split) {
    const tile::Float4* part = partial_of(b, split);
#pragma unroll
    for (int n = 0; n < T::n_tiles; ++n) {
#pragma unroll
      for (int m = 0; m < T::m_tiles; ++m) {
        if (m * 8 >= b.x.rows) continue;
        const auto more = arch::ldg(part + (n * T::m_tiles + m) * T::num_threads);
        acc[n][m][0] += more.x;
        acc[n][m][1] += more.y;
        acc[n][m][2] += more.z;
        acc[n][m][3] += more.w;
      }
    }
  }
  return true;
}

// Adds the bias and brings the sums to shared memory as rows of out.
template <class Cfg>
__device__ __forceinline__ void stage_out(const Block<Cfg>& b,
                                          const typename Traits<Cfg>::Output& acc) {
  using T = Traits<Cfg>;
  using Element = typename T::Element;
  const Element* bias = static_cast<const Element*>(b.p.bias) + b.n_block * Cfg::block_n;
#pragma unroll
  for (int n = 0; n < T::n_tiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = b.weight_row(n, half);
      const bool exists = b.p.bias != nullptr && arch::predicate(row < b.weight.rows);
      const float added = exists ? arch::to_float(arch::ldg(bias + row)) : 0.f;
#pragma unroll
      for (int m = 0; m < T::m_tiles; ++m) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = m * 8 + b.lane % 4 * 2 + e;
          arch::sts(arch::dynamic_smem() + static_cast<uint32_t>((col * T::staged_row + row) * 4),
                    acc[n][m][2 * half + e] + added);
        }
      }
    }
  }
}

// Rows of out from shared memory, four columns a thread, so that a warp's stores cover whole rows.
template <class Cfg>
__device__ __forceinline__ void store_out(const Block<Cfg>& b) {
  using T = Traits<Cfg>;
  using Element = typename T::Element;
  constexpr int kChunks = Cfg::block_n / 4;
#pragma unroll 1
  for (int i = b.thread; i < Cfg::block_m * kChunks; i += T::num_threads) {
    const int row = i / kChunks;
    const int col = i % kChunks * 4;
    if (!arch::predicate(row < b.x.rows)) continue;
    const auto sum = arch::lds<tile::Float4>(
        arch::dynamic_smem() + static_cast<uint32_t>((row * T::staged_row + col) * 4));
    Element* out = static_cast<Element*>(b.p.out) +
                   (int64_t{b.m_block} * Cfg::block_m + row) * b.p.out_row +
                   b.n_block * Cfg::block_n + col;
    if (b.p.vector_out && col + 4 <= b.weight.rows) {
      const U32x2 packed{arch::pack<Element>(sum.x, sum.y), arch::pack<Element>(sum.z, sum.w)};
      arch::stg(reinterpret_cast<U32x2*>(out), packed);
      continue;
    }
    const float value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!arch::predicate(col + j < b.weight.rows)) continue;
      arch::stg(out + j, arch::from_float<Element>(value[j]));
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Traits<Cfg>::num_threads, Traits<Cfg>::blocks_per_sm)
    flat_gemm_sm80(const __grid_constant__ Params p) {
  const Block<Cfg> b(p, static_cast<uint32_t>(arch::block_idx()));
  typename Traits<Cfg>::Output acc;
  accumulate(b, acc);
  if (p.splits > 1 && !merge_splits(b, acc)) return;
  stage_out(b, acc);
  arch::sync_threads();  // every warp's rows of the weight are there
  store_out(b);
}

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = flat_gemm::Params;
  static constexpr int smem_bytes = Traits<Cfg>::smem_bytes;

  static Status launch(const Params& p, Stream stream) {
    const int64_t blocks = p.num_m_blocks * p.splits * p.num_n_blocks;
    const LaunchConfig config{static_cast<uint32_t>(blocks), Traits<Cfg>::num_threads, smem_bytes};
    return arch::launch<flat_gemm_sm80<Cfg>>(config, stream, p);
  }
};

}  // namespace flashinfer_lite::flat_gemm
