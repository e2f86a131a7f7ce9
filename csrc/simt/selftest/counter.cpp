// Access patterns whose wavefronts and sectors are known. `number` is the stride from lane to lane.
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

// Element i * stride of an array of T, for lane i. With stride 0 one lane writes what all read.
template <class T>
void shared_stride(const Params& p) {
  const int lane = lane_idx();
  const uint32_t address =
      arch::dynamic_smem() + sizeof(T) * static_cast<uint32_t>(lane * p.number);
  if (p.number != 0 || lane == 0) arch::sts(address, T{});
  arch::sync_warp();
  if (!p.is("half of the lanes") || lane % 2 == 0) arch::lds<T>(address);
}

template <class T>
void global_stride(const Params& p) {
  const int lane = lane_idx();
  const int offset = p.is("one element off") ? 1 : 0;
  arch::ldg(reinterpret_cast<const T*>(p.in) + lane * p.number + offset);
  if (p.number == 0) return;
  arch::stg(reinterpret_cast<T*>(p.out) + lane * p.number + offset, T{});
}

// Rows of 64 elements of 2 bytes, in chunks of 16 bytes.
uint32_t chunk_address(const Params& p, int row, int chunk) {
  const int row_words = p.is("padded") ? 36 : 32;
  const int column = p.is("swizzled") ? chunk ^ row % 8 : chunk;
  return word_address(row * row_words + 4 * column);
}

void ldmatrix_rows(const Params& p) {
  const int lane = lane_idx();
  for (int chunk = 0; chunk < 8; ++chunk) {
    for (int row = lane / 8; row < 16; row += 4) {
      if (lane % 8 == chunk) arch::sts(chunk_address(p, row, chunk), U32x4{});
    }
  }
  arch::sync_warp();
  uint32_t r[4];
  arch::ldmatrix_x4(r, chunk_address(p, lane % 16, lane / 16));
}

void copy_stride(const Params& p) {
  const int lane = lane_idx();
  arch::cp_async_16(word_address(4 * lane * p.number), p.in + 4 * lane * p.number, 16);
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
}

void atomic_stride(const Params& p) { arch::atomic_add(p.state + lane_idx() * p.number, 1u); }

// Lanes pass one line a different number of times, half of them through a branch.
void uneven_loop(const Params& p) {
  const int lane = lane_idx();
  if (lane % 2 == 1) arch::ldg(p.in);
  for (int i = 0; i <= lane / 16; ++i) arch::ldg(p.in + 32 * i + lane);
}

void grid_of_patterns(const Params& p) {
  const int i = kWarpSize * arch::block_idx() + lane_idx();
  arch::sts(word_address((arch::block_idx() + 1) * lane_idx()), arch::ldg(p.in + i));
  arch::stg(p.out + i, arch::lds<uint32_t>(word_address((arch::block_idx() + 1) * lane_idx())));
  arch::atomic_add(p.state, 1u);
}

constexpr Case kCases[] = {
    make_case<shared_stride<uint16_t>>("shared_stride<2>", 32),
    make_case<shared_stride<uint32_t>>("shared_stride<4>", 32),
    make_case<shared_stride<U32x2>>("shared_stride<8>", 32),
    make_case<shared_stride<U32x4>>("shared_stride<16>", 32),
    make_case<global_stride<uint32_t>>("global_stride<4>", 32),
    make_case<global_stride<U32x2>>("global_stride<8>", 32),
    make_case<global_stride<U32x4>>("global_stride<16>", 32),
    make_case<ldmatrix_rows>("ldmatrix_rows", 32),
    make_case<copy_stride>("copy_stride", 32),
    make_case<atomic_stride>("atomic_stride", 32),
    make_case<uneven_loop>("uneven_loop", 32),
    make_case<grid_of_patterns>("grid_of_patterns", 32, 8),
};

}  // namespace

std::span<const Case> counter_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
