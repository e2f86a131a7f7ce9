// Tensor core instructions.
#include <bit>

#include "simt/selftest/case.h"

namespace flashinfer_lite::simt::selftest {

namespace {

// in: a [16, 16] and the transpose of b [8, 16], two elements per word, then c [16, 8] in float.
constexpr int kRowWords = 8;
constexpr int kFirstB = 16 * kRowWords;
constexpr int kFirstC = kFirstB + 8 * kRowWords;

// Where element i of a lane's accumulator lies in c.
int accumulator_index(int i) {
  const int row = lane_idx() / 4 + i / 2 * 8;
  return row * 8 + lane_idx() % 4 * 2 + i % 2;
}

template <class Element>
void mma(const Params& p) {
  const int first = lane_idx() / 4 * kRowWords + lane_idx() % 4;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = arch::ldg(p.in + first + i % 2 * 8 * kRowWords + i / 2 * 4);
  for (int i = 0; i < 2; ++i) b[i] = arch::ldg(p.in + kFirstB + first + i * 4);
  for (int i = 0; i < 4; ++i) {
    d[i] = std::bit_cast<float>(arch::ldg(p.in + kFirstC + accumulator_index(i)));
  }
  if (p.is("from two lines") && lane_idx() < 16) {
    arch::mma_m16n8k16<Element>(d, a, b);
  } else {
    arch::mma_m16n8k16<Element>(d, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    arch::stg(p.out + accumulator_index(i), std::bit_cast<uint32_t>(d[i]));
  }
}

void ldmatrix(const Params& p) {
  const uint32_t mine = word_address(4 * lane_idx());
  arch::sts(mine, U32x4{});
  if (!p.is("no sync_warp")) arch::sync_warp();
  const int row = p.is("row beyond the end") ? kWords : p.is("row misaligned") ? 2 : 0;
  uint32_t r[4];
  if (p.is("from two lines") && lane_idx() < 16) {
    arch::ldmatrix_x4(r, mine);
  } else {
    arch::ldmatrix_x4(r, row == 0 ? word_address(4 * (lane_idx() ^ 1)) : word_address(row));
  }
}

constexpr Case kCases[] = {
    make_case<mma<BFloat16>>("mma<bfloat16>", 32),
    make_case<mma<Float16>>("mma<float16>", 32),
    make_case<ldmatrix>("ldmatrix", 32),
};

}  // namespace

std::span<const Case> tensor_cases() { return kCases; }

}  // namespace flashinfer_lite::simt::selftest
