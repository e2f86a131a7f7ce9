// Plain loads and stores, which the checkers see only in a build with hooks (see hooks.cpp).
#include "simt/block.h"
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

// Two warps exchange words through plain pointers.
void raw_exchange(const Params& p) {
  const int thread = arch::thread_idx();
  uint32_t* words = reinterpret_cast<uint32_t*>(current_block->shared.at(arch::dynamic_smem()));
  words[thread] = p.in[p.is("global underrun") ? -1 - thread : thread];
  if (p.is("shared overrun")) words[kWords + thread] = 1;
  if (!p.is("no barrier")) arch::sync_threads();
  p.out[thread] = words[63 - thread];
  if (p.is("never written")) p.out[64 + thread] += 1;
  if (p.is("one word for all")) p.out[64] = words[thread];
}

constexpr Case kCases[] = {
    make_case<raw_exchange>("raw_exchange", 64),
};

}  // namespace

std::span<const Case> raw_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
