#include "simt/shared_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "simt/block.h"

namespace flashinfer_lite::simt {

namespace {
constexpr size_t kArenaBytes = kSharedBase + kMaxSharedBytes;
}

SharedMemory::SharedMemory() {
  void* memory =
      mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<uint8_t*>(memory);
}

SharedMemory::~SharedMemory() { munmap(arena_, kArenaBytes); }

void SharedMemory::reset(uint32_t bytes, int num_warps, bool with_shadow) {
  bytes_ = bytes;
  num_warps_ = num_warps;
  fill_poison(arena_ + kSharedBase, bytes);
  if (!with_shadow) return;
  const size_t num_words = (bytes + 3) / 4;
  words_.assign(num_words, SharedWord{});
  readers_.assign(num_words * num_warps, SharedReaders{});
}

bool SharedMemory::contains(const void* pointer) const {
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  return p >= arena_ && p < arena_ + kArenaBytes;
}

uint32_t SharedMemory::address_of(const void* pointer) const {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - arena_);
}

void fill_poison(void* out, size_t bytes) {
  uint8_t* p = static_cast<uint8_t*>(out);
  constexpr uint64_t kPoison8 = kPoison * uint64_t{0x0001000100010001};
  for (; bytes >= sizeof kPoison8; bytes -= sizeof kPoison8, p += sizeof kPoison8) {
    std::memcpy(p, &kPoison8, sizeof kPoison8);
  }
  std::memcpy(p, &kPoison8, bytes);
}

bool SharedMemory::refuse(uint32_t address, uint32_t bytes, bool write, Site site) const {
  const uint32_t end = kSharedBase + bytes_;
  if (address < kSharedBase || uint64_t{address} + bytes > end) {
    report(Kind::kOobShared, site, "%s of %u bytes at shared address %u, outside [%u, %u)",
           write ? "write" : "read", bytes, address, kSharedBase, end);
  } else {
    report(Kind::kMisaligned, site, "shared address %u is not aligned to %u bytes", address, bytes);
  }
  return false;
}

bool check_shared_bounds(uint32_t address, uint32_t bytes, bool write, Site site) {
  return current_block->shared.check(address, bytes, write, site);
}

template <int kBytes>
void load_shared(uint32_t address, void* out, Site site) {
  Block& block = *current_block;
  if (!block.shared.check(address, kBytes, false, site)) return fill_poison(out, kBytes);
  Lane& lane = *current_lane;
  if (block.options.count_accesses) {
    lane.warp->log.add(block.sites.id(site), Access::kSharedLoad, lane.index, address, kBytes);
  }
  if (block.options.check_races) shadow_read(lane, address, kBytes, site);
  std::memcpy(out, block.shared.at(address), kBytes);
}

template <int kBytes>
void store_shared(uint32_t address, const void* value, Site site) {
  Block& block = *current_block;
  if (!block.shared.check(address, kBytes, true, site)) return;
  Lane& lane = *current_lane;
  if (block.options.count_accesses) {
    lane.warp->log.add(block.sites.id(site), Access::kSharedStore, lane.index, address, kBytes);
  }
  if (block.options.check_races) shadow_write(lane, address, kBytes, site);
  std::memcpy(block.shared.at(address), value, kBytes);
}

template void load_shared<1>(uint32_t, void*, Site);
template void load_shared<2>(uint32_t, void*, Site);
template void load_shared<4>(uint32_t, void*, Site);
template void load_shared<8>(uint32_t, void*, Site);
template void load_shared<16>(uint32_t, void*, Site);
template void store_shared<1>(uint32_t, const void*, Site);
template void store_shared<2>(uint32_t, const void*, Site);
template void store_shared<4>(uint32_t, const void*, Site);
template void store_shared<8>(uint32_t, const void*, Site);
template void store_shared<16>(uint32_t, const void*, Site);

}  // namespace flashinfer_lite::simt
