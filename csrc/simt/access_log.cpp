#include "simt/access_log.h"

#include <algorithm>
#include <bit>

namespace flashinfer_lite::simt {

namespace {

constexpr int kBanks = 32;
constexpr uint64_t kSectorBytes = 32;

// Do all lanes of the mask access the same row of 128 bytes, in which every bank has one word?
bool in_one_row(const uint64_t* address, uint32_t mask) {
  const uint64_t row = address[std::countr_zero(mask)] / (4 * kBanks);
  for (; mask != 0; mask &= mask - 1) {
    if (address[std::countr_zero(mask)] / (4 * kBanks) != row) return false;
  }
  return true;
}

// Most distinct words that the lanes of the mask want of one bank.
int bank_degree(const uint64_t* address, uint32_t mask, int words_each) {
  if (in_one_row(address, mask)) return 1;
  uint64_t words[kBanks][kBanks];
  uint8_t used[kBanks] = {};
  int degree = 0;
  for (; mask != 0; mask &= mask - 1) {
    const uint64_t first = address[std::countr_zero(mask)] / 4;
    for (uint64_t word = first; word < first + words_each; word++) {
      const int bank = word % kBanks;
      bool seen = false;
      for (int i = 0; i < used[bank]; i++) seen |= words[bank][i] == word;
      if (seen) continue;
      words[bank][used[bank]++] = word;
      degree = std::max<int>(degree, used[bank]);
    }
  }
  return degree;
}

}  // namespace

void count_wavefronts(const uint64_t* address, uint32_t mask, int bytes, AccessCount& count) {
  const int words_each = std::max(1, bytes / 4);
  const int lanes_per_phase = kBanks / words_each;
  const uint32_t phase_mask = lanes_per_phase == 32 ? 0xffffffffu : (1u << lanes_per_phase) - 1;
  for (int first = 0; first < 32; first += lanes_per_phase) {
    const uint32_t active = mask & phase_mask << first;
    if (active == 0) continue;
    count.ideal++;
    count.actual += bank_degree(address, active, words_each);
  }
}

bool AccessLog::among_earlier_lanes(const Request& request, int lane) {
  for (uint32_t mask = request.mask & ((1u << lane) - 1); mask != 0; mask &= mask - 1) {
    if (request.address[std::countr_zero(mask)] == request.address[lane]) return true;
  }
  return false;
}

void AccessLog::count_sectors(const Request& request, AccessCount& count) {
  uint64_t sectors[64];
  int used = 0;
  uint64_t highest = 0;
  uint64_t bytes = 0;
  uint64_t end = 0;
  for (uint32_t mask = request.mask; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    const uint64_t address = request.address[lane];
    const uint64_t first = address / kSectorBytes;
    const uint64_t last = (address + request.bytes[lane] - 1) / kSectorBytes;
    // What lanes share counts once.
    if (address >= end || !among_earlier_lanes(request, lane)) bytes += request.bytes[lane];
    end = std::max(end, address + request.bytes[lane]);
    for (uint64_t sector = first; sector <= last; sector++) {
      // Addresses mostly ascend: only a sector below the highest can have been seen.
      if (sector <= highest && std::find(sectors, sectors + used, sector) != sectors + used) {
        continue;
      }
      sectors[used++] = sector;
      highest = std::max(highest, sector);
    }
  }
  count.actual += used;
  count.ideal += (bytes + kSectorBytes - 1) / kSectorBytes;
}

void AccessLog::add(uint16_t site, Access access, int lane, uint64_t address, int bytes) {
  const size_t key = static_cast<size_t>(site) * kNumAccesses + static_cast<size_t>(access);
  if (key >= index_.size()) index_.resize(key + 64 * kNumAccesses, -1);
  if (index_[key] < 0) {
    index_[key] = static_cast<int>(streams_.size());
    streams_.push_back({site, access, {}, {}, 0});
  }
  Stream& stream = streams_[index_[key]];
  if (stream.used == 0) dirty_.push_back(index_[key]);
  const size_t occurrence = stream.occurrences[lane]++;
  if (occurrence >= stream.used) {
    stream.used = occurrence + 1;
    if (stream.requests.size() < stream.used) stream.requests.resize(2 * stream.used);
    stream.requests[occurrence].mask = 0;
  }
  Request& request = stream.requests[occurrence];
  request.address[lane] = address;
  request.bytes[lane] = static_cast<uint8_t>(bytes);
  request.mask |= 1u << lane;
}

void AccessLog::flush(SiteTable& sites) {
  for (const int index : dirty_) {
    Stream& stream = streams_[index];
    AccessCount& count = sites[stream.site].accesses[static_cast<int>(stream.access)];
    const bool shared = stream.access == Access::kSharedLoad ||
                        stream.access == Access::kSharedStore ||
                        stream.access == Access::kCopyToShared;
    for (size_t i = 0; i < stream.used; i++) {
      const Request& request = stream.requests[i];
      count.requests++;
      if (shared) {
        const int lane = std::countr_zero(request.mask);
        count_wavefronts(request.address.data(), request.mask, request.bytes[lane], count);
      } else {
        count_sectors(request, count);
      }
    }
    stream.used = 0;
    stream.occurrences.fill(0);
  }
  dirty_.clear();
}

void AccessLog::clear() {
  for (const int index : dirty_) {
    streams_[index].used = 0;
    streams_[index].occurrences.fill(0);
  }
  dirty_.clear();
}

}  // namespace flashinfer_lite::simt
