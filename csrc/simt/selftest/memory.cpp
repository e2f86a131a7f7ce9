// Bounds, alignment and initialisation of shared and global memory; stacks and faults.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

void shared_store(const Params& p) {
  if (arch::thread_idx() != 0) return;
  const uint32_t end = word_address(kWords);
  arch::sts(end - 8, U32x2{});
  if (p.is("below")) arch::sts(word_address(-1), 1u);
  if (p.is("above")) arch::sts(end, 1u);
  if (p.is("at null")) arch::sts(0, 1u);
  if (p.is("before null")) arch::sts(0u - 4, 1u);
  if (p.is("over the end")) arch::sts(end - 8, U32x4{});
  if (p.is("word misaligned")) arch::sts(word_address(0) + 2, 1u);
  if (p.is("16 bytes misaligned")) arch::sts(word_address(2), U32x4{});
}

void shared_load(const Params& p) {
  if (arch::thread_idx() != 0) return;
  const uint32_t word = word_address(4);
  if (p.is("never written")) arch::lds<uint32_t>(word);
  arch::sts<uint16_t>(word, 1);
  if (p.is("half written")) arch::lds<uint32_t>(word);
  if (p.is("the other half")) arch::lds<uint16_t>(word + 2);
  arch::lds<uint16_t>(word);
  arch::sts<uint16_t>(word + 2, 2);
  arch::stg(p.out, arch::lds<uint32_t>(word));
  if (p.is("wider than what is written")) arch::lds<U32x2>(word);
  if (p.is("below")) arch::lds<uint32_t>(word_address(-1));
  if (p.is("above")) arch::lds<uint32_t>(word_address(kWords));
  if (p.is("8 bytes misaligned")) arch::lds<U32x2>(word_address(5));
}

// Shared memory does not survive a block.
void shared_of_two_blocks(const Params& p) {
  if (arch::thread_idx() != 0) return;
  if (arch::block_idx() == 0 || !p.is("left by another block")) arch::sts(word_address(0), 7u);
  arch::stg(p.out + arch::block_idx(), arch::lds<uint32_t>(word_address(0)));
}

// Two warps write the halves of one word.
void halves_of_a_word(const Params& p) {
  if (lane_idx() != 0) return;
  const uint32_t half = p.is("the same half") ? 0 : 2 * static_cast<uint32_t>(warp_idx());
  arch::sts<uint16_t>(word_address(0) + half, 1);
}

void global_store(const Params& p) {
  if (arch::thread_idx() != 0) return;
  arch::stg(p.out, 1u);
  arch::stg(reinterpret_cast<U32x2*>(p.out + kWords - 2), U32x2{});
  if (p.is("below")) arch::stg(p.out - 1, 1u);
  if (p.is("above")) arch::stg(p.out + kWords, 1u);
  if (p.is("over the end")) arch::stg(reinterpret_cast<U32x4*>(p.out + kWords - 2), U32x4{});
  if (p.is("at null")) arch::stg<uint32_t>(nullptr, 1u);
  if (p.is("misaligned")) arch::stg(reinterpret_cast<U32x4*>(p.out + 2), U32x4{});
  if (p.is("read-only")) arch::stg(const_cast<uint32_t*>(p.in), 1u);
  if (p.is("atomic, read-only")) arch::atomic_add(const_cast<uint32_t*>(p.in), 1u);
  if (p.is("atomic above")) arch::atomic_add(p.state + kWords, 1u);
}

void global_load(const Params& p) {
  if (arch::thread_idx() != 0) return;
  arch::ldg(p.in + kWords - 1);
  arch::prefetch_l2(p.in);
  arch::stg(reinterpret_cast<uint16_t*>(p.out), uint16_t{1});
  arch::ldg(reinterpret_cast<uint16_t*>(p.out));
  if (p.is("below")) arch::ldg(p.in - 1);
  if (p.is("above")) arch::ldg(p.in + kWords);
  if (p.is("misaligned")) arch::ldg(reinterpret_cast<const U32x2*>(p.in + 1));
  if (p.is("prefetch above")) arch::prefetch_l2(p.in + kWords);
  if (p.is("never written")) arch::ldg(p.out + 1);
  if (p.is("half written")) arch::ldg(p.out);
  if (p.is("atomic, never written")) arch::atomic_add(p.out + 1, 1u);
}

// A guard of the lanes beyond an odd length.
void guarded_load(const Params& p) {
  const int i = kWords - 20 + lane_idx();
  const uint32_t value = arch::predicate(i < kWords) ? arch::ldg(p.in + i) : 0;
  arch::stg(p.out + lane_idx(), value);
}

// In two launches: what one has written the next may read.
void write_then_read(const Params& p) {
  uint32_t* mine = p.out + lane_idx();
  if (p.is("write")) arch::stg(mine, 1u);
  if (p.is("read")) arch::stg(p.out + 64 + lane_idx(), arch::ldg(p.out + 31 - lane_idx()));
}

template <int kBytes>
__attribute__((noinline)) uint8_t fill_stack() {
  volatile uint8_t bytes[kBytes];
  for (int i = 0; i < kBytes; ++i) bytes[i] = static_cast<uint8_t>(i);
  return bytes[kBytes - 1];
}

void deep_stack(const Params& p) {
  arch::sync_warp();
  const bool deep = p.is("48 KiB") && arch::thread_idx() == 5;
  const uint32_t last = deep ? fill_stack<48 * 1024>() : fill_stack<8 * 1024>();
  arch::stg(p.out + arch::thread_idx(), last);
}

void wild_pointer(const Params& p) {
  volatile const uint32_t* beyond = p.in + kWords + 1024;
  arch::sync_warp();
  if (p.is("used") && arch::thread_idx() == 3) beyond[0];
}

constexpr Case kCases[] = {
    make_case<shared_store>("shared_store", 32),
    make_case<shared_load>("shared_load", 32),
    make_case<shared_of_two_blocks>("shared_of_two_blocks", 32, 2),
    make_case<halves_of_a_word>("halves_of_a_word", 64),
    make_case<global_store>("global_store", 32),
    make_case<global_load>("global_load", 32),
    make_case<guarded_load>("guarded_load", 32),
    make_case<write_then_read>("write_then_read", 32),
    make_case<deep_stack>("deep_stack", 32),
    make_case<wild_pointer>("wild_pointer", 32),
};

}  // namespace

std::span<const Case> memory_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
