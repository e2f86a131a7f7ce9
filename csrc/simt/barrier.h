// The 16 hardware barriers of a block; number 0 is also sync_threads.
#pragma once

#include <array>
#include <cstdint>

#include "simt/clock.h"
#include "simt/site.h"

namespace flashinfer_lite::simt {

struct Block;

inline constexpr int kNumBarriers = 16;
inline constexpr int kMaxWarps = 32;

struct Barrier {
  bool all_threads = false;  // sync_threads: as many as have not exited
  uint32_t threads = 0;      // expected in this phase
  uint32_t arrived = 0;
  std::array<uint32_t, kMaxWarps> waiting{};  // lanes, per warp
  std::array<uint32_t, kMaxWarps> present{};  // lanes that waited or arrived
  std::array<Site, kMaxWarps> warp_site{};
  ClockRef joined;
  Site site;
  bool any = false;     // or of the predicates so far
  bool result = false;  // of the previous phase
};

void sync_threads(Site site);
bool sync_threads_or(bool predicate, Site site);
void bar_sync(uint32_t id, uint32_t threads, Site site);
void bar_arrive(uint32_t id, uint32_t threads, Site site);

// Called when a thread exits: sync_threads may now be complete without it.
void recheck_sync_threads(Block& block);
void report_unfinished_barriers(Block& block);

}  // namespace flashinfer_lite::simt
