// Who runs next. A lane that parks switches directly to the next runnable lane of its warp; the
// last lane to reach a warp collective performs it for all.
#pragma once

#include <cstdint>

#include "simt/cuda_keywords.h"
#include "simt/fiber.h"
#include "simt/lane.h"

namespace flashinfer_lite::simt {

using Perform = void (*)(Lane* lanes, uint32_t mask);

struct Collective {
  Op op;
  bool aligned;     // all lanes must call it from one site
  bool orders;      // it orders memory accesses
  Perform perform;  // may be null
};

// The running lane cannot go on: continues with another, of its warp if one is runnable.
void reschedule();
[[noreturn]] void exit_lane();
[[noreturn]] void switch_to_main();

void complete_collective(const Collective& collective, uint32_t mask);
[[noreturn]] void refuse_mask(uint32_t mask, Site site);

FIL_SIMT_INLINE void switch_to(Lane* next) {
  Lane* self = current_lane;
  current_lane = next;
  flashinfer_lite_simt_swap(&self->stack_pointer, next->stack_pointer);
}

// The runnable lane after `index`, around the ring. `ready` is not 0.
FIL_SIMT_INLINE int next_in_ring(uint32_t ready, int index) {
  const uint32_t after = ready & (~0u << index);
  return __builtin_ctz(after != 0 ? after : ready);
}

FIL_SIMT_INLINE void meet(const Collective& collective, uint32_t mask, void* argument, Site site) {
  Lane* self = current_lane;
  Warp& warp = *self->warp;
  mask &= warp.exist;
  const uint32_t bit = 1u << self->index;
  if (__builtin_expect((mask & bit) == 0, 0)) refuse_mask(mask, site);
  self->op = collective.op;
  self->mask = mask;
  self->argument = argument;
  self->site = site;
  warp.parked |= bit;
  if ((warp.parked & mask) == mask) {
    complete_collective(collective, mask);
  } else {
    warp.ready &= ~bit;
    if (__builtin_expect(warp.ready != 0, 1)) {
      switch_to(&warp.lanes[next_in_ring(warp.ready, self->index)]);
    } else {
      reschedule();
    }
  }
  self->op = Op::kRunning;
}

}  // namespace flashinfer_lite::simt
