// Python's access to the golden cases of cuda/arch: one launch, all checks on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels/golden/golden.cuh"
#include "simt/mbarrier.h"
#include "simt/module.h"
#include "simt/session.h"

namespace flashinfer_lite::simt {
namespace {

namespace py = pybind11;

using Words = py::array_t<uint32_t, py::array::c_style>;

// matrix: first word, rows, columns.
void encode_matrix(golden::Params& params, const std::array<int64_t, 3>& matrix) {
  TensorMap2d wanted{};
  wanted.base = reinterpret_cast<const uint8_t*>(params.in + matrix[0]);
  wanted.size[0] = static_cast<uint64_t>(matrix[2]);
  wanted.size[1] = static_cast<uint64_t>(matrix[1]);
  wanted.row_stride = 4 * wanted.size[0];
  wanted.box[0] = golden::TmaLoad::kBoxCols;
  wanted.box[1] = golden::TmaLoad::kBoxRows;
  wanted.element_bytes = 4;
  wanted.swizzle_bytes = 128;
  const std::string refusal = encode_tensor_map_2d(&params.map, wanted);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
}

// Writes `out` in place; returns the text of the report if anything was found.
std::string run_golden(const std::string& name, const Words& in, Words& out,
                       const std::array<int64_t, 3>& matrix, bool eager_copies) {
  const golden::Entry* entry = golden::find(name);
  if (entry == nullptr) throw std::invalid_argument("no golden case is named " + name);
  golden::Params params{in.data(), out.mutable_data(), {}};
  if (matrix[1] > 0) encode_matrix(params, matrix);
  Options options;
  options.eager_copies = eager_copies;
  Session session(options);
  session.memory().add_buffer(const_cast<uint32_t*>(in.data()), in.nbytes(), "in", false, true);
  session.memory().add_buffer(params.out, out.nbytes(), "out", true, true);
  Session* outer = current_session();
  set_current_session(&session);
  entry->launch(params, nullptr);
  set_current_session(outer);
  const Report report = session.report();
  return report.errors.empty() ? "" : report.text();
}

}  // namespace

void bind_golden(py::module_& m) {
  m.def("golden", &run_golden, py::arg("name"), py::arg("inputs"), py::arg("out").noconvert(),
        py::arg("matrix"), py::arg("eager_copies"));
  py::list names;
  for (const golden::Entry& entry : golden::kEntries) names.append(std::string(entry.name));
  m.attr("golden_cases") = names;
}

}  // namespace flashinfer_lite::simt
