// AMX: the tile operations in bfloat16, one instruction each. amx_emulation.h has the same class
// for a processor without.
#pragma once

#include "cpu/isa/tile_config.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// One or two rows leave the tiles idle for what reading costs anyway.
constexpr int64_t kLeastTileRows = 3;

// The thread's tiles, configured as long as this lives. The intrinsics paste the tile's number into
// the instruction's text, so that it must be a literal.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { _tile_loadconfig(&config); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

#define FIL_LITERAL_TILE(operation, ...)                            \
  static_assert(tile >= 0 && tile < kTiles);                        \
  if constexpr (tile == 0) operation(0 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 1) operation(1 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 2) operation(2 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 3) operation(3 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 4) operation(4 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 5) operation(5 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 6) operation(6 __VA_OPT__(, ) __VA_ARGS__); \
  if constexpr (tile == 7) operation(7 __VA_OPT__(, ) __VA_ARGS__)

  template <int tile>
  FIL_INLINE void zero() {
    FIL_LITERAL_TILE(_tile_zero);
  }

  // `stride` is in bytes.
  template <int tile>
  FIL_INLINE void load(const void* from, int64_t stride) {
    FIL_LITERAL_TILE(_tile_loadd, from, stride);
  }
  template <int tile>
  FIL_INLINE void store(void* to, int64_t stride) {
    FIL_LITERAL_TILE(_tile_stored, to, stride);
  }
#undef FIL_LITERAL_TILE

  // c += a b: the products of a 2 x 2 block, whose sums are tiles 0 to 3.
  template <int c, int a, int b>
  FIL_INLINE void multiply() {
    static_assert(c >= 0 && c < 4 && a == 4 + c / 2 && b == 6 + c % 2);
    if constexpr (c == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (c == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (c == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (c == 3) _tile_dpbf16ps(3, 5, 7);
  }

  // Between accesses by tiles and by the language: the intrinsics tell the compiler nothing of the
  // memory that they touch. Costs no instruction.
  static FIL_INLINE void fence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
};

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
