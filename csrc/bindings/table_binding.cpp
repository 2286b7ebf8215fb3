// pybind11 faces of csrc/table: buffers in, buffers out, without the interpreter lock while a disk is waited for.
#include <pybind11/stl.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/module.h"
#include "common/error.h"
#include "table/cached_tier.h"
#include "table/file_reader.h"
#include "table/file_tier.h"
#include "table/row_cache.h"
#include "table/row_tier.h"
#include "table/row_writer.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

using OnePart = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // offset, stride_bytes, row_bytes, num_rows
using Part = std::tuple<int, int64_t, int64_t>;                  // file, offset, num_rows
using Parts = std::tuple<int64_t, int64_t, std::vector<Part>>;   // stride_bytes, row_bytes, one behind the other
using Extent = std::variant<OnePart, Parts>;

FileRows rows_of(const Extent& extent) {
  if (const auto* e = std::get_if<OnePart>(&extent)) {
    return FileRows::in_one_part(std::get<0>(*e), std::get<1>(*e), std::get<2>(*e), std::get<3>(*e));
  }
  const auto& [stride_bytes, row_bytes, parts] = std::get<Parts>(extent);
  FileRows rows{stride_bytes, row_bytes, 0, {}};
  for (const auto& [file, offset, num_rows] : parts) {
    EK_CHECK(num_rows >= 0 && num_rows <= INT64_MAX - rows.num_rows, "FileReader: a part has " << num_rows << " rows");
    if (num_rows > 0) rows.parts.push_back({file, offset, rows.num_rows});
    rows.num_rows += num_rows;
  }
  return rows;
}

DType stored_scales_of(const std::string& name) {
  EK_CHECK(name.empty() || name == "bf16" || name == "f16", "FileTier: stored_scales is '" << name
                                                                                           << "', expected '', 'bf16' or "
                                                                                              "'f16'");
  return name == "bf16" ? DType::kBf16 : name == "f16" ? DType::kF16 : DType::kF32;
}

py::buffer_info ids_of(const py::buffer& row_ids) {
  py::buffer_info ids = row_ids.request();
  EK_CHECK(
      ids.ndim == 1 && ids.itemsize == 8 && ids.item_type_is_equivalent_to<int64_t>() && (ids.size <= 1 || ids.strides[0] == 8),
      "FileReader: row_ids must be a dense vector of int64");
  return ids;
}

std::byte* dense_bytes(const py::buffer& out, const char* name, int64_t wanted_bytes) {
  const py::buffer_info target = out.request(true);
  bool dense = true;
  py::ssize_t bytes = target.itemsize;
  for (py::ssize_t d = target.ndim - 1; d >= 0; --d) {
    dense = dense && (target.shape[static_cast<size_t>(d)] <= 1 || target.strides[static_cast<size_t>(d)] == bytes);
    bytes *= target.shape[static_cast<size_t>(d)];
  }
  EK_CHECK(dense && bytes == wanted_bytes, "FileReader: " << name << " has " << bytes << " bytes" << (dense ? "" : ", not dense")
                                                          << ", expected " << wanted_bytes);
  return static_cast<std::byte*>(target.ptr);
}

// An output that shares memory with another buffer would be overwritten while that is still read.
void expect_apart(const char* name, const std::byte* a, int64_t a_bytes, const char* other, const void* b, int64_t b_bytes) {
  const auto from = reinterpret_cast<uintptr_t>(a), to = reinterpret_cast<uintptr_t>(b);
  EK_CHECK(a_bytes == 0 || b_bytes == 0 || from + static_cast<uintptr_t>(a_bytes) <= to ||
               to + static_cast<uintptr_t>(b_bytes) <= from,
           "FileReader: " << name << " shares memory with " << other);
}

void read_rows(FileReader& reader, int64_t offset, int64_t stride_bytes, int64_t row_bytes, int64_t num_rows,
               const py::buffer& row_ids, const py::buffer& out) {
  const py::buffer_info ids = ids_of(row_ids);
  const FileRows rows = FileRows::in_one_part(offset, stride_bytes, row_bytes, num_rows);
  const RowsWanted wanted{&rows, dense_bytes(out, "out", ids.size * row_bytes)};
  expect_apart("out", wanted.out, ids.size * row_bytes, "row_ids", ids.ptr, ids.size * 8);
  const py::gil_scoped_release release;
  reader.read(&wanted, 1, {static_cast<const int64_t*>(ids.ptr), ids.size});
}

struct CancelFlag {
  std::atomic<bool> set{false};
};

