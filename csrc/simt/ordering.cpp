#include "simt/ordering.h"

#include <algorithm>
#include <bit>

#include "simt/block.h"

namespace flashinfer_lite::simt {

void release(ClockRef& joined, Warp& warp, uint32_t mask) {
  const Clock* previous = nullptr;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Lane& lane = warp.lanes[std::countr_zero(rest)];
    const Clock* known = lane.known.get();
    if (known == previous) continue;
    previous = known;
    if (joined) {
      join(joined.get()->times, known->times);
    } else {
      joined = current_block->clocks->copy(lane.known);
    }
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Lane& lane = warp.lanes[std::countr_zero(rest)];
    joined.get()->times[lane.thread] = lane.time;
  }
}

void adopt(const ClockRef& joined, Warp& warp, uint32_t mask) {
  // One time for all lanes: the shadow keeps the readers of a warp as a time and a mask.
  uint32_t latest = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    latest = std::max(latest, warp.lanes[std::countr_zero(rest)].time);
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    Lane& lane = warp.lanes[std::countr_zero(rest)];
    lane.known = joined;
    lane.time = latest + 1;
  }
}

void acquire(const ClockRef& what, Warp& warp, uint32_t mask) {
  ClockRef before;
  ClockRef after;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    Lane& lane = warp.lanes[std::countr_zero(rest)];
    if (lane.known.get() != before.get()) {
      before = lane.known;
      after = current_block->clocks->copy(before);
      join(after.get()->times, what.times());
    }
    lane.known = after;
  }
}

}  // namespace flashinfer_lite::simt
