// A session: options, registered buffers and results of the launches between its begin and end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "simt/global_memory.h"
#include "simt/report.h"
#include "simt/site.h"

namespace flashinfer_lite::simt {

struct Block;

struct Options {
  bool check_races = true;     // races, uninitialised reads, copies in flight
  bool count_accesses = true;  // wavefronts and sectors
  bool eager_copies = false;   // async copies land at their issue, not at their wait
  uint64_t seed = 0;           // of the order of the blocks; 0 = ascending
  int os_threads = 1;
  size_t stack_bytes = 32 * 1024;  // per CUDA thread
  std::vector<DisabledSite> disabled;
};

class Session {
 public:
  explicit Session(Options options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Findings go to the report; a fatal one abandons the launch.
  void launch(uint32_t blocks, uint32_t threads, uint32_t smem_bytes,
              void (*kernel)(const void* params), const void* params);

  const Options& options() const { return options_; }
  GlobalMemory& memory() { return memory_; }
  Report report() const;

 private:
  Options options_;
  GlobalMemory memory_;
  Totals totals_;
  Findings refused_;  // launches that never started
  uint32_t next_serial_ = 1;
  std::vector<std::unique_ptr<Block>> blocks_;  // one per OS thread, kept between launches
};

// The session of this OS thread; null outside of any.
Session* current_session();
void set_current_session(Session* session);

// Runs the kernel in the current session and returns 0. Without a session it runs unchecked, and
// returns 1 if even so something was found.
int launch(uint32_t blocks, uint32_t threads, uint32_t smem_bytes,
           void (*kernel)(const void* params), const void* params);

}  // namespace flashinfer_lite::simt
