// State of a CUDA thread (a lane of a warp) and of a warp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "simt/access_log.h"
#include "simt/clock.h"
#include "simt/site.h"

namespace flashinfer_lite::simt {

struct Warp;

// What a lane is parked in.
enum class Op : uint8_t {
  kRunning,
  kSyncWarp,
  kShuffle,
  kVote,
  kLdmatrix,
  kMma,
  kBarrier,
  kMbarrier,
  kPoll,
  kExited,
};
inline constexpr std::array<const char*, 10> kOpNames = {
    "running",       "sync_warp",          "shuffle", "vote", "ldmatrix", "mma", "barrier",
    "mbarrier_wait", "mbarrier_test_wait", "exited"};

// A cp.async between its issue and its wait_group.
struct AsyncCopy {
  uint32_t destination;
  const void* source;
  uint32_t valid_bytes;
  uint32_t group;
  Site site;
};

// What one block made visible to the others by a fence and an atomic.
struct Publication {
  uint32_t block;
  std::shared_ptr<const std::vector<uint32_t>> times;
};

struct alignas(64) Lane {
  void* stack_pointer = nullptr;
  void* argument = nullptr;  // of the collective it is parked in
  Warp* warp = nullptr;
  uint32_t mask = 0;  // of that collective
  Op op = Op::kRunning;
  uint8_t index = 0;    // in the warp
  uint16_t thread = 0;  // in the block
  Site site;
  uint32_t barrier_id = 0;

  // Own time, and what is known of the others' times.
  uint32_t time = 1;
  ClockRef known;
  uint32_t proxy_fence = 0;  // sequence number of the latest fence_proxy_async

  std::vector<AsyncCopy> copies;
  uint32_t copy_group = 0;

  // The latest fence_gpu: what was known then, and the own time.
  ClockRef fenced;
  uint32_t fenced_time = 0;
  std::vector<Publication> taken;  // by atomics since then, usable after the next fence
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t exist = 0;    // lanes that were launched
  uint32_t live = 0;     // lanes that have not exited
  uint32_t parked = 0;   // lanes that wait in a warp collective
  uint32_t polling = 0;  // lanes that poll an mbarrier, while others can run and no phase completes
  int index = 0;
  Lane* lanes = nullptr;
  AccessLog log;
};

// The running lane. A fiber never moves to another OS thread, so its address may be kept.
extern constinit thread_local Lane* current_lane __attribute__((tls_model("initial-exec")));

}  // namespace flashinfer_lite::simt
