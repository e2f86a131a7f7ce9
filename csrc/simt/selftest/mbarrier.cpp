// Transaction barriers without transactions.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

bool every_lane_arrives(const Params& p) {
  return p.is("every lane arrives") || p.is("count too low");
}

uint32_t arrivals(const Params& p) {
  if (p.is("count too low")) return 16;
  if (p.is("count too high") || p.is("polling in vain")) return 2;
  return every_lane_arrives(p) ? 32 : 1;
}

void read_and_release(const Params& p, uint32_t barrier) {
  arch::stg(p.out + lane_idx(), arch::lds<uint32_t>(word_address(lane_idx())));
  if (every_lane_arrives(p)) return arch::mbarrier_arrive(barrier);
  if (!p.is("no sync_warp")) arch::sync_warp();
  if (arch::elect_one()) arch::mbarrier_arrive(barrier);
}

void wait_and_overwrite(const Params& p, uint32_t barrier) {
  if (p.is("polling") || p.is("polling in vain")) {
    while (!arch::mbarrier_test_wait(barrier, 0)) {
    }
  } else {
    arch::mbarrier_wait(barrier, p.is("wrong parity") ? 1 : 0);
  }
  arch::sts(word_address(lane_idx()), 2u);
}

// Warp 0 reads, its elected lane arrives, warp 1 waits and overwrites.
void elected_arrive(const Params& p) {
  const uint32_t barrier = word_address(64);
  if (arch::thread_idx() == 0 && !p.is("not initialised")) {
    arch::mbarrier_init(barrier, arrivals(p));
  }
  if (warp_idx() == 0) arch::sts(word_address(lane_idx()), 1u);
  if (!p.is("initialisation is not ordered")) arch::sync_threads();
  if (warp_idx() == 0) {
    read_and_release(p, barrier);
  } else {
    wait_and_overwrite(p, barrier);
  }
}

void many_mbarriers(const Params& p) {
  if (arch::thread_idx() != 0) return;
  for (int i = 0; i < p.number; ++i) arch::mbarrier_init(word_address(2 * i), 1);
  if (p.is("misaligned")) arch::mbarrier_init(word_address(1), 1);
  if (p.is("beyond the end")) arch::mbarrier_init(word_address(kWords), 1);
}

constexpr Case kCases[] = {
    make_case<elected_arrive>("elected_arrive", 64),
    make_case<many_mbarriers>("many_mbarriers", 32),
};

}  // namespace

std::span<const Case> mbarrier_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
