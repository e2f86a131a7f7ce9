#include "simt/async_copy.h"

#include <cstring>

#include "simt/block.h"

namespace flashinfer_lite::simt {

namespace {

constexpr uint32_t kCopyBytes = 16;

void copy_data(SharedMemory& shared, const AsyncCopy& copy) {
  uint8_t* destination = shared.at(copy.destination);
  std::memcpy(destination, copy.source, copy.valid_bytes);
  std::memset(destination + copy.valid_bytes, 0, kCopyBytes - copy.valid_bytes);
}

void count_copy(Block& block, const AsyncCopy& copy) {
  AccessLog& log = current_lane->warp->log;
  const uint16_t id = block.sites.id(copy.site);
  const int lane = current_lane->index;
  log.add(id, Access::kCopyToShared, lane, copy.destination, kCopyBytes);
  if (copy.valid_bytes == 0) return;
  log.add(id, Access::kCopyFromGlobal, lane, reinterpret_cast<uintptr_t>(copy.source),
          copy.valid_bytes);
}

bool check_copy(const AsyncCopy& copy, Site site) {
  if (!check_shared_bounds(copy.destination, kCopyBytes, true, site)) return false;
  if (reinterpret_cast<uintptr_t>(copy.source) % kCopyBytes != 0) {
    report(Kind::kMisaligned, site, "the source of cp.async is not aligned to 16 bytes");
    return false;
  }
  return true;
}

}  // namespace

void cp_async_16(uint32_t destination, const void* source, int valid_bytes, Site site) {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  AsyncCopy copy{destination, source, static_cast<uint32_t>(valid_bytes), lane.copy_group, site};
  if (!check_copy(copy, site)) return;
  if (valid_bytes < 0 || copy.valid_bytes > kCopyBytes) {
    fatal(Kind::kCollective, site, "cp.async of %d valid bytes", valid_bytes);
  }
  if (valid_bytes != 0 && !check_global_bounds(source, copy.valid_bytes, false, site)) {
    copy.valid_bytes = 0;
  }
  if (block.options.count_accesses) count_copy(block, copy);
  if (block.options.check_races) {
    if (copy.valid_bytes != 0) {
      shadow_global(source, copy.valid_bytes, GlobalAccess::kRead, site);
    }
    shadow_issue(lane, destination, kCopyBytes, lane.thread, lane.time, site);
  }
  if (block.options.eager_copies) {
    copy_data(block.shared, copy);
  } else {
    fill_poison(block.shared.at(destination), kCopyBytes);
  }
  lane.copies.push_back(copy);
}

void cp_async_commit(Site site) {
  if (!current_block->sites.visit(site, SyncKind::kCommit)) return;
  current_lane->copy_group++;
}

void cp_async_wait(uint32_t keep, Site site) {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  if (!block.sites.visit(site, SyncKind::kWait)) return;
  if (lane.copy_group < keep) return;
  const uint32_t end_group = lane.copy_group - keep;
  size_t landed = 0;
  for (const AsyncCopy& copy : lane.copies) {
    if (copy.group >= end_group) break;
    landed++;
    if (!block.options.eager_copies) copy_data(block.shared, copy);
    if (block.options.check_races) {
      shadow_land(copy.destination, kCopyBytes, lane.thread, lane.time, false, copy.site);
    }
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + landed);
}

}  // namespace flashinfer_lite::simt
