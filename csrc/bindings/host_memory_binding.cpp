// pybind11 face of csrc/table/host_memory.h: memory with the buffer protocol, which torch.frombuffer takes and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "table/host_memory.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

void translate_host_memory_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const HostMemoryError& memory_error) {
    const py::object value = py::reinterpret_steal<py::object>(
        PyObject_CallFunction(PyExc_OSError, "is", memory_error.error_number, memory_error.what()));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
  }
}

using HostMemoryPtr = std::unique_ptr<HostMemory, DeleteUnlocked>;

HostMemoryPtr make_host_memory(int64_t bytes, std::vector<int> numa_nodes, int fd, int64_t fd_offset, bool read_only) {
  const py::gil_scoped_release release;
  return HostMemoryPtr(new HostMemory(bytes, HostMemoryOptions{std::move(numa_nodes), fd, fd_offset, read_only}));
}

// Addresses of functions as in HostRegistrar, error_text 0: none.
HostRegistrar registrar_at(uintptr_t register_host, uintptr_t unregister_host, uintptr_t error_text, bool counts_memlock) {
  return {reinterpret_cast<int (*)(void*, size_t)>(register_host), reinterpret_cast<int (*)(void*)>(unregister_host),
          reinterpret_cast<const char* (*)(int)>(error_text), counts_memlock};
}

}  // namespace

void bind_host_memory(py::module_& m) {
  py::register_exception_translator(&translate_host_memory_error);
  py::class_<HostRegistrar>(m, "HostRegistrar", "What makes host memory readable by a device. See csrc/table/host_registrar.h.")
      .def(py::init(&cpu_host_registrar), "Without a device: registers nothing.")
      .def(py::init(&registrar_at), py::arg("register_host"), py::arg("unregister_host"), py::arg("error_text"),
           py::arg("counts_memlock") = false)
      .def_readonly("counts_memlock", &HostRegistrar::counts_memlock);
  py::class_<HostMemory, HostMemoryPtr>(m, "HostMemory", py::buffer_protocol(),
                                        "Memory for one table. See csrc/table/host_memory.h.")
      .def(py::init(&make_host_memory), py::arg("num_bytes"), py::arg("numa_nodes") = std::vector<int>{}, py::arg("fd") = -1,
           py::arg("fd_offset") = 0, py::arg("read_only") = false)
      // writable even where the mapping is not: torch has no read-only tensors, and would warn about each
      .def_buffer([](HostMemory& table) { return py::buffer_info(reinterpret_cast<uint8_t*>(table.data()), table.bytes()); })
      .def_property_readonly("num_bytes", &HostMemory::bytes)
      .def_property_readonly("mapped_bytes", &HostMemory::mapped_bytes)
      .def_property_readonly("pinned_bytes", &HostMemory::pinned_bytes)
      .def_property_readonly("pages", &HostMemory::pages, "\"explicit\", \"transparent\" (asked for) or \"small\".")
      .def(
          "usage",
          [](const HostMemory& table) {
            const HostMemory::Usage usage = table.usage();
            return std::make_pair(usage.resident_bytes, usage.huge_bytes);
          },
          "(resident, of these in huge pages) bytes; -1: unknown.")
      .def("populate", &HostMemory::populate, py::arg("offset"), py::arg("num_bytes"), py::call_guard<py::gil_scoped_release>(),
           "Takes the pages of a range now.")
      .def("pages_by_node", &HostMemory::pages_by_node, py::arg("samples") = 256, "[(node, pages of the sample)].")
      .def("pin", &HostMemory::pin, py::arg("registrar"), py::arg("chunk_bytes") = HostRegistration::kChunkBytes,
           py::call_guard<py::gil_scoped_release>(), "Registers the memory for a device, chunk by chunk.")
      .def("unpin", &HostMemory::unpin, py::call_guard<py::gil_scoped_release>());
}

}  // namespace engram_kernels
