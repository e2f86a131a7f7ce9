// Python's access to the self tests: one launch in the session that is open.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/mbarrier.h"
#include "simt/module.h"
#include "simt/selftest/case.h"

namespace flashinfer_lite::simt {

namespace selftest {

namespace {

namespace py = pybind11;

std::atomic<bool> variant_known{false};

std::vector<Case> all_cases() {
  std::vector<Case> all;
  for (const auto& cases :
       {barrier_cases(), warp_cases(), mbarrier_cases(), tma_cases(), cp_async_cases(),
        memory_cases(), grid_cases(), counter_cases(), tensor_cases(), raw_cases()}) {
    all.insert(all.end(), cases.begin(), cases.end());
  }
  return all;
}

Case find_case(const std::string& name) {
  for (const Case& known : all_cases()) {
    if (known.name == name) return known;
  }
  throw std::invalid_argument("no self test is named " + name);
}

void encode_map(TensorMap& map, const Params& params, uint64_t rows) {
  TensorMap2d wanted{};
  wanted.base = reinterpret_cast<const uint8_t*>(params.in);
  wanted.size[0] = kMapColumns;
  wanted.size[1] = rows;
  wanted.row_stride = 4 * kMapColumns;
  wanted.box[0] = kMapColumns;
  wanted.box[1] = 8;
  wanted.element_bytes = 4;
  const std::string refusal = encode_tensor_map_2d(&map, wanted);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
}

Status run_selftest(const std::string& name, const std::string& variant, uintptr_t in,
                    uintptr_t out, uintptr_t state, int number, std::optional<uint32_t> blocks,
                    std::optional<uint32_t> threads, std::optional<uint32_t> smem_bytes) {
  const Case chosen = find_case(name);
  Params params{};
  params.in = reinterpret_cast<const uint32_t*>(in);
  params.out = reinterpret_cast<uint32_t*>(out);
  params.state = reinterpret_cast<uint32_t*>(state);
  params.number = number;
  params.variant = variant;
  encode_map(params.map, params, kWords / kMapColumns);
  encode_map(params.map_too_long, params, kWords / kMapColumns + 1);
  const LaunchConfig config{blocks.value_or(chosen.config.blocks),
                            threads.value_or(chosen.config.threads),
                            smem_bytes.value_or(chosen.config.smem_bytes)};
  variant_known = variant.empty();
  const Status status = chosen.launch(config, params);
  if (!variant_known) throw std::invalid_argument(name + " has no variant " + variant);
  return status;
}

}  // namespace

bool Params::is(std::string_view name) const {
  if (name != variant) return false;
  variant_known = true;
  return true;
}

}  // namespace selftest

void bind_selftests(pybind11::module_& m) {
  namespace py = pybind11;
  bind_golden(m);
  m.attr("SELFTEST_WORDS") = selftest::kWords;
  m.def("selftest_names", [] {
    std::vector<std::string> names;
    for (const selftest::Case& known : selftest::all_cases()) names.emplace_back(known.name);
    return names;
  });
  m.def("run_selftest", &selftest::run_selftest, py::arg("name"), py::arg("variant") = "",
        py::kw_only(), py::arg("in_"), py::arg("out"), py::arg("state"), py::arg("number") = 1,
        py::arg("blocks") = py::none(), py::arg("threads") = py::none(),
        py::arg("smem_bytes") = py::none());
}

}  // namespace flashinfer_lite::simt
