// Barriers of a block: sync_threads, named barriers, and what a deadlock tells.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

// Two warps exchange words.
void block_exchange(const Params& p) {
  const int thread = arch::thread_idx();
  if (p.is("a warp has exited") && warp_idx() == 0) return;
  arch::sts(word_address(thread), static_cast<uint32_t>(thread));
  const bool skip = p.is("no barrier") || (p.is("a warp skips the barrier") && warp_idx() == 1) ||
                    (p.is("a lane skips the barrier") && thread == 7);
  if (p.is("from two lines") && thread % 2 == 1) {
    arch::sync_threads();
  } else if (!skip) {
    arch::sync_threads();
  }
  const int other = p.is("a warp has exited") ? thread : 63 - thread;
  arch::stg(p.out + thread, arch::lds<uint32_t>(word_address(other)));
}

// Two warps exchange words through one buffer, round after round.
void block_loop(const Params& p) {
  const int thread = arch::thread_idx();
  uint32_t value = static_cast<uint32_t>(thread);
  for (int round = 0; round < 3; ++round) {
    arch::sts(word_address(thread), value);
    arch::sync_threads();
    value = 1 + arch::lds<uint32_t>(word_address(63 - thread));
    if (!p.is("no barrier at the end of a round")) arch::sync_threads();
  }
  arch::stg(p.out + thread, value);
}

void block_or(const Params& p) {
  const int thread = arch::thread_idx();
  const bool odd = arch::sync_threads_or(thread == 40);
  const bool none = arch::sync_threads_or(false);
  arch::stg(p.out + thread, uint32_t{odd} + 2 * uint32_t{none});
}

// Warp 0 hands a buffer to warp 1, and takes it back, by two named barriers.
constexpr int kRounds = 3;
constexpr uint32_t kFull = 1;
constexpr uint32_t kEmpty = 2;

void fill(const Params& p) {
  const uint32_t mine = word_address(lane_idx());
  for (int round = 0; round < kRounds; ++round) {
    if (round > 0 && !p.is("producer does not wait")) arch::bar_sync(kEmpty, 64);
    arch::sts(mine, static_cast<uint32_t>(round));
    const bool last = round == kRounds - 1;
    if (!(last && p.is("last arrival is missing"))) arch::bar_arrive(kFull, 64);
    if (last && p.is("written after the arrival")) arch::sts(mine, 0u);
  }
}

void drain(const Params& p) {
  const uint32_t threads = p.is("counts differ") ? 32 : p.is("not whole warps") ? 48 : 64;
  uint32_t sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t id = p.is("no such barrier") ? 16 : kFull;
    if (!p.is("consumer does not wait")) arch::bar_sync(id, threads);
    sum += arch::lds<uint32_t>(word_address(31 - lane_idx()));
    const bool last = round == kRounds - 1;
    if (!last || p.is("an arrival too many")) arch::bar_arrive(kEmpty, 64);
  }
  arch::stg(p.out + lane_idx(), sum);
}

void named_barriers(const Params& p) {
  if (warp_idx() == 0) {
    fill(p);
  } else {
    drain(p);
  }
}

void wait_elsewhere() {
  if (warp_idx() == 1) {
    arch::bar_sync(1, 64);
  } else if (warp_idx() == 2 && lane_idx() < 16) {
    arch::shfl_xor(1, 1);
  } else if (warp_idx() == 3 && lane_idx() == 0) {
    arch::mbarrier_init(word_address(0), 1);
    arch::mbarrier_wait(word_address(0), 0);
  }
}

void four_warps_wait(const Params& p) {
  if (p.is("in four places") && warp_idx() != 0) {
    wait_elsewhere();
  } else {
    arch::sync_threads();
  }
}

constexpr Case kCases[] = {
    make_case<block_exchange>("block_exchange", 64),
    make_case<block_loop>("block_loop", 64),
    make_case<block_or>("block_or", 64),
    make_case<named_barriers>("named_barriers", 64),
    make_case<four_warps_wait>("four_warps_wait", 128),
};

}  // namespace

std::span<const Case> barrier_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
