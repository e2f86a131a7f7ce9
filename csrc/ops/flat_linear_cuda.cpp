// flat_linear on CUDA devices: no kernel yet, and it says so.
#include "ops/flat_linear.h"
#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

Tensor flat_linear(const Tensor& /*x*/, const Tensor& /*weight*/,
                   const std::optional<Tensor>& /*bias*/, std::string /*kernel*/) {
  fail("flat_linear: no CUDA kernel yet; impl='vendor' runs there");
}

void flat_linear_out(const Tensor& /*x*/, const Tensor& /*weight*/,
                     const std::optional<Tensor>& /*bias*/, std::string /*kernel*/,
                     Tensor /*out*/) {
  fail("flat_linear: no CUDA kernel yet; impl='vendor' runs there");
}

}  // namespace
}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CUDA, m) {
  m.impl("flat_linear", FIL_BOX(flashinfer_lite::flat_linear));
  m.impl("flat_linear.out", FIL_BOX(flashinfer_lite::flat_linear_out));
}
