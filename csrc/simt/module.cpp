#include "simt/module.h"

PYBIND11_MODULE(_simt, m) {
  m.doc() = "CUDA kernels of flashinfer_lite, executed on the CPU.";
  flashinfer_lite::simt::bind_executor(m);
  flashinfer_lite::simt::bind_kernels(m);
  flashinfer_lite::simt::bind_flat_linear(m);
  flashinfer_lite::simt::bind_append_kv(m);
  flashinfer_lite::simt::bind_selftests(m);
}
