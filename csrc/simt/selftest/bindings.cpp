#include "simt/module.h"

namespace flashinfer_lite::simt {

void bind_selftests(pybind11::module_& m) { bind_golden(m); }

}  // namespace flashinfer_lite::simt
