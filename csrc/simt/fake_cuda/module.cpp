// The Python module that the ops come in: the made-up machine, and the executor's sessions.
#include "simt/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/fake_cuda/fake_cuda.h"

namespace py = pybind11;

static py::list allocations(const flashinfer_lite::simt::FakeCuda& fake) {
  py::list list;
  for (const auto& each : fake.allocations) {
    const char* data = reinterpret_cast<const char*>(each.memory->data());
    list.append(py::make_tuple(each.device, py::bytes(data, each.memory->bytes())));
  }
  return list;
}

PYBIND11_MODULE(_C_cuda_simt, m) {
  using flashinfer_lite::simt::FakeCuda;
  using flashinfer_lite::simt::FakeDevice;
  using flashinfer_lite::simt::FakeLaunch;
  m.doc() = "The CUDA ops of flashinfer_lite, their kernels executed on the CPU.";
  flashinfer_lite::simt::bind_executor(m);

  py::class_<FakeDevice>(m, "Device")
      .def(py::init<std::string, int, int, int, int, int>(), py::kw_only(), py::arg("name"),
           py::arg("arch"), py::arg("num_sms"), py::arg("smem_optin"), py::arg("smem_per_sm"),
           py::arg("l2_bytes"));
  py::class_<FakeLaunch>(m, "Launch")
      .def_readonly("instance", &FakeLaunch::instance)
      .def_readonly("stream", &FakeLaunch::stream)
      .def_readonly("device", &FakeLaunch::device);
  // Containers are copied: assign a new one.
  py::class_<FakeCuda>(m, "Machine")
      .def_readwrite("devices", &FakeCuda::devices)
      .def_readwrite("streams", &FakeCuda::streams)
      .def_readwrite("tensors", &FakeCuda::tensors)
      .def_readwrite("current_device", &FakeCuda::current_device)
      .def_readwrite("capturing", &FakeCuda::capturing)
      .def_readwrite("driver_version", &FakeCuda::driver_version)
      .def_readwrite("runtime_version", &FakeCuda::runtime_version)
      .def_readwrite("launch_error", &FakeCuda::launch_error)
      .def_readwrite("malloc_error", &FakeCuda::malloc_error)
      .def_readonly("last_error", &FakeCuda::last_error)
      .def_property_readonly("allocations", &allocations, "[(device, bytes as they are)]")
      .def_readwrite("launches", &FakeCuda::launches);
  m.attr("machine") =
      py::cast(&flashinfer_lite::simt::fake_cuda(), py::return_value_policy::reference);
}
