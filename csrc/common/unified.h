// The guard of the softmax with a unified maximum (FlashDecoding++, arXiv 2311.01282).
//
// exp(score - phi) with one phi for all keys needs no maximum of the row: partial numerators and
// denominators are plain sums. It is as exact as the online softmax as long as nothing overflows
// and nothing that matters underflows, which these bounds decide once per row, after its last key.
// A row outside of them is computed again by the online softmax. docs/flashdecoding_pp.md has the
// argument.
#pragma once

#include "common/types.h"

namespace flashinfer_lite {

// low < row_max - phi < high, in natural units of the score.
struct UnifiedGuard {
  double low;
  double high;
};

// exp(30) times 2^30 keys is 2^73, far from the overflow of float32 at 2^128; exp(-30) is 2^-43, so
// that what is flushed below 2^-126 is less than 2^-83 of the row's largest probability: it shows
// only where values of V lie more than 2^59 apart (the online softmax loses 2^-126: 2^102 apart).
template <class Element>
constexpr UnifiedGuard kUnifiedGuard{-30.0, 30.0};

// Probabilities are stored in V's type: at most 65504 = exp(11.09), and the row's largest no lower
// than the online softmax has it, 1, for they lose digits below 2^-14.
template <>
constexpr UnifiedGuard kUnifiedGuard<Float16>{0.0, 10.4};

// Where row_max < phi every probability is below 1, and a numerator with tiny values of V may
// underflow though the quotient would not: a row with no numerator above this is recomputed.
constexpr float kTinyNumerator = 0x1p-80f;

// What became of a row.
enum class RowVerdict : uint8_t { kNoKey, kGood, kViolated };

}  // namespace flashinfer_lite
