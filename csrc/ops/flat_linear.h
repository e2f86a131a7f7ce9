// Checks of flat_linear, for both halves of the library.
#pragma once

#include "common/params/flat_linear.h"
#include "ops/check.h"

namespace flashinfer_lite {

inline FlatLinearKernel flat_linear_kernel(const std::string& name) {
  if (name == "gemv") return FlatLinearKernel::kGemv;
  check(name == "flat_gemm", "kernel: expected gemv or flat_gemm, got ", name);
  return FlatLinearKernel::kFlatGemm;
}

inline void check_matrix(const char* name, const Tensor& x, const char* dims) {
  check(x.dim() == 2, name, ": expected 2 dimensions ", dims, ", got ", shape_text(x));
  check_last_stride(name, x);
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
  check_matrix("x", x, "[M, K]");
  check_device("weight", weight, "x's", x);
  check_dtype("weight", weight, type);
  check_matrix("weight", weight, "[N, K]");
  p.m = x.size(0);
  p.n = weight.size(0);
  p.k = x.size(1);
  check_shape("weight", weight, {p.n, p.k});
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  p.weight = weight.data_ptr();
  p.weight_row = weight.stride(0);
  if (!bias) return;
  check_device("bias", *bias, "x's", x);
  check_dtype("bias", *bias, type);
  check_shape("bias", *bias, {p.n});
  check_last_stride("bias", *bias);
  p.bias = bias->data_ptr();
}

inline Tensor new_flat_linear_out(FlatLinearParams& p, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {p.m, p.n}, x.scalar_type());
  p.out = out.data_ptr();
  p.out_row = p.n;
  return out;
}

// The caller's own out, of flat_linear.out.
inline void set_flat_linear_out(FlatLinearParams& p, const Tensor& x, const Tensor& out) {
  check_device("out", out, "x's", x);
  check_dtype("out", out, x.scalar_type());
  check_shape("out", out, {p.m, p.n});
  check_last_stride("out", out);
  check(p.m <= 1 || p.n == 0 || out.stride(0) >= p.n,
        "out: expected rows that do not overlap (row stride at least ", p.n, "), got stride ",
        out.stride(0));
  p.out = out.data_ptr();
  p.out_row = out.stride(0);
}

}  // namespace flashinfer_lite
