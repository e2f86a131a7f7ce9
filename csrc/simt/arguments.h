// How Python hands the executor's module what a kernel works on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "common/params/attention_cuda.h"
#include "cuda/instance.h"

namespace flashinfer_lite::simt {

// (address, strides of batch, seqlen and head)
using StridedTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// (address, is_int64, stride)
using LengthsTuple = std::tuple<uintptr_t, bool, int64_t>;
// (address, is_int64, stride of sequences, stride of pages)
using TableTuple = std::tuple<uintptr_t, bool, int64_t, int64_t>;

constexpr const char* kElementNames[] = {"float32", "bfloat16", "float16"};

inline cuda::ElementType element_named(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kElementNames[i]) return static_cast<cuda::ElementType>(i);
  }
  throw std::invalid_argument("expected float32, bfloat16 or float16, got " + name);
}

template <class Pointer>
Strided<Pointer> strided(const StridedTuple& x) {
  const auto& [address, batch, seqlen, head] = x;
  return {reinterpret_cast<Pointer>(address), batch, seqlen, head};
}

inline LengthsView lengths_view(const LengthsTuple& x) {
  const auto& [address, is_int64, stride] = x;
  return {reinterpret_cast<const void*>(address), is_int64, stride};
}

// Of params that have a block_table, the cache that it is for.
template <class Params>
void set_block_table(Params& p, const TableTuple& x, int64_t num_pages, int64_t page_size) {
  const auto& [address, is_int64, batch, page] = x;
  p.device_block_table = {reinterpret_cast<const void*>(address), is_int64, batch, page};
  p.block_table = page_table(num_pages, page_size);
}

}  // namespace flashinfer_lite::simt
