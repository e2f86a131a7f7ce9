// Division by a number that only the run time knows, as a multiplication.
#pragma once

#include <cstdint>

namespace flashinfer_lite {

// Granlund and Montgomery, "Division by invariant integers using multiplication" (PLDI 1994),
// theorem 4.2, for dividends of 31 bits: floor(n / value) is exact for 0 <= n < 2^31.
struct Divisor {
  int32_t value = 1;
  uint32_t multiplier = 1u << 31;  // 2^(31 + shift) / value, rounded up
  int32_t shift = 0;               // log2 of value, rounded up

  constexpr Divisor() = default;
  constexpr explicit Divisor(int32_t divisor) : value(divisor) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    const auto whole = static_cast<uint32_t>(divisor);
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + whole - 1) / whole);
  }

  constexpr int32_t divide(int32_t n) const {
    const uint64_t doubled = static_cast<uint32_t>(n) << 1;
    return static_cast<int32_t>(static_cast<uint32_t>(doubled * multiplier >> 32) >> shift);
  }
};

}  // namespace flashinfer_lite
