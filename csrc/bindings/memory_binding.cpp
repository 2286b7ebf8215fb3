// pybind11 faces of csrc/memory: buffers in, buffers out, without the interpreter lock while a disk is waited for.
#include "bindings/memory_binding.h"

#include <cerrno>

#include "common/error.h"
#include "memory/file_reader.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

void read_rows(const FileReader& reader, int64_t offset, int64_t stride_bytes, int64_t row_bytes, int64_t num_rows,
               const py::buffer& row_ids, const py::buffer& out) {
  const py::buffer_info ids = row_ids.request(), target = out.request(true);
  EK_CHECK(
      ids.ndim == 1 && ids.itemsize == 8 && ids.item_type_is_equivalent_to<int64_t>() && (ids.size <= 1 || ids.strides[0] == 8),
      "FileReader: row_ids must be a dense vector of int64");
  bool dense = true;
  py::ssize_t bytes = target.itemsize;
  for (py::ssize_t d = target.ndim - 1; d >= 0; --d) {
    dense = dense && (target.shape[static_cast<size_t>(d)] <= 1 || target.strides[static_cast<size_t>(d)] == bytes);
    bytes *= target.shape[static_cast<size_t>(d)];
  }
  EK_CHECK(dense && bytes == ids.size * row_bytes,
           "FileReader: out has " << bytes << " bytes" << (dense ? "" : ", not dense") << ", expected " << ids.size * row_bytes);
  const FileRows rows{offset, stride_bytes, row_bytes, num_rows};
  const py::gil_scoped_release release;
  reader.read_rows(rows, static_cast<const int64_t*>(ids.ptr), ids.size, static_cast<std::byte*>(target.ptr));
}

void translate_read_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const FileReadError& read_error) {
    const py::object value =
        py::reinterpret_steal<py::object>(PyObject_CallFunction(PyExc_OSError, "is", read_error.error_number, read_error.what()));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
  }
}

}  // namespace

void bind_memory(py::module_& m) {
  py::register_exception_translator(&translate_read_error);
  py::class_<FileReader>(m, "FileReader", "Reads rows of an open file by index with pread. See csrc/memory/file_reader.h.")
      .def(py::init<int, std::string, int>(), py::arg("fd"), py::arg("path"), py::arg("max_threads") = 8)
      .def("read_rows", &read_rows, py::arg("offset"), py::arg("stride_bytes"), py::arg("row_bytes"), py::arg("num_rows"),
           py::arg("row_ids"), py::arg("out"),
           "Fills `out` with the rows at `row_ids` (int64). OSError names the path and the row; IndexError a bad id.");
}

}  // namespace engram_kernels
