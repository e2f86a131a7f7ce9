// The parts of the Python module _simt.
#pragma once

#include <pybind11/pybind11.h>

namespace flashinfer_lite::simt {

void bind_executor(pybind11::module_& m);     // Session, Report, GuardedBuffer
void bind_kernels(pybind11::module_& m);      // the kernels, and the host code that chooses them
void bind_flat_linear(pybind11::module_& m);  // the same for flat_linear
void bind_append_kv(pybind11::module_& m);    // and for append_kv
void bind_selftests(pybind11::module_& m);    // small kernels that test the executor
void bind_golden(pybind11::module_& m);       // the golden cases of cuda/arch

}  // namespace flashinfer_lite::simt