void fetch(const TierOfPython& of_python, const py::buffer& row_ids, const py::buffer& rows_out, const py::object& scales_out,
           const CancelFlag* cancelled) {
  const DirectRead inside;
  RowTier& tier = *of_python.tier;
  const py::buffer_info ids = ids_of(row_ids);
  std::byte* rows = dense_bytes(rows_out, "rows_out", ids.size * tier.row_bytes());
  std::byte* scales =
      tier.scale_bytes() == 0 ? nullptr : dense_bytes(scales_out.cast<py::buffer>(), "scales_out", ids.size * tier.scale_bytes());
  expect_apart("rows_out", rows, ids.size * tier.row_bytes(), "row_ids", ids.ptr, ids.size * 8);
  expect_apart("scales_out", scales, ids.size * tier.scale_bytes(), "row_ids", ids.ptr, ids.size * 8);
  expect_apart("rows_out", rows, ids.size * tier.row_bytes(), "scales_out", scales, ids.size * tier.scale_bytes());
  const py::gil_scoped_release release;
  tier.fetch({static_cast<const int64_t*>(ids.ptr), ids.size, rows, scales}, nullptr,
             cancelled == nullptr ? nullptr : &cancelled->set);
}

py::dict stats(const TierOfPython& of_python) {
  const RowTier& tier = *of_python.tier;
  const FetchCounters totals = tier.totals();
  py::dict result;
  result["rows"] = totals.rows;
  result["cache_hits"] = totals.cache_hits;
  result[of_python.reader == nullptr ? "remote_rows" : "file_rows"] = totals.tier_rows;
  result["payload_bytes"] = totals.payload_bytes;
  result["moved_bytes"] = totals.moved_bytes;
  result["reads"] = totals.reads;
  result["cache_slots"] = tier.cache_slots();
  result["cached_rows"] = tier.cached_rows();
  if (of_python.reader == nullptr) return result;
  result["io"] = of_python.reader->backend();
  result["direct"] = of_python.reader->direct();
  result["queue_depth"] = of_python.reader->queue_depth();
  return result;
}

py::tuple admit(RowCacheDirectory& directory, int64_t row) {
  int64_t evicted = -1;
  const int64_t slot = directory.admit(row, &evicted);
  return py::make_tuple(slot, evicted);
}

// One request of the directory a row of `row_ids`, admitting every miss: hits.
int64_t replay(RowCacheDirectory& directory, const py::buffer& row_ids) {
  const py::buffer_info ids = ids_of(row_ids);
  const py::gil_scoped_release release;
  int64_t hits = 0, evicted = -1;
  for (py::ssize_t i = 0; i < ids.size; ++i) {
    const int64_t row = static_cast<const int64_t*>(ids.ptr)[i];
    if (directory.find(row) >= 0) {
      ++hits;
    } else {
      directory.admit(row, &evicted);
    }
  }
  return hits;
}

