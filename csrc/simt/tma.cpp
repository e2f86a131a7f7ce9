#include <algorithm>
#include <cstring>

#include "simt/block.h"
#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

namespace {

constexpr uint64_t kMagic = 0x54454e534f524d50;  // tells an encoded map from chance
constexpr uint32_t kChunkBytes = 16;             // what a swizzle moves

uint32_t row_bytes(const TensorMap2d& map) { return map.box[0] * map.element_bytes; }
uint32_t box_bytes(const TensorMap2d& map) { return row_bytes(map) * map.box[1]; }

// 128-byte swizzle: bits 4-6 of the address are flipped by bits 7-9.
uint32_t swizzled(const TensorMap2d& map, uint32_t address) {
  return map.swizzle_bytes == 128 ? address ^ (address >> 7 & 7) << 4 : address;
}

void copy_chunk(const TmaLoad& load, int64_t row, int64_t column, uint8_t* destination) {
  const TensorMap2d& map = load.map;
  std::memset(destination, 0, kChunkBytes);
  if (row < 0 || row >= static_cast<int64_t>(map.size[1])) return;
  const uint8_t* source = map.base + row * map.row_stride;
  for (uint32_t i = 0; i < kChunkBytes / map.element_bytes; i++) {
    const int64_t at = column + i;
    if (at < 0 || at >= static_cast<int64_t>(map.size[0])) continue;
    std::memcpy(destination + i * map.element_bytes, source + at * map.element_bytes,
                map.element_bytes);
  }
}

// What the load reads of global memory: the part of its box that lies inside the matrix.
void shadow_source(const TmaLoad& load) {
  const TensorMap2d& map = load.map;
  const int64_t first = std::max(load.column, 0);
  const int64_t end = std::min<int64_t>(map.size[0], int64_t{load.column} + map.box[0]);
  if (first >= end) return;
  for (int64_t i = 0; i < map.box[1]; i++) {
    const int64_t row = load.row + i;
    if (row < 0 || row >= static_cast<int64_t>(map.size[1])) continue;
    shadow_global(map.base + row * map.row_stride + first * map.element_bytes,
                  static_cast<uint32_t>(end - first) * map.element_bytes, GlobalAccess::kRead,
                  load.site);
  }
}

void land(Block& block, const TmaLoad& load) {
  const uint32_t bytes = row_bytes(load.map);
  for (uint32_t row = 0; row < load.map.box[1]; row++) {
    for (uint32_t byte = 0; byte < bytes; byte += kChunkBytes) {
      const uint32_t address = swizzled(load.map, load.destination + row * bytes + byte);
      copy_chunk(load, int64_t{load.row} + row,
                 int64_t{load.column} + byte / load.map.element_bytes, block.shared.at(address));
    }
  }
  Mbarrier& barrier = block.mbarriers.by_address.at(load.mbarrier);
  if (block.options.check_races) {
    shadow_land(load.destination, box_bytes(load.map), block.num_threads + barrier.index,
                barrier.phase + 1, true, load.site);
  }
  barrier.transaction_bytes -= box_bytes(load.map);
  complete_phase_if_due(block, barrier);
}

}  // namespace

std::string encode_tensor_map_2d(void* map, const TensorMap2d& wanted) {
  TensorMap2d encoded = wanted;
  encoded.magic = kMagic;
  std::memcpy(map, &encoded, sizeof encoded);
  if (wanted.row_stride % 16 != 0) return "the row stride is not a multiple of 16 bytes";
  if (reinterpret_cast<uintptr_t>(wanted.base) % 16 != 0) return "the base is not 16-byte aligned";
  if (wanted.box[0] > 256 || wanted.box[1] > 256) return "a box dimension exceeds 256";
  if (row_bytes(wanted) % 16 != 0) return "a box row is not a multiple of 16 bytes";
  if (wanted.swizzle_bytes != 0 && row_bytes(wanted) > wanted.swizzle_bytes) {
    return "a box row exceeds the swizzle";
  }
  return "";
}

void tma_load_2d(uint32_t destination, const void* map, int column, int row, uint32_t mbarrier,
                 Site site) {
  Block& block = *current_block;
  TmaLoad load{destination, mbarrier, {}, column, row, site};
  std::memcpy(&load.map, map, sizeof load.map);
  if (load.map.magic != kMagic) fatal(Kind::kFault, site, "this is not an encoded tensor map");
  const uint32_t bytes = box_bytes(load.map);
  if (!check_shared_bounds(destination, bytes, true, site)) return;
  const uint64_t source_bytes =
      (load.map.size[1] - 1) * load.map.row_stride + load.map.size[0] * load.map.element_bytes;
  if (!check_global_bounds(load.map.base, source_bytes, false, site)) return;
  if (int64_t{column} * load.map.element_bytes % 16 != 0) {  // as an H200 was seen to
    fatal(Kind::kFault, site, "illegal instruction: column %d of a TMA box is not on 16 bytes",
          column);
  }
  const uint32_t alignment = load.map.swizzle_bytes == 128 ? 1024 : 128;
  if (destination % alignment != 0) {
    report(Kind::kMisaligned, site, "the TMA destination %u is not aligned to %u bytes",
           destination, alignment);
  }
  const Mbarrier& barrier = mbarrier_of_load(mbarrier, site);
  if (block.options.check_races) {
    shadow_source(load);
    check_proxy(*current_lane, destination, bytes, site);
    shadow_issue(*current_lane, destination, bytes, block.num_threads + barrier.index,
                 barrier.phase + 1, site);
  }
  fill_poison(block.shared.at(destination), bytes);
  block.mbarriers.loads.push_back(load);
  if (block.options.eager_copies) land_one_load(block);
}

bool land_one_load(Block& block) {
  if (block.mbarriers.loads.empty()) return false;
  const TmaLoad load = block.mbarriers.loads.front();
  block.mbarriers.loads.pop_front();
  land(block, load);
  return true;
}

void report_unfinished_loads(Block& block) {
  const auto& loads = block.mbarriers.loads;
  if (loads.empty()) return;
  report(Kind::kLeftover, loads.front().site, "the block ends with %zu TMA loads in flight",
         loads.size());
}

}  // namespace flashinfer_lite::simt
