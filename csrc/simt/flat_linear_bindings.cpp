// Python's access to flat_linear on the executor, by way of the host code that the op uses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/heuristics.h"
#include "cuda/flat_linear.h"
#include "simt/module.h"

namespace flashinfer_lite::simt {

namespace {

namespace py = pybind11;
using cuda::FlatLinearPlan;

template <class Pointer>
Pointer pointer(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

void bind_params(py::module_& m) {
  using P = CudaFlatLinearParams;
  py::class_<P>(m, "FlatLinearParams", py::module_local())
      .def(py::init<>())
      .def("set_sizes",
           [](P& p, int64_t rows, int64_t n, int64_t k) {
             if (rows < 0 || n < 0 || k < 0) throw std::invalid_argument("a size is below 0");
             p.m = rows;
             p.n = n;
             p.k = k;
           })
      .def("set_x",
           [](P& p, uintptr_t x, int64_t row) {
             p.x = pointer<const void*>(x);
             p.x_row = row;
           })
      .def("set_weight",
           [](P& p, uintptr_t weight, int64_t row) {
             p.weight = pointer<const void*>(weight);
             p.weight_row = row;
           })
      .def("set_bias", [](P& p, uintptr_t bias) { p.bias = pointer<const void*>(bias); })
      .def("set_out",
           [](P& p, uintptr_t out, int64_t row) {
             p.out = pointer<void*>(out);
             p.out_row = row;
           })
      .def("set_workspace", [](P& p, uintptr_t partial, uintptr_t tickets) {
        p.partial = pointer<float*>(partial);
        p.tickets = pointer<uint32_t*>(tickets);
      });
}

FlatLinearKernel kernel_named(const std::string& name) {
  if (name == "gemv") return FlatLinearKernel::kGemv;
  if (name == "flat_gemm") return FlatLinearKernel::kFlatGemm;
  throw std::invalid_argument("expected gemv or flat_gemm, got " + name);
}

}  // namespace

void bind_flat_linear(py::module_& m) {
  bind_params(m);
  py::class_<FlatLinearPlan>(m, "FlatLinearPlan", py::module_local())
      .def_property_readonly("instance",
                             [](const FlatLinearPlan& plan) { return plan.instance->name; })
      .def_readonly("splits", &FlatLinearPlan::splits)
      .def_readonly("k_per_split", &FlatLinearPlan::k_per_split)
      .def_property_readonly("num_partials", &FlatLinearPlan::num_partials)
      .def_property_readonly("num_tickets", &FlatLinearPlan::num_tickets)
      .def_property_readonly("num_blocks", &FlatLinearPlan::num_blocks);
  m.def("choose_flat_linear", [](const std::string& kernel, const std::string& dtype, int64_t rows,
                                 const cuda::Device& device) {
    const auto element =
        dtype == "bfloat16" ? cuda::ElementType::kBFloat16 : cuda::ElementType::kFloat16;
    return cuda::choose_flat_linear(kernel_named(kernel), element, rows, device).name;
  });
  m.def("plan_flat_linear",
        [](const CudaFlatLinearParams& p, const std::string& name, int64_t splits) {
          const cuda::Instance& row = cuda::instance_named(name);
          kernel_named(row.kernel);  // of no other kernel: its parameters would differ
          if (splits < 0) throw std::invalid_argument("splits: expected 0 or more");
          return cuda::plan_flat_linear(p, row, splits);
        });
  m.def("flat_linear", [](CudaFlatLinearParams& p, const FlatLinearPlan& plan) {
    return cuda::run_flat_linear(p, plan, nullptr);
  });
  m.def("flat_gemm_splits", &flat_gemm_splits, py::arg("n"), py::arg("k"));
}

}  // namespace flashinfer_lite::simt
