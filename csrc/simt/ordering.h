// Happens-before between the agents of a block.
#pragma once

#include <cstdint>

#include "simt/clock.h"
#include "simt/lane.h"

namespace flashinfer_lite::simt {

// Does the lane know of what `agent` did at `time`?
inline bool knows(const Lane& lane, uint32_t agent, uint32_t time) {
  return agent == lane.thread || lane.known.times()[agent] >= time;
}

// Joins what the lanes know and did into `joined`.
void release(ClockRef& joined, Warp& warp, uint32_t mask);
// The lanes all took part in `joined`, and wait for all of it: now they know just that.
void adopt(const ClockRef& joined, Warp& warp, uint32_t mask);
// The lanes learn `what` besides what they know.
void acquire(const ClockRef& what, Warp& warp, uint32_t mask);

}  // namespace flashinfer_lite::simt
