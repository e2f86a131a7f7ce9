// Python's access to sessions, reports and guarded memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "simt/guarded_buffer.h"
#include "simt/module.h"
#include "simt/report.h"
#include "simt/session.h"

namespace flashinfer_lite::simt {

namespace {

namespace py = pybind11;

using DisabledRow = std::tuple<std::string, int, std::string>;  // file, line, kind

SyncKind parse_kind(const std::string& name) {
  const auto found = std::find(kSyncKindNames.begin(), kSyncKindNames.end(), name);
  if (found == kSyncKindNames.end()) {
    throw std::invalid_argument("disabled: no kind of call is named " + name);
  }
  return static_cast<SyncKind>(found - kSyncKindNames.begin());
}

void parse_checks(const std::string& checks, Options& options) {
  const bool all = checks == "all";
  options.check_races = all || checks == "races";
  options.count_accesses = all || checks == "counters";
  if (!options.check_races && !options.count_accesses && checks != "off") {
    throw std::invalid_argument("checks: expected all, races, counters or off, got " + checks);
  }
}

std::unique_ptr<Session> make_session(const std::string& checks, bool eager, uint64_t seed,
                                      int threads, size_t stack_bytes,
                                      const std::vector<DisabledRow>& disabled) {
  Options options;
  parse_checks(checks, options);
  options.eager_copies = eager;
  options.seed = seed;
  options.os_threads = threads;
  options.stack_bytes = stack_bytes;
  for (const auto& [file, line, kind] : disabled) {
    options.disabled.push_back({file, line, parse_kind(kind)});
  }
  return std::make_unique<Session>(std::move(options));
}

Session& enter(Session& session) {
  if (current_session() != nullptr) throw std::runtime_error("a session is open already");
  set_current_session(&session);
  return session;
}

void leave(Session&, const py::args&) { set_current_session(nullptr); }

void register_buffer(Session& session, uintptr_t address, size_t nbytes, const std::string& name,
                     bool writable, bool initialised) {
  session.memory().add_buffer(reinterpret_cast<void*>(address), nbytes, name, writable,
                              initialised);
}

py::list errors(const Report& report) {
  py::list rows;
  for (const Finding& error : report.errors) {
    const char* kind = kKindNames[static_cast<int>(error.kind)];
    rows.append(py::make_tuple(kind, error.file, error.line, error.count, error.text));
  }
  return rows;
}

py::list counters(const Report& report) {
  py::list rows;
  for (const CounterRow& row : report.counters) {
    rows.append(py::make_tuple(kAccessNames[static_cast<int>(row.access)], row.file, row.line,
                               row.count.requests, row.count.ideal, row.count.actual));
  }
  return rows;
}

py::list sites(const Report& report) {
  py::list rows;
  for (const SyncRow& row : report.sites) {
    rows.append(
        py::make_tuple(kSyncKindNames[static_cast<int>(row.kind)], row.file, row.line, row.hits));
  }
  return rows;
}

py::dict totals(const Report& report) {
  py::dict values;
  values["launches"] = report.totals.launches;
  values["blocks"] = report.totals.blocks;
  values["collectives"] = report.totals.collectives;
  values["mmas"] = report.totals.mmas;
  values["seconds"] = report.totals.seconds;
  return values;
}

py::buffer_info buffer_info(GuardedBuffer& buffer) {
  return py::buffer_info(buffer.data(), sizeof(uint8_t), py::format_descriptor<uint8_t>::format(),
                         static_cast<py::ssize_t>(buffer.bytes()));
}

}  // namespace

void bind_executor(py::module_& m) {
  py::class_<GuardedBuffer>(m, "GuardedBuffer", py::buffer_protocol(), py::module_local())
      .def(py::init<size_t>(), py::arg("nbytes"))
      .def_buffer(&buffer_info)
      .def_property_readonly(
          "address", [](const GuardedBuffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_property_readonly("nbytes", &GuardedBuffer::bytes);

  py::class_<Report>(m, "Report", py::module_local())
      .def_property_readonly("errors", &errors, "[(kind, file, line, count, text)]")
      .def_property_readonly("counters", &counters,
                             "[(access, file, line, requests, ideal, actual)]")
      .def_property_readonly("sites", &sites, "[(kind, file, line, hits)]")
      .def_property_readonly("totals", &totals)
      .def("text", &Report::text);

  py::class_<Session>(m, "Session", py::module_local())
      .def(py::init(&make_session), py::kw_only(), py::arg("checks") = "all",
           py::arg("eager") = false, py::arg("seed") = 0, py::arg("threads") = 1,
           py::arg("stack_bytes") = Options{}.stack_bytes,
           py::arg("disabled") = std::vector<DisabledRow>{})
      .def("__enter__", &enter, py::return_value_policy::reference)
      .def("__exit__", &leave)
      .def("register_buffer", &register_buffer, py::arg("address"), py::arg("nbytes"),
           py::arg("name"), py::arg("writable"), py::arg("initialised"))
      .def("report", &Session::report);

  m.attr("ERROR_KINDS") = kKindNames;
  m.attr("SITE_KINDS") = kSyncKindNames;
  m.attr("ACCESS_KINDS") = kAccessNames;
}

}  // namespace flashinfer_lite::simt
