// ldmatrix and mma.m16n8k16, performed for a whole warp by the last lane to arrive.
#pragma once

#include <cstdint>

#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

struct LdmatrixArgument {
  uint32_t* registers;  // [4]
  uint32_t address;
  bool transpose;
};

// `count` products that share `a`: d[i] += a b[i].
struct MmaArgument {
  float* d;           // [count][4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [count][2]
  int count;
};

void perform_ldmatrix(Lane* lanes, uint32_t mask);
template <class Element>
void perform_mma(Lane* lanes, uint32_t mask);

inline constexpr Collective kLdmatrix{Op::kLdmatrix, true, false, perform_ldmatrix};
template <class Element>
inline constexpr Collective kMma{Op::kMma, true, false, perform_mma<Element>};

FIL_SIMT_INLINE void ldmatrix_x4(uint32_t* registers, uint32_t address, bool transpose, Site site) {
  LdmatrixArgument argument{registers, address, transpose};
  meet(kLdmatrix, 0xffffffffu, &argument, site);
}

template <class Element>
FIL_SIMT_INLINE void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, int count,
                                  Site site) {
  MmaArgument argument{d, a, b, count};
  meet(kMma<Element>, 0xffffffffu, &argument, site);
}

}  // namespace flashinfer_lite::simt
