// Warp collectives, and what they order.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

constexpr uint32_t kLowerHalf = 0x0000ffff;
constexpr uint32_t kUpperHalf = 0xffff0000;

void order_warp(const Params& p) {
  const bool lower = lane_idx() < 16;
  if (p.is("no sync_warp")) return;
  if (p.is("a lane skips sync_warp") && lane_idx() == 3) return;
  if (p.is("masks differ")) {
    arch::sync_warp(lower ? kFullMask : kUpperHalf);
  } else if (p.is("lane outside its mask")) {
    arch::sync_warp(kLowerHalf);
  } else if (p.is("half by half")) {
    arch::sync_warp(lower ? kLowerHalf : kUpperHalf);
  } else if (p.is("another collective") && lower) {
    arch::shfl_xor(0, 1);
  } else if (p.is("a shuffle instead")) {
    arch::shfl_xor(0, 1);
  } else if (p.is("a vote instead")) {
    arch::any(true);
  } else {
    arch::sync_warp();
  }
}

void warp_exchange(const Params& p) {
  const int lane = lane_idx();
  arch::sts(word_address(lane), static_cast<uint32_t>(lane));
  order_warp(p);
  arch::stg(p.out + lane, arch::lds<uint32_t>(word_address(lane ^ 15)));
}

// A warp and a half.
void partial_warp(const Params& p) {
  const int thread = arch::thread_idx();
  const int distance = p.is("from a lane that does not exist") ? 16 : 8;
  uint32_t value = static_cast<uint32_t>(thread);
  if (!(p.is("under divergence") && thread < 4)) value = arch::shfl_xor(value, distance);
  const uint32_t first = arch::shfl(value, 0);
  arch::stg(p.out + thread, value + (first << 16));
}

constexpr Case kCases[] = {
    make_case<warp_exchange>("warp_exchange", 32),
    make_case<partial_warp>("partial_warp", 48),
};

}  // namespace

std::span<const Case> warp_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
