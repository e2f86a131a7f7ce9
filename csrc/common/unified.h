// The guard of the softmax with a unified maximum (FlashDecoding++, arXiv 2311.01282).
//
// exp(score - phi) with one phi for all keys needs no maximum of the row: partial numerators and
// denominators are plain sums. While phi lies below the row's maximum every term is larger than in
// a softmax on that maximum, so that nothing more underflows, and up to some distance nothing
// overflows. These bounds decide once per row, after its last key; a row outside of them is
// computed again by the online softmax. docs/flashdecoding_pp.md has the argument.
#pragma once

#include "common/types.h"

namespace flashinfer_lite {

// low < row_max - phi < high, in natural units of the score.
struct UnifiedGuard {
  double low;
  double high;
};

// exp(44) times 2^30 keys is 2^94, far from the overflow of float32 at 2^128, and an exponent below
// 64 in units of log2 is rounded by 2^-19 at most.
template <class Element>
constexpr UnifiedGuard kUnifiedGuard{0.0, 44.0};

// Probabilities are stored in V's type: at most 65504 = exp(11.09).
template <>
constexpr UnifiedGuard kUnifiedGuard<Float16>{0.0, 10.4};

// What became of a row.
enum class RowVerdict : uint8_t { kNoKey, kGood, kViolated };

}  // namespace flashinfer_lite
