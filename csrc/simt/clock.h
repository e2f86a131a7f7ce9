// Vector clocks. An agent is a thread or an mbarrier; a clock holds, for every agent, the latest
// time of it that is known. Threads that meet share one clock, so that meeting is cheap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace flashinfer_lite::simt {

class ClockPool;

struct Clock {
  std::vector<uint32_t> times;
  uint32_t references = 0;
  ClockPool* pool = nullptr;
};

// Owners are all on one OS thread.
class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) { clock_->references++; }
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_ != nullptr) clock_->references++;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef() {
    if (clock_ != nullptr && --clock_->references == 0) recycle();
  }

  explicit operator bool() const { return clock_ != nullptr; }
  Clock* get() const { return clock_; }
  const std::vector<uint32_t>& times() const { return clock_->times; }

 private:
  void recycle();

  Clock* clock_ = nullptr;
};

class ClockPool {
 public:
  explicit ClockPool(size_t num_agents) : num_agents_(num_agents) {}
  ClockPool(const ClockPool&) = delete;
  ClockPool& operator=(const ClockPool&) = delete;

  ClockRef zero();
  ClockRef copy(const ClockRef& from);

 private:
  friend class ClockRef;
  Clock* take();

  size_t num_agents_;
  std::vector<std::unique_ptr<Clock>> clocks_;
  std::vector<Clock*> free_;
};

// into[i] = max(into[i], from[i])
void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);

}  // namespace flashinfer_lite::simt
