// Warp collectives that pass registers. None of them orders memory, except sync_warp.
#pragma once

#include <bit>
#include <cstdint>

#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

struct ShuffleArgument {
  uint32_t value;
  uint32_t source_lane;
  uint32_t result;
};

struct VoteArgument {
  bool predicate;
  uint32_t result;
};

void perform_shuffle(Lane* lanes, uint32_t mask);
void perform_vote(Lane* lanes, uint32_t mask);

inline constexpr Collective kSyncWarp{Op::kSyncWarp, false, true, nullptr};
inline constexpr Collective kShuffle{Op::kShuffle, false, false, perform_shuffle};
inline constexpr Collective kVote{Op::kVote, false, false, perform_vote};

void sync_warp(uint32_t mask, Site site);

FIL_SIMT_INLINE uint32_t shuffle(uint32_t value, uint32_t source_lane, Site site) {
  ShuffleArgument argument{value, source_lane & 31, 0};
  meet(kShuffle, 0xffffffffu, &argument, site);
  return argument.result;
}

FIL_SIMT_INLINE uint32_t vote(bool predicate, Site site) {
  VoteArgument argument{predicate, 0};
  meet(kVote, 0xffffffffu, &argument, site);
  return argument.result;
}

// Identity; true if disabled at its site.
bool predicate(bool value, Site site);

}  // namespace flashinfer_lite::simt
