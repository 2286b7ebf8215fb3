// pybind11 faces of csrc/probes: buffers in, seconds out, without the interpreter lock.
#include <pybind11/stl.h>

#include <string>

#include "bindings/module.h"
#include "common/error.h"
#include "probes/memory_loops.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

struct Bytes {
  std::byte* data;
  int64_t size;
};

Bytes bytes_of(const py::buffer& buffer, const char* name, bool writable) {
  const py::buffer_info info = buffer.request(writable);
  EK_CHECK(info.ndim == 1 && (info.size <= 1 || info.strides[0] == info.itemsize),
           "probe: " << name << " must be a dense vector");
  return {static_cast<std::byte*>(info.ptr), info.size * info.itemsize};
}

double stream(const std::string& loop, const py::buffer& a, const py::buffer& b, const py::buffer& c, std::vector<int> cpus) {
  EK_CHECK(loop == "read" || loop == "copy" || loop == "triad", "probe: loop is '" << loop << "', expected read, copy or triad");
  const Bytes to = bytes_of(a, "a", true), from = bytes_of(b, "b", false), other = bytes_of(c, "c", false);
  EK_CHECK(to.size == from.size && to.size == other.size, "probe: the arrays differ in size");
  EK_CHECK(
      (reinterpret_cast<uintptr_t>(to.data) | reinterpret_cast<uintptr_t>(from.data) | reinterpret_cast<uintptr_t>(other.data)) %
              kProbeLineBytes ==
          0,
      "probe: the arrays must be aligned to 64 bytes");
  const StreamLoop kind = loop == "read" ? StreamLoop::kRead : loop == "copy" ? StreamLoop::kCopy : StreamLoop::kTriad;
  const StreamParams params{kind,
                            reinterpret_cast<double*>(to.data),
                            reinterpret_cast<const double*>(from.data),
                            reinterpret_cast<const double*>(other.data),
                            to.size / 64 * 8,
                            std::move(cpus)};
  const py::gil_scoped_release release;
  return time_stream(params);
}

double copy(const py::buffer& to, const py::buffer& from, int64_t repeats, std::vector<int> cpus) {
  const Bytes target = bytes_of(to, "to", true), source = bytes_of(from, "from", false);
  EK_CHECK(target.size == source.size, "probe: the arrays differ in size");
  const MemcpyParams params{target.data, source.data, source.size, repeats, std::move(cpus)};
  const py::gil_scoped_release release;
  return time_memcpy(params);
}

double plain_gather(const py::buffer& table, int64_t row_bytes, const py::buffer& row_ids, const py::buffer& out,
                    int64_t prefetch, std::vector<int> cpus) {
  const Bytes rows = bytes_of(table, "table", false), ids = bytes_of(row_ids, "row_ids", false),
              target = bytes_of(out, "out", true);
  EK_CHECK(row_bytes >= 1 && prefetch >= 0, "probe: row_bytes is " << row_bytes << ", prefetch " << prefetch);
  EK_CHECK(row_ids.request().item_type_is_equivalent_to<int64_t>(), "probe: row_ids must be int64");
  EK_CHECK(target.size == ids.size / 8 * row_bytes,
           "probe: out has " << target.size << " bytes, expected " << ids.size / 8 * row_bytes);
  const PlainGatherParams params{rows.data,    target.data,           reinterpret_cast<const int64_t*>(ids.data),
                                 ids.size / 8, rows.size / row_bytes, row_bytes,
                                 prefetch,     std::move(cpus)};
  const py::gil_scoped_release release;
  return time_plain_gather(params);
}

py::tuple chase(const py::buffer& lines, int64_t steps, int64_t at, int cpu) {
  const Bytes memory = bytes_of(lines, "lines", false);
  double seconds = 0;
  {
    const py::gil_scoped_release release;
    seconds = time_chase(memory.data, memory.size / kProbeLineBytes, steps, &at, cpu);
  }
  return py::make_tuple(seconds, at);
}

}  // namespace

void bind_probes(py::module_& m) {
  m.def("probe_stream", &stream, py::arg("loop"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("cpus"),
        "Seconds of one read, copy or triad of STREAM; one thread for each of `cpus`, pinned (-1: not).");
  m.def("probe_memcpy", &copy, py::arg("to"), py::arg("source"), py::arg("repeats"), py::arg("cpus"),
        "Seconds of `repeats` copies.");
  m.def("probe_gather", &plain_gather, py::arg("table"), py::arg("row_bytes"), py::arg("row_ids"), py::arg("out"),
        py::arg("prefetch"), py::arg("cpus"), "Seconds of a loop of memcpy over rows by id.");
  m.def(
      "probe_make_chase",
      [](const py::buffer& lines, uint64_t seed) {
        const Bytes memory = bytes_of(lines, "lines", true);
        const py::gil_scoped_release release;
        make_chase(memory.data, memory.size / kProbeLineBytes, seed);
      },
      py::arg("lines"), py::arg("seed"), "One random cycle through all lines of 64 bytes.");
  m.def("probe_chase", &chase, py::arg("lines"), py::arg("steps"), py::arg("at"), py::arg("cpu"),
        "(seconds, line) of dependent loads along the cycle from line `at`.");
  m.def(
      "probe_touch",
      [](const py::buffer& memory, const std::vector<int>& cpus) {
        const Bytes whole = bytes_of(memory, "memory", true);
        const py::gil_scoped_release release;
        return touch_pages(whole.data, whole.size, cpus);
      },
      py::arg("memory"), py::arg("cpus"), "Writes a byte to each page; seconds.");
  m.def(
      "probe_bind",
      [](const py::buffer& memory, int node) {
        const Bytes whole = bytes_of(memory, "memory", true);
        bind_to_node(whole.data, whole.size, node);
      },
      py::arg("memory"), py::arg("node"), "Pages touched from now on come from NUMA node `node`; ValueError where refused.");
}

}  // namespace engram_kernels
