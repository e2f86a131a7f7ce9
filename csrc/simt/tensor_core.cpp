#include "simt/tensor_core.h"

#include <cstring>
#include <utility>

#include "common/types.h"
#include "simt/block.h"

namespace flashinfer_lite::simt {

namespace {

using Float8 = float __attribute__((vector_size(32)));

constexpr int kM = 16;
constexpr int kN = 8;
constexpr int kK = 16;

struct Tile {
  alignas(64) float a[kM][kK];
  Float8 b[kK];  // [k][n]
  Float8 c[kM];  // [m][n]
};

template <class Element>
void unpack(uint32_t pair, float& low, float& high) {
  low = to_float(Element{static_cast<uint16_t>(pair)});
  high = to_float(Element{static_cast<uint16_t>(pair >> 16)});
}

template <class Element>
void gather_a(Tile& tile, const MmaArgument* const* arguments) {
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    const uint32_t* a = arguments[lane]->a;
    unpack<Element>(a[0], tile.a[row][column], tile.a[row][column + 1]);
    unpack<Element>(a[1], tile.a[row + 8][column], tile.a[row + 8][column + 1]);
    unpack<Element>(a[2], tile.a[row][column + 8], tile.a[row][column + 9]);
    unpack<Element>(a[3], tile.a[row + 8][column + 8], tile.a[row + 8][column + 9]);
  }
}

template <class Element>
void gather_b_and_c(Tile& tile, const MmaArgument* const* arguments, int index) {
  float* b_values = reinterpret_cast<float*>(tile.b);
  float* c_values = reinterpret_cast<float*>(tile.c);
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    const uint32_t* b = arguments[lane]->b + 2 * index;
    const float* d = arguments[lane]->d + 4 * index;
    unpack<Element>(b[0], b_values[column * kN + row], b_values[(column + 1) * kN + row]);
    unpack<Element>(b[1], b_values[(column + 8) * kN + row], b_values[(column + 9) * kN + row]);
    std::memcpy(c_values + row * kN + column, d, 2 * sizeof(float));
    std::memcpy(c_values + (row + 8) * kN + column, d + 2, 2 * sizeof(float));
  }
}

void scatter_c(const Tile& tile, const MmaArgument* const* arguments, int index) {
  const float* c_values = reinterpret_cast<const float*>(tile.c);
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    float* d = arguments[lane]->d + 4 * index;
    std::memcpy(d, c_values + row * kN + column, 2 * sizeof(float));
    std::memcpy(d + 2, c_values + (row + 8) * kN + column, 2 * sizeof(float));
  }
}

// c += a b. A product of two 16-bit floats is exact in float, so that the compiler's choice between
// fma and multiply-add changes nothing. Four rows at a time keep b in registers.
__attribute__((target_clones("default", "avx2"))) void multiply(Tile& tile) {
  for (int m = 0; m < kM; m += 4) {
    Float8 c0 = tile.c[m];
    Float8 c1 = tile.c[m + 1];
    Float8 c2 = tile.c[m + 2];
    Float8 c3 = tile.c[m + 3];
    for (int k = 0; k < kK; k++) {
      const Float8 b = tile.b[k];
      c0 += tile.a[m][k] * b;
      c1 += tile.a[m + 1][k] * b;
      c2 += tile.a[m + 2][k] * b;
      c3 += tile.a[m + 3][k] * b;
    }
    tile.c[m] = c0;
    tile.c[m + 1] = c1;
    tile.c[m + 2] = c2;
    tile.c[m + 3] = c3;
  }
}

// The collectives below need every lane: a warp with fewer threads cannot execute them.
void check_full_warp(const Lane* lanes, uint32_t mask) {
  if (mask == 0xffffffffu) return;
  fatal(Kind::kCollective, lanes[0].site, "a tensor core instruction needs 32 lanes, mask is %08x",
        mask);
}

using Matrix = uint16_t[8][8];

// Rows from where lanes[0..7] point.
void load_matrix(Block& block, Lane* lanes, Matrix& rows, AccessCount* count) {
  uint64_t addresses[32] = {};
  for (int row = 0; row < 8; row++) {
    Lane& lane = lanes[row];
    const uint32_t address = static_cast<LdmatrixArgument*>(lane.argument)->address;
    addresses[row] = address;
    if (!block.shared.check(address, sizeof rows[row], false, lane.site)) {
      fill_poison(rows[row], sizeof rows[row]);
      continue;
    }
    if (block.options.check_races) shadow_read(lane, address, sizeof rows[row], lane.site);
    std::memcpy(rows[row], block.shared.at(address), sizeof rows[row]);
  }
  if (count != nullptr) count_wavefronts(addresses, 0xffu, sizeof rows[0], *count);
}

void transpose(Matrix& matrix) {
  for (int row = 0; row < 8; row++) {
    for (int column = 0; column < row; column++)
      std::swap(matrix[row][column], matrix[column][row]);
  }
}

}  // namespace

void perform_ldmatrix(Lane* lanes, uint32_t mask) {
  check_full_warp(lanes, mask);
  Block& block = *current_block;
  AccessCount* count = nullptr;
  if (block.options.count_accesses) {
    SiteEntry& entry = block.sites[block.sites.id(lanes[0].site)];
    count = &entry.accesses[static_cast<int>(Access::kLdmatrix)];
    count->requests++;
  }
  const bool transposed = static_cast<LdmatrixArgument*>(lanes[0].argument)->transpose;
  alignas(16) Matrix matrices[4];
  for (int i = 0; i < 4; i++) {
    load_matrix(block, lanes + 8 * i, matrices[i], count);
    if (transposed) transpose(matrices[i]);
  }
  // A lane gets elements 2 (lane % 4) and the next of row lane / 4: the lane-th pair.
  uint32_t pairs[4][32];
  std::memcpy(pairs, matrices, sizeof pairs);
  for (int lane = 0; lane < 32; lane++) {
    uint32_t* registers = static_cast<LdmatrixArgument*>(lanes[lane].argument)->registers;
    for (int i = 0; i < 4; i++) registers[i] = pairs[i][lane];
  }
}

template <class Element>
void perform_mma(Lane* lanes, uint32_t mask) {
  check_full_warp(lanes, mask);
  const MmaArgument* arguments[32];
  for (int lane = 0; lane < 32; lane++) {
    arguments[lane] = static_cast<const MmaArgument*>(lanes[lane].argument);
  }
  const int count = arguments[0]->count;
  current_block->totals.mmas += count;
  Tile tile;
  gather_a<Element>(tile, arguments);
  for (int i = 0; i < count; i++) {
    gather_b_and_c<Element>(tile, arguments, i);
    multiply(tile);
    scatter_c(tile, arguments, i);
  }
}

template void perform_mma<BFloat16>(Lane*, uint32_t);
template void perform_mma<Float16>(Lane*, uint32_t);

}  // namespace flashinfer_lite::simt
