// Checks of flat_linear, for both halves of the library.
#pragma once

#include <algorithm>

#include "common/params/flat_linear.h"
#include "ops/check.h"

namespace flashinfer_lite {

inline FlatLinearKernel flat_linear_kernel(const std::string& name) {
  if (name == "gemv") return FlatLinearKernel::kGemv;
  check(name == "flat_gemm", "kernel: expected gemv or flat_gemm, got ", name);
  return FlatLinearKernel::kFlatGemm;
}

struct Rows {
  int64_t count = 1;
  int64_t stride = 0;  // in elements
};

// The rows of [..., columns]: leading dimensions that are one run of rows at one stride.
inline Rows check_rows(const char* name, const Tensor& x) {
  if (x.dim() < 1) fail(name, ": expected 1 dimension or more, got ", shape_text(x));
  check_last_stride(name, x);
  Rows rows;
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    const int64_t size = x.size(i), stride = x.stride(i);
    if (rows.count == 1 && size != 1) {
      rows.stride = stride;
    } else if (size > 1 && rows.count > 1 && stride != rows.count * rows.stride) {
      fail(name, ": expected leading dimensions that merge into rows of one stride, got stride ",
           stride, " in dimension ", i, " of ", shape_text(x));
    }
    rows.count *= size;
  }
  return rows;
}

// Checks the inputs and fills p but for the output.
inline void set_flat_linear(FlatLinearParams& p, const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias, DeviceType backend) {
  const ScalarType type = x.scalar_type();
  check_backend("x", x, backend);
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (backend == DeviceType::CPU) {
    check(narrow || type == ScalarType::Float,
          "x: expected dtype float32, bfloat16 or float16, got ", dtype_text(type));
  } else {
    check(narrow, "x: expected dtype bfloat16 or float16 on CUDA, got ", dtype_text(type));
  }
  const Rows rows = check_rows("x", x);
  check_device("weight", weight, "x's", x);
  check_dtype("weight", weight, type);
  if (weight.dim() != 2) {
    fail("weight: expected 2 dimensions [N, K], got ", shape_text(weight));
  }
  check_last_stride("weight", weight);
  p.m = rows.count;
  p.n = weight.size(0);
  p.k = x.size(x.dim() - 1);
  check_shape("weight", weight, {p.n, p.k});
  p.x = x.data_ptr();
  p.x_row = rows.stride;
  p.weight = weight.data_ptr();
  p.weight_row = weight.stride(0);
  if (!bias) return;
  check_device("bias", *bias, "x's", x);
  check_dtype("bias", *bias, type);
  check_shape("bias", *bias, {p.n});
  check_last_stride("bias", *bias);
  p.bias = bias->data_ptr();
}

// [..., N] like x, contiguous.
inline Tensor new_flat_linear_out(FlatLinearParams& p, const Tensor& x) {
  std::vector<int64_t> sizes(x.dim(), p.n);
  for (int64_t i = 0; i < x.dim() - 1; ++i) sizes[i] = x.size(i);
  Tensor out = new_tensor(x, sizes, x.scalar_type());
  p.out = out.data_ptr();
  p.out_row = p.n;
  return out;
}

// Whether out [m, n] and `rows` rows of `columns` elements at `data` may share memory: they do not
// where both lie in the same wider rows, side by side.
inline bool meets_out(const FlatLinearParams& p, int64_t element_size, const void* data,
                      int64_t rows, int64_t row, int64_t columns) {
  if (p.m == 0 || p.n == 0 || rows == 0 || columns == 0) return false;
  const auto first = reinterpret_cast<intptr_t>(data), out = reinterpret_cast<intptr_t>(p.out);
  const int64_t last = first + ((rows - 1) * row + columns) * element_size;
  const int64_t out_last = out + ((p.m - 1) * p.out_row + p.n) * element_size;
  if (last <= out || out_last <= first) return false;
  if (row != p.out_row || row <= 0) return true;
  const int64_t width = row * element_size;
  const int64_t ahead = ((first - out) % width + width) % width;  // from out's columns to these
  return ahead < p.n * element_size || ahead + columns * element_size > width;
}

// The caller's own out, of flat_linear.out.
inline void set_flat_linear_out(FlatLinearParams& p, const Tensor& x, const Tensor& out) {
  check_device("out", out, "x's", x);
  check_dtype("out", out, x.scalar_type());
  const int64_t dims = x.dim();
  bool fits = out.dim() == dims && out.size(dims - 1) == p.n;
  for (int64_t i = 0; fits && i + 1 < dims; ++i) fits = out.size(i) == x.size(i);
  if (!fits) {
    fail("out: expected the shape of x ", shape_text(x), " with N = ", p.n, " for K, got ",
         shape_text(out));
  }
  const Rows rows = check_rows("out", out);
  check(p.m <= 1 || p.n == 0 || rows.stride >= p.n,
        "out: expected rows that do not overlap (row stride at least ", p.n, "), got stride ",
        rows.stride);
  p.out = out.data_ptr();
  p.out_row = rows.stride;
  const int64_t size = out.element_size();
  const char* shared = meets_out(p, size, p.x, p.m, p.x_row, p.k)             ? "x"
                       : meets_out(p, size, p.weight, p.n, p.weight_row, p.k) ? "weight"
                       : p.bias && meets_out(p, size, p.bias, 1, 0, p.n)      ? "bias"
                                                                              : nullptr;
  if (shared) fail("out: expected memory of its own, got some of ", shared, "'s");
}

}  // namespace flashinfer_lite
