#include <bit>

#include "simt/block.h"
#include "simt/ordering.h"
#include "simt/shared_memory.h"

namespace flashinfer_lite::simt {

namespace {

// Words [first, end) of an access, and its bytes of a word: all four, if it is wider than one.
struct Range {
  uint32_t first;
  uint32_t end;
  uint8_t mask;
};

Range range_of(uint32_t address, uint32_t bytes) {
  const uint32_t first = SharedMemory::word_index(address);
  if (bytes >= 4) return {first, first + bytes / 4, 0xf};
  return {first, first + 1, static_cast<uint8_t>(((1u << bytes) - 1) << address % 4)};
}

uint32_t address_of_word(uint32_t index) { return kSharedBase + 4 * index; }

std::string writer_of(const SharedWord& word) {
  return describe_agent(word.agent) + " at " + to_string(current_block->sites[word.site].site);
}

void report_in_flight(const char* what, uint32_t index, const SharedWord& word, Site site) {
  report(Kind::kInFlight, site,
         "%s of shared address %u while an async copy into it is in flight, issued by %s", what,
         address_of_word(index), writer_of(word).c_str());
}

void report_unordered(const char* what, uint32_t index, const SharedWord& word, Site site) {
  report(Kind::kRaceShared, site,
         "%s of shared address %u, written by %s with nothing between that orders the two", what,
         address_of_word(index), writer_of(word).c_str());
}

void check_readers(const Lane& lane, uint32_t index, Site site) {
  Block& block = *current_block;
  const SharedReaders* readers = block.shared.readers(index);
  for (int warp = 0; warp < block.num_warps; warp++) {
    for (uint32_t rest = readers[warp].lanes; rest != 0; rest &= rest - 1) {
      const uint32_t thread = 32 * warp + std::countr_zero(rest);
      if (knows(lane, thread, readers[warp].time)) continue;
      report(Kind::kRaceShared, site,
             "write of shared address %u, read by %s with nothing between that orders the two",
             address_of_word(index), describe_agent(thread).c_str());
      return;
    }
  }
}

void check_overwrite(const Lane& lane, uint32_t index, uint8_t mask, Site site) {
  const SharedWord& word = current_block->shared.word(index);
  if (word.pending) {
    report_in_flight("write", index, word, site);
  } else if ((word.written & mask) != 0 && !knows(lane, word.agent, word.time)) {
    report_unordered("write", index, word, site);
  }
  check_readers(lane, index, site);
}

// The slow part of a read that found something amiss, or may have.
void check_read(uint32_t index, uint8_t mask, bool unordered, Site site) {
  const SharedWord& word = current_block->shared.word(index);
  if (word.pending) {
    report_in_flight("read", index, word, site);
  } else if ((word.valid & mask) != mask) {
    report(Kind::kUninitShared, site, "read of shared address %u, which was never written",
           address_of_word(index));
  } else if (unordered && (word.written & mask) != 0) {
    report_unordered("read", index, word, site);
  }
}

void clear_readers(uint32_t index) {
  SharedReaders* readers = current_block->shared.readers(index);
  for (int warp = 0; warp < current_block->num_warps; warp++) readers[warp].lanes = 0;
}

void add_reader(const Lane& lane, SharedReaders& readers) {
  const uint32_t bit = 1u << lane.index;
  if (__builtin_expect(readers.lanes != 0 && readers.time == lane.time, 1)) {
    readers.lanes |= bit;
    return;
  }
  if (readers.lanes == 0 || readers.time > lane.time) {
    // The earliest time serves for all: a later one would be asked of lanes that never reach it.
    readers.time = lane.time;
    readers.lanes |= bit;
    return;
  }
  if (readers.time < lane.time) {
    // Readers that this lane knows of are ordered before whoever is ordered after it.
    bool dominated = true;
    for (uint32_t rest = readers.lanes; rest != 0; rest &= rest - 1) {
      const uint32_t thread = 32 * lane.warp->index + std::countr_zero(rest);
      dominated &= knows(lane, thread, readers.time);
    }
    if (dominated) {
      readers = {lane.time, bit};
      return;
    }
  }
  readers.lanes |= bit;
}

}  // namespace

std::string describe_agent(uint32_t agent) {
  const uint32_t num_threads = current_block->num_threads;
  if (agent >= num_threads) return "TMA of mbarrier #" + std::to_string(agent - num_threads);
  return "warp " + std::to_string(agent / 32) + " lane " + std::to_string(agent % 32);
}

void shadow_read(Lane& lane, uint32_t address, uint32_t bytes, Site site) {
  Block& block = *current_block;
  const Range range = range_of(address, bytes);
  const SharedWord* words = &block.shared.word(0);
  SharedReaders* readers = block.shared.readers(range.first) + lane.warp->index;
  const uint32_t* known_times = lane.known.times().data();
  for (uint32_t i = range.first; i < range.end; i++, readers += block.num_warps) {
    const SharedWord& word = words[i];
    const bool whole = !word.pending && (word.valid & range.mask) == range.mask;
    const bool ordered = word.agent == lane.thread || known_times[word.agent] >= word.time;
    if (__builtin_expect(!whole || !ordered, 0)) check_read(i, range.mask, !ordered, site);
    add_reader(lane, *readers);
  }
}

void shadow_write(Lane& lane, uint32_t address, uint32_t bytes, Site site) {
  Block& block = *current_block;
  const Range range = range_of(address, bytes);
  const uint16_t id = block.sites.id(site);
  for (uint32_t i = range.first; i < range.end; i++) {
    check_overwrite(lane, i, range.mask, site);
    SharedWord& word = block.shared.word(i);
    const uint8_t valid = word.valid | range.mask;
    word = {lane.time, block.sequence, lane.thread, id, range.mask, valid, false, false};
    clear_readers(i);
  }
}

void shadow_issue(Lane& lane, uint32_t address, uint32_t bytes, uint32_t agent, uint32_t time,
                  Site site) {
  Block& block = *current_block;
  const Range range = range_of(address, bytes);
  const uint16_t id = block.sites.id(site);
  for (uint32_t i = range.first; i < range.end; i++) {
    check_overwrite(lane, i, range.mask, site);
    SharedWord& word = block.shared.word(i);
    word.pending = true;
    word.agent = static_cast<uint16_t>(agent);
    word.time = time;
    word.site = id;
  }
}

void shadow_land(uint32_t address, uint32_t bytes, uint32_t agent, uint32_t time, bool async,
                 Site site) {
  Block& block = *current_block;
  const Range range = range_of(address, bytes);
  const uint16_t id = block.sites.id(site);
  for (uint32_t i = range.first; i < range.end; i++) {
    block.shared.word(i) = {time,  block.sequence, static_cast<uint16_t>(agent), id, 0xf, 0xf,
                            false, async};
    clear_readers(i);
  }
}

void check_proxy(Lane& lane, uint32_t address, uint32_t bytes, Site site) {
  Block& block = *current_block;
  const Range range = range_of(address, bytes);
  for (uint32_t i = range.first; i < range.end; i++) {
    const SharedWord& word = block.shared.word(i);
    if (word.valid == 0 || word.async || word.agent >= block.num_threads) continue;
    const Lane& writer = block.lanes[word.agent];
    if (writer.proxy_fence > word.sequence || lane.proxy_fence > word.sequence) continue;
    report(Kind::kProxyFence, site,
           "shared address %u, written through the generic proxy by %s, "
           "is accessed by a TMA load without a fence_proxy_async",
           address_of_word(i), writer_of(word).c_str());
    return;
  }
}

}  // namespace flashinfer_lite::simt
