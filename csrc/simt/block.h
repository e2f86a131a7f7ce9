// A thread block in execution. Each OS thread owns one and runs block after block in it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "simt/barrier.h"
#include "simt/clock.h"
#include "simt/fiber.h"
#include "simt/global_memory.h"
#include "simt/lane.h"
#include "simt/mbarrier.h"
#include "simt/report.h"
#include "simt/session.h"
#include "simt/shared_memory.h"

namespace flashinfer_lite::simt {

struct Launch {
  uint32_t num_blocks;
  uint32_t num_threads;
  uint32_t smem_bytes;
  void (*kernel)(const void* params);
  const void* params;
};

struct Block {
  explicit Block(Session& session);

  // Makes room for the threads of a launch.
  void prepare(const Launch& launch);
  // Runs one block to its end, or until a fatal finding.
  void run(uint32_t block_index);

  int num_agents() const { return num_threads + kMaxMbarriers; }
  bool is_main() const { return current_lane == &main_lane; }

  Session& session;
  const Options& options;
  const Launch* launch = nullptr;
  SiteTable sites;
  Findings findings;
  Totals totals;

  uint32_t index = 0;
  uint32_t serial = 0;  // unique over the launches of a session
  int num_threads = 0;
  int num_warps = 0;
  uint32_t live_threads = 0;
  uint32_t sequence = 0;  // counts barriers and proxy fences
  bool aborted = false;

  SharedMemory shared;
  std::unique_ptr<FiberStacks> stacks;
  std::unique_ptr<ClockPool> clocks;  // outlives the references in lanes and barriers
  std::vector<Lane> lanes;
  std::array<Warp, kMaxWarps> warps;
  std::array<Barrier, kNumBarriers> barriers;
  Mbarriers mbarriers;
  std::vector<Acquisition> acquisitions;
  const Buffer* last_buffer = nullptr;

  Lane main_lane;
  void* main_stack_pointer = nullptr;

 private:
  void reset(uint32_t block_index);
  void finish();
};

extern constinit thread_local Block* current_block __attribute__((tls_model("initial-exec")));

// Records a finding. In a kernel it names block, warp and lane too.
void report(Kind kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
// Records a finding and abandons the block and the launch.
[[noreturn]] void fatal(Kind kind, Site site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace flashinfer_lite::simt
