// The amx level's tile operations and packers in C, for tests/test_amx.py: on emulated tiles, as
// the level amx-emulated has them, or with DOT_TILES on those of avx512-bf16-emulated.
#include "cpu/kernels/prelude.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FIL_CPU_LEVEL amx_probe
#define FIL_VECTOR_BYTES 32
#include "cpu/isa/avx2.h"
// avx2.h first: the emulation multiplies with its fma.
#ifdef DOT_TILES
#include "cpu/isa/avx512_bf16_emulation.h"
#include "cpu/isa/dot_tiles.h"
#else
#include "cpu/isa/amx_emulation.h"
#endif
#include "cpu/isa/amx_gemm.h"
#include "cpu/isa/math.h"

using flashinfer_lite::BFloat16;
using namespace flashinfer_lite::cpu::amx_probe;

namespace {

TileConfig shapes(int rows, int pairs, int cols) {
  TileConfig config{};
  config.palette = 1;
  const int tiles[][3] = {{0, rows, cols}, {4, rows, pairs}, {6, pairs, cols}};
  for (const auto& [tile, tile_rows, words] : tiles) {
    config.rows[tile] = static_cast<uint8_t>(tile_rows);
    config.row_bytes[tile] = static_cast<uint16_t>(4 * words);
  }
  return config;
}

}  // namespace

extern "C" {

// c[rows, cols] += a[rows, pairs] b[pairs, cols], contiguous; a and b in words of two bfloat16.
void multiply(int rows, int pairs, int cols, const void* a, const void* b, void* c) {
  Tiles tiles(shapes(rows, pairs, cols));
  tiles.load<0>(c, 4 * cols);
  tiles.load<4>(a, 4 * pairs);
  tiles.load<6>(b, 4 * cols);
  tiles.multiply<0, 4, 6>();
  tiles.store<0>(c, 4 * cols);
}

unsigned mxcsr() { return _mm_getcsr(); }

#ifndef DOT_TILES
// What the processor refuses.
void misuse(int which) {
  char memory[4096] = {};
  TileConfig config = shapes(4, 3, 5);
  if (which == 0) config.palette = 2;
  if (which == 1) config.rows[4] = 17;
  if (which == 2) config.row_bytes[6] = 68;
  if (which == 3) config.reserved[3] = 1;
  if (which == 4) config.rows[1] = 1;        // of no bytes
  if (which == 5) config.rows[4] = 3;        // unlike the sum's
  if (which == 6) config.rows[6] = 4;        // unlike the left factor's pairs
  if (which == 7) config.row_bytes[6] = 16;  // unlike the sum's
  Tiles tiles(config);
  if (which == 8) tiles.zero<1>();  // not configured
  if (which == 9) tiles.load<7>(memory, 64);
  if (which == 10) tiles.multiply<0, 4, 4>();
  tiles.multiply<0, 4, 6>();
}
#endif

void round_floats(int64_t count, const float* x, void* out) {
  for (int64_t i = 0; i < count; i += kWidth<float>) {
    store_bfloat16(static_cast<BFloat16*>(out) + i, load(x + i));
  }
}

void round_pairs(int64_t count, const float* even, const float* odd, void* pairs, void* even_row,
                 void* odd_row) {
  for (int64_t i = 0; i < count; i += kWidth<float>) {
    store_pairs(static_cast<BFloat16*>(pairs) + 2 * i, static_cast<BFloat16*>(even_row) + i,
                static_cast<BFloat16*>(odd_row) + i, load(even + i), load(odd + i));
  }
}

void short_exponentials(int64_t count, const float* x, float* out) {
  for (int64_t i = 0; i < count; i += kWidth<float>) store(out + i, exp2_short(load(x + i)));
}

void keys(int64_t count, int64_t depth, const void* k, int64_t k_row, void* tiles, void* staging) {
  pack_keys(count, depth, {static_cast<const BFloat16*>(k), k_row}, static_cast<BFloat16*>(tiles),
            static_cast<BFloat16*>(staging));
}

void values(int finite_only, int64_t count, int64_t cols, const void* v, int64_t v_row,
            void* tiles) {
  const auto pack = finite_only ? pack_values<true> : pack_values<false>;
  pack(count, cols, {static_cast<const BFloat16*>(v), v_row}, static_cast<BFloat16*>(tiles), nullptr);
}

void gemm(int64_t rows, int64_t cols, int64_t depth, const void* a, int64_t a_row, const void* b,
          float* c, int64_t c_row, int accumulate) {
  Tiles tiles(kFullTiles);
  amx_gemm(tiles, rows, cols, depth, static_cast<const BFloat16*>(a), a_row,
           static_cast<const BFloat16*>(b), c, c_row, accumulate != 0);
}
}
#pragma GCC pop_options
