// TMA loads, the mbarriers that they complete on, and the fences between the proxies.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

constexpr int kBoxRows = 8;
constexpr int kBoxWords = kBoxRows * kMapColumns;
constexpr uint32_t kBoxBytes = 4 * kBoxWords;

uint32_t expected_bytes(const Params& p) {
  if (p.is("expect_tx too high")) return 3 * kBoxBytes;
  if (p.is("expect_tx too low")) return kBoxBytes;
  return 2 * kBoxBytes;
}

uint32_t second_box(const Params& p) {
  if (p.is("destination misaligned")) return word_address(kBoxWords + 16);
  if (p.is("destination beyond the end")) return word_address(kWords - kBoxWords / 2);
  return word_address(kBoxWords);
}

void issue_loads(const Params& p, uint32_t barrier) {
  const TensorMap none{};
  const TensorMap* map = &p.map;
  if (p.is("not a tensor map")) map = &none;
  if (p.is("map longer than its buffer")) map = &p.map_too_long;
  arch::mbarrier_arrive_expect_tx(barrier, expected_bytes(p));
  if (p.is("arrives twice")) arch::mbarrier_arrive(barrier);
  arch::tma_load_2d(word_address(0), map, p.is("column off 16 bytes") ? 2 : 0, 0, barrier);
  arch::tma_load_2d(second_box(p), map, 0, kBoxRows, barrier);
  if (p.is("overwritten in flight")) arch::sts(word_address(0), 0u);
}

// Two boxes on one mbarrier, read by two warps.
void tma_boxes(const Params& p) {
  const int thread = arch::thread_idx();
  const uint32_t barrier = word_address(3 * kBoxWords);
  if (thread == 0 && !p.is("mbarrier not initialised")) arch::mbarrier_init(barrier, 1);
  if (thread == 0 && !p.is("no fence after the initialisation")) arch::fence_mbarrier_init();
  if (p.is("written before, no proxy fence") || p.is("written before")) {
    arch::sts(word_address(thread), 0u);
    if (p.is("written before")) arch::fence_proxy_async();
  }
  if (p.is("written after the proxy fence")) {
    arch::fence_proxy_async();
    arch::sts(word_address(thread), 0u);
  }
  arch::sync_threads();
  if (thread == 0) issue_loads(p, barrier);
  if (p.is("polling")) {
    while (!arch::mbarrier_test_wait(barrier, 0)) {
    }
  } else if (!(p.is("a warp does not wait") && warp_idx() == 0)) {
    arch::mbarrier_wait(barrier, 0);
  }
  for (int i = thread; i < 2 * kBoxWords; i += 64) {
    arch::stg(p.out + i, arch::lds<uint32_t>(word_address(i)));
  }
}

// A ring of two boxes: warp 0 fills, warp 1 drains.
constexpr int kTiles = kWords / kBoxWords;

uint32_t box_of(int stage) { return word_address(stage * kBoxWords); }
uint32_t full_of(int stage) { return word_address(2 * kBoxWords + 2 * stage); }
uint32_t empty_of(int stage) { return word_address(2 * kBoxWords + 4 + 2 * stage); }

void produce(const Params& p) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % 2;
    const uint32_t parity = tile / 2 % 2 ^ (p.is("wrong parity") ? 0 : 1);
    if (!p.is("empty is not waited for")) arch::mbarrier_wait(empty_of(stage), parity);
    arch::mbarrier_arrive_expect_tx(full_of(stage), kBoxBytes);
    arch::tma_load_2d(box_of(stage), &p.map, 0, tile * kBoxRows, full_of(stage));
  }
}

uint32_t sum_of_column(int stage) {
  uint32_t sum = 0;
  for (int row = 0; row < kBoxRows; ++row) {
    sum += arch::lds<uint32_t>(box_of(stage) + 4 * (row * kMapColumns + lane_idx()));
  }
  return sum;
}

void consume(const Params& p) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % 2;
    if (!p.is("full is not waited for")) arch::mbarrier_wait(full_of(stage), tile / 2 % 2);
    if (p.is("released early")) arch::mbarrier_arrive(empty_of(stage));
    arch::stg(p.out + tile * kWarpSize + lane_idx(), sum_of_column(stage));
    if (!p.is("released early")) arch::mbarrier_arrive(empty_of(stage));
  }
}

void tma_ring(const Params& p) {
  if (arch::thread_idx() == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      arch::mbarrier_init(full_of(stage), 1);
      arch::mbarrier_init(empty_of(stage), p.is("empty counts half a warp") ? 16 : 32);
    }
    arch::fence_mbarrier_init();
  }
  arch::sync_threads();
  if (warp_idx() == 1) return consume(p);
  if (arch::elect_one()) produce(p);
}

constexpr Case kCases[] = {
    make_case<tma_boxes>("tma_boxes", 64),
    make_case<tma_ring>("tma_ring", 64),
};

}  // namespace

std::span<const Case> tma_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
