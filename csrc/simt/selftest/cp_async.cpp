// cp.async, its groups and its waits.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

constexpr int kChunkWords = 4;

uint32_t chunk_of(int stage, int lane) {
  return word_address(kChunkWords * (stage * kWarpSize + lane));
}

void copy_chunk(const Params& p, int stage) {
  const int first = kChunkWords * (stage * kWarpSize + lane_idx());
  arch::cp_async_16(chunk_of(stage, lane_idx()), p.in + first, 16);
}

void write_out(const Params& p, int stage) {
  const int first = kChunkWords * (stage * kWarpSize + lane_idx());
  const auto chunk = arch::lds<U32x4>(chunk_of(stage, lane_idx() ^ 1));
  arch::stg(reinterpret_cast<U32x4*>(p.out + first), chunk);
}

void wait_for_second(const Params& p) {
  if (p.is("wait off by one")) {
    arch::cp_async_wait<1>();
  } else {
    arch::cp_async_wait<0>();
  }
}

// Two groups in flight, then the first buffer once more. Lanes read what their neighbours copied.
void copy_pipeline(const Params& p) {
  copy_chunk(p, 0);
  arch::cp_async_commit();
  copy_chunk(p, 1);
  if (!p.is("second group not committed")) arch::cp_async_commit();
  if (p.is("overwritten in flight")) arch::sts(chunk_of(0, lane_idx()), 0u);
  if (!p.is("first group not waited for")) arch::cp_async_wait<1>();
  if (!p.is("no sync_warp")) arch::sync_warp();
  write_out(p, 0);
  wait_for_second(p);
  arch::sync_warp();
  write_out(p, 1);
  if (p.is("refilled while others read")) arch::sts(chunk_of(1, lane_idx()), 0u);
  if (!p.is("copied over while others read")) arch::sync_warp();
  copy_chunk(p, 1);
  arch::cp_async_commit();
  if (!p.is("not waited for at the end")) arch::cp_async_wait<0>();
}

uint32_t destination_of(const Params& p) {
  if (p.is("destination misaligned")) return word_address(2);
  if (p.is("destination beyond the end")) return word_address(kWords);
  return word_address(0);
}

const uint32_t* source_of(const Params& p) {
  if (p.is("source misaligned")) return p.in + 1;
  if (p.is("source beyond the end") || p.is("nothing valid beyond the end")) return p.in + kWords;
  return p.in;
}

int valid_bytes_of(const Params& p) {
  if (p.is("nothing valid beyond the end")) return 0;
  return p.is("17 bytes") ? 17 : 6;
}

// Six of 16 bytes; the rest is zero.
void copy_one(const Params& p) {
  if (arch::thread_idx() != 0) return;
  arch::cp_async_16(destination_of(p), source_of(p), valid_bytes_of(p));
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  const auto chunk = arch::lds<U32x4>(word_address(0));
  arch::stg(reinterpret_cast<U32x4*>(p.out), chunk);
}

constexpr Case kCases[] = {
    make_case<copy_pipeline>("copy_pipeline", 32),
    make_case<copy_one>("copy_one", 32),
};

}  // namespace

std::span<const Case> cp_async_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