void write_rows(RowWriter& writer, int64_t offset, int64_t row_bytes, int64_t num_rows, const py::buffer& row_ids,
                const py::buffer& rows) {
  const py::buffer_info ids = ids_of(row_ids), from = rows.request();
  EK_CHECK(PyBuffer_IsContiguous(from.view(), 'C') != 0 && from.size * from.itemsize == ids.size * row_bytes,
           "RowWriter: rows has " << from.size * from.itemsize << " bytes, expected " << ids.size * row_bytes << ", dense");
  const py::gil_scoped_release release;
  writer.write(offset, row_bytes, num_rows, static_cast<const int64_t*>(ids.ptr), ids.size, static_cast<std::byte*>(from.ptr));
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

void bind_table(py::module_& m) {
  m.attr("io_uring") = io_uring_compiled_in();
  py::register_exception_translator(&translate_read_error);
  py::class_<CancelFlag>(m, "CancelFlag", "Ends a fetch early once it is set.")
      .def(py::init<>())
      .def("set", [](CancelFlag& flag) { flag.set = true; });
  py::class_<FileReader, std::shared_ptr<FileReader>>(m, "FileReader",
                                                      "Reads rows of open files by index. See csrc/table/file_reader.h.")
      .def(py::init([](int fd, const std::string& path, int queue_depth, const std::string& io) {
             return make_unlocked<FileReader>(std::vector{FileReader::NamedFile(fd, path)}, queue_depth, io);
           }),
           py::arg("fd"), py::arg("path"), py::arg("queue_depth") = 64, py::arg("io") = "auto")
      .def(py::init([](const std::vector<FileReader::NamedFile>& files, int queue_depth, const std::string& io) {
             return make_unlocked<FileReader>(files, queue_depth, io);
           }),
           py::arg("files"), py::arg("queue_depth") = 64, py::arg("io") = "auto")
      .def("read_rows", &read_rows, py::arg("offset"), py::arg("stride_bytes"), py::arg("row_bytes"), py::arg("num_rows"),
           py::arg("row_ids"), py::arg("out"),
           "Fills `out` with the rows at `row_ids` (int64). OSError names the path and the row; IndexError a bad id.")
      .def(
          "read_range",
          [](const FileReader& reader, int64_t offset, const py::buffer& out, int file) {
            const py::buffer_info target = out.request(true);
            std::byte* bytes = dense_bytes(out, "out", target.size * target.itemsize);
            const py::gil_scoped_release release;
            reader.read_range(file, offset, target.size * target.itemsize, bytes);
          },
          py::arg("offset"), py::arg("out"), py::arg("file") = 0, "Fills `out` with the bytes from `offset` of a file on.")
      .def(
          "tier",
          [](std::shared_ptr<FileReader> reader, const Extent& rows, const Extent& scales, int64_t cache_bytes,
             const std::string& stored_scales) {
            EK_CHECK(cache_bytes >= 0, "FileTier: cache_bytes is " << cache_bytes << ", expected at least 0");
            std::shared_ptr<RowTier> tier =
                make_unlocked<FileTier>(reader, rows_of(rows), rows_of(scales), stored_scales_of(stored_scales));
            if (cache_bytes > 0) tier = make_unlocked<CachedTier>(std::move(tier), cache_bytes);
            return TierOfPython{std::move(tier), std::move(reader)};
          },
          py::arg("rows"), py::arg("scales"), py::arg("cache_bytes"), py::arg("stored_scales") = "",
          "A RowTier of two extents (offset, stride_bytes, row_bytes, num_rows) of the first file, or (stride_bytes, row_bytes, "
          "[(file, offset, num_rows), ..]); row_bytes 0: no scales per row. stored_scales \"bf16\" or \"f16\": what the file "
          "has; "
          "`fetch` gives float32. \"\": as they are.")
      .def("accept_changes", &FileReader::accept_changes, py::call_guard<py::gil_scoped_release>(),
           "Takes the files as they are now for what was opened; not while another call reads.")
      .def(
          "wrap_queues",
          [](FileReader& reader, uintptr_t wrapper, uintptr_t context) {
            reader.wrap_queues(reinterpret_cast<IoQueueWrapper>(wrapper), reinterpret_cast<void*>(context));
          },
          py::arg("wrapper"), py::arg("context"),
          "From the next call on, reads go through what a C function makes of each queue (IoQueueWrapper).");
  py::class_<TierOfPython>(m, "RowTier", "Rows of one table outside memory. See csrc/table/row_tier.h.")
      .def("fetch", &fetch, py::arg("row_ids"), py::arg("rows_out"), py::arg("scales_out") = py::none(),
           py::arg("cancelled") = nullptr, "Fills the outputs with the rows at distinct `row_ids` (int64).")
      .def("stats", &stats, "Counters of all fetches that succeeded, and how files are read.");
  py::class_<RowWriter, std::shared_ptr<RowWriter>>(m, "RowWriter", "Writes rows of an open file. See csrc/table/row_writer.h.")
      .def(
          py::init([](int fd, const std::string& path, const std::string& io) { return make_unlocked<RowWriter>(fd, path, io); }),
          py::arg("fd"), py::arg("path"), py::arg("io") = "auto")
      .def("write", &write_rows, py::arg("offset"), py::arg("row_bytes"), py::arg("num_rows"), py::arg("row_ids"),
           py::arg("rows"),
           "Writes `rows` (dense) to the places of `row_ids` (int64, distinct). OSError names the path and the row.")
      .def("sync", &RowWriter::sync, py::call_guard<py::gil_scoped_release>(), "What was written is on disk when it returns.")
      .def_property_readonly("io", &RowWriter::backend)
      .def_property_readonly("writes", &RowWriter::writes)
      .def_property_readonly("bytes", &RowWriter::bytes);
  py::class_<RowCacheDirectory>(m, "RowCacheDirectory", "Which row lies in which slot. See csrc/table/row_cache.h.")
      .def(py::init<int64_t>(), py::arg("max_slots"))
      .def_property_readonly("num_slots", &RowCacheDirectory::num_slots)
      .def_property_readonly("num_rows", &RowCacheDirectory::num_rows)
      .def("find", &RowCacheDirectory::find, py::arg("row"), "The slot of `row` or -1; counts the use.")
      .def("admit", &admit, py::arg("row"), "(slot or -1, evicted row or -1).")
      .def("begin_batch", &RowCacheDirectory::begin_batch)
      .def("forget", &RowCacheDirectory::forget, py::arg("row"))
      .def("clear", &RowCacheDirectory::clear)
      .def("replay", &replay, py::arg("row_ids"), "Finds each row of a trace (int64), admits what is missing; the hits.");
}

}  // namespace engram_kernels
