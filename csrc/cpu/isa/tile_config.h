// What AMX's LDTILECFG reads: the shape of each of its eight matrix registers ("tiles").
#pragma once

#include "cpu/isa/vector.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

constexpr int kTiles = 8;
constexpr int kAmxRows = 16;   // of a tile; of a right factor its pairs of the depth
constexpr int kAmxDepth = 32;  // bfloat16 in a row of a left factor

struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// All of them 16 rows of 64 bytes.
constexpr TileConfig kFullTiles = [] {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < kTiles; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kAmxRows;
  }
  return config;
}();

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
