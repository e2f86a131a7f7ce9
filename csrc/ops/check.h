// Checks that guard memory, repeated in C++ because torch.ops is callable by anyone. Messages name
// the argument, what was wanted and what came. Never thrown from a parallel region.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace flashinfer_lite {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

template <class... Args>
void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

// [2, 3] when streamed, of a tensor that outlives it: no text is made for a check that passes.
struct ShapeText {
  const Tensor& x;
};
inline ShapeText shape_text(const Tensor& x) { return {x}; }
inline std::ostream& operator<<(std::ostream& text, ShapeText shape) {
  text << '[';
  for (int64_t i = 0; i < shape.x.dim(); ++i) text << (i ? ", " : "") << shape.x.size(i);
  return text << ']';
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline ScalarType accumulator_type(ScalarType element) {
  return element == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// cpu, cuda:0 likewise.
struct DeviceText {
  const Tensor& x;
};
inline DeviceText device_text(const Tensor& x) { return {x}; }
inline std::ostream& operator<<(std::ostream& text, DeviceText device) {
  if (device.x.is_cpu()) return text << "cpu";
  if (device.x.is_cuda()) return text << "cuda:" << device.x.get_device_index();
  return text << "another device";
}

// The tensor that decides the device: one of the kind that this half of the library serves.
inline void check_backend(const char* name, const Tensor& x, DeviceType backend) {
  const bool is_cpu = backend == DeviceType::CPU;
  check(is_cpu ? x.is_cpu() : x.is_cuda(), name, ": expected a ", is_cpu ? "CPU" : "CUDA",
        " tensor, got one on ", device_text(x));
}

// `whose`: the owner of the device wanted, as in "q's".
inline void check_device(const char* name, const Tensor& x, const char* whose, const Tensor& like) {
  const bool same =
      like.is_cpu() ? x.is_cpu() : x.is_cuda() && x.get_device_index() == like.get_device_index();
  check(same, name, ": expected ", whose, " device ", device_text(like), ", got ", device_text(x));
}

// The dtypes that this half of the library computes with.
inline void check_element_type(const char* name, ScalarType type, DeviceType backend) {
  const bool narrow =
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (backend == DeviceType::CPU) {
    check(narrow || type == ScalarType::Double, name,
          ": expected dtype float64, float32, bfloat16 or float16, got ", dtype_text(type));
  } else {
    check(narrow, name, ": expected dtype float32, bfloat16 or float16 on CUDA, got ",
          dtype_text(type));
  }
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType wanted) {
  const ScalarType got = x.scalar_type();
  check(got == wanted, name, ": expected dtype ", dtype_text(wanted), ", got ", dtype_text(got));
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> wanted) {
  bool same = x.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  for (const int64_t size : wanted) same = same && x.size(i++) == size;
  if (same) return;
  std::ostringstream text;
  for (const int64_t size : wanted) text << (text.tellp() > 0 ? ", " : "") << size;
  fail(name, ": expected shape [", text.str(), "], got ", shape_text(x));
}

// The last dimension's stride is free where nothing is read with it.
inline void check_last_stride(const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  check(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, name,
        ": expected the last dimension contiguous (stride 1), got stride ", x.stride(last));
}

// A contiguous tensor on like's device, uninitialized. On the CPU it is made past the dispatcher,
// which new_empty calls by name: two microseconds, a fifth of a small call.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  if (!like.is_cpu()) return torch::stable::new_empty(like, sizes, type);
  std::vector<int64_t> strides(sizes.size());
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A kernel registered with the stable ABI is boxed by these very types, and a wrong one is silent:
// a C++ float reads 0.0 where the schema says float, an int32_t truncates.
template <class T>
constexpr bool is_boxable =
    std::is_same_v<T, double> || std::is_same_v<T, int64_t> || std::is_same_v<T, bool> ||
    std::is_same_v<T, Tensor> || std::is_same_v<T, std::string>;
template <class T>
constexpr bool is_boxable<std::optional<T>> = is_boxable<T>;

template <auto function>
struct Boxed;
template <class Result, class... Args, Result (*function)(Args...)>
struct Boxed<function> {
  static_assert((is_boxable<std::remove_cvref_t<Args>> && ...),
                "op arguments are double, int64_t, bool, Tensor, std::string or optional of these");
};

#define FIL_BOX(function) ((void)::flashinfer_lite::Boxed<&function>{}, TORCH_BOX(&function))

}  // namespace flashinfer_lite
