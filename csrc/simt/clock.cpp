#include "simt/clock.h"

#include <algorithm>

namespace flashinfer_lite::simt {

void ClockRef::recycle() { clock_->pool->free_.push_back(clock_); }

Clock* ClockPool::take() {
  if (free_.empty()) {
    clocks_.push_back(std::make_unique<Clock>());
    clocks_.back()->pool = this;
    return clocks_.back().get();
  }
  Clock* clock = free_.back();
  free_.pop_back();
  return clock;
}

ClockRef ClockPool::zero() {
  Clock* clock = take();
  clock->times.assign(num_agents_, 0);
  return ClockRef(clock);
}

ClockRef ClockPool::copy(const ClockRef& from) {
  Clock* clock = take();
  clock->times = from.times();
  return ClockRef(clock);
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  uint32_t* x = into.data();
  const uint32_t* y = from.data();
  const size_t size = into.size();
  for (size_t i = 0; i < size; i++) x[i] = std::max(x[i], y[i]);
}

}  // namespace flashinfer_lite::simt
