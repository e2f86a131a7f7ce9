// What amx.h has, for a processor without AMX: every bit as Intel's manual defines the instructions
// (volume 2, LDTILECFG, TILELOADD, TDPBF16PS; the payload of a NaN aside, of which it says
// nothing). What the processor would refuse as undefined traps here too.
#pragma once

#include "cpu/isa/avx512_bf16_emulation.h"
#include "cpu/isa/tile_config.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

struct EmulatedTile {
  alignas(64) uint32_t row[kAmxRows][16];
};

// c[rows][cols] += the products of pairs. The even and the odd members of all pairs have a sum
// each, of fused multiply-adds in ascending order; then the two are added, then c. Not inlined: it
// runs in the floating point environment that its caller sets.
__attribute__((noinline)) inline void add_pair_products(int rows, int pairs, int cols,
                                                        const EmulatedTile& a,
                                                        const EmulatedTile& b, EmulatedTile& c) {
  constexpr int width = kWidth<float>;
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < 16; n += width) {
      Vector<float> even = {}, odd = {};
      for (int k = 0; k < pairs; ++k) {
        const Vector<uint32_t> x = a.row[m][k] - Vector<uint32_t>{}, y = load(b.row[k] + n);
        even = fma(as_float(x << 16), as_float(y << 16), even);
        odd = fma(as_float(x & 0xffff0000u), as_float(y & 0xffff0000u), odd);
      }
      const Vector<float> sum = as_float(load(c.row[m] + n)) + (even + odd);
      store(c.row[m] + n, as_words(sum));
    }
    for (int n = cols; n < 16; ++n) c.row[m][n] = 0;
  }
}

// One or two rows leave the tiles idle for what reading costs anyway.
constexpr int64_t kLeastTileRows = 3;

class Tiles {
 public:
  explicit Tiles(const TileConfig& config) : config_(config) {
    bool fine = config.palette == 1 && config.start_row == 0;
    for (uint8_t byte : config.reserved) fine &= byte == 0;
    for (int i = 0; i < 16; ++i) {
      const int rows = config.rows[i], bytes = config.row_bytes[i];
      fine &= rows <= kAmxRows && bytes <= 64 && (rows == 0) == (bytes == 0);
      fine &= i < kTiles || rows == 0;
    }
    check(fine);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    check_tile(tile);
    tile_[tile] = {};
  }

  template <int tile>
  void load(const void* from, int64_t stride) {
    zero<tile>();
    for (int r = 0; r < config_.rows[tile]; ++r) {
      const char* row = static_cast<const char*>(from) + r * stride;
      __builtin_memcpy(tile_[tile].row[r], row, config_.row_bytes[tile]);
    }
  }

  template <int tile>
  void store(void* to, int64_t stride) const {
    check_tile(tile);
    for (int r = 0; r < config_.rows[tile]; ++r) {
      char* row = static_cast<char*>(to) + r * stride;
      __builtin_memcpy(row, tile_[tile].row[r], config_.row_bytes[tile]);
    }
  }

  template <int c, int a, int b>
  void multiply() {
    for (int tile : {a, b, c}) check_tile(tile);
    check(a != b && b != c && c != a);
    const int rows = config_.rows[c], pairs = config_.rows[b], cols = config_.row_bytes[c] / 4;
    check(config_.rows[a] == rows && config_.row_bytes[a] == 4 * pairs);
    check(config_.row_bytes[b] == 4 * cols);
    // The instruction neither reads nor writes MXCSR: it rounds to nearest even, takes denormals
    // for zeros, returns zeros for them, and raises nothing. That is bits 15 and 6, and all masks.
    const unsigned mine = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    add_pair_products(rows, pairs, cols, tile_[a], tile_[b], tile_[c]);
    _mm_setcsr(mine);
  }

  static FIL_INLINE void fence() {}

 private:
  static void check(bool fine) {
    if (!fine) __builtin_trap();
  }
  void check_tile(int tile) const {
    check(tile >= 0 && tile < kTiles && config_.rows[tile] > 0 && config_.row_bytes[tile] % 4 == 0);
  }

  TileConfig config_;
  EmulatedTile tile_[kTiles] = {};
};

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
