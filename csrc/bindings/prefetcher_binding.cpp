// pybind11 face of the prefetcher: addresses and sizes in, numbers of slots out; no call keeps the interpreter lock. Who owns the
// memory behind the addresses is prefetch/runtime.py.
#include "bindings/prefetcher_binding.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "prefetch/deadline.h"
#include "prefetch/process_owned.h"
#include "prefetch/row_prefetcher.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

template <class T>
T option(const py::dict& options, const char* name) {
  return options[name].cast<T>();
}

template <class T>
const T* address(const py::dict& options, const char* name) {
  return reinterpret_cast<const T*>(option<uintptr_t>(options, name));
}

RowSource table_of(const py::dict& o) {
  RowSource table{};
  table.rows = address<std::byte>(o, "rows");
  table.scales = address<std::byte>(o, "scales");
  table.num_rows = option<int64_t>(o, "num_rows");
  table.row_stride_bytes = option<int64_t>(o, "row_stride_bytes");
  table.scale_stride_bytes = option<int64_t>(o, "scale_stride_bytes");
  table.row_dim = option<int>(o, "row_dim");
  table.format = row_format_from_name("RowPrefetcher", option<std::string>(o, "row_format").c_str());
  table.zero_scale_is_zero = option<bool>(o, "zero_scale_is_zero");
  return table;
}

std::shared_ptr<RowPrefetcher> make_prefetcher(const py::dict& o, std::shared_ptr<CopyEngine> engine) {
  PrefetcherOptions options;
  options.stager.table = table_of(o);
  if (!o["file"].is_none()) options.stager.file = option<std::shared_ptr<FileTier>>(o, "file");
  options.stager.direct = option<bool>(o, "direct");
  options.stager.on_device = option<bool>(o, "on_device");
  options.stager.staging_bytes = option<int64_t>(o, "staging_bytes");
  options.stager.cache_bytes = option<int64_t>(o, "cache_bytes");
  options.stager.num_threads = option<int>(o, "num_threads");
  const auto out_dtype = option<std::string>(o, "out_dtype");
  options.out_dtype = out_dtype == "float32" ? DType::kF32 : out_dtype == "float16" ? DType::kF16 : DType::kBf16;
  options.depth = option<int>(o, "depth");
  options.slots = const_cast<std::byte*>(address<std::byte>(o, "slots"));
  options.slot_bytes = option<int64_t>(o, "slot_bytes");
  options.max_blocks = option<int>(o, "max_blocks");
  options.trace_spans = option<int>(o, "trace_spans");
  const py::gil_scoped_release release;
  return make_process_owned<RowPrefetcher>(options, std::move(engine));
}

constexpr double kSliceS = 0.1;

[[noreturn]] void say_again(const PrefetchTimeout& err, double timeout_s) { throw PrefetchTimeout(err.ticket, timeout_s); }
[[noreturn]] void say_again(const PrefetchQueueFull& err, double) { throw err; }

// A call that blocks at most as long as it is told, and then throws TimedOut: in slices, so that a signal (Ctrl-C) is heeded
// while nothing arrives.
template <class TimedOut, class Call>
auto in_slices(double timeout_s, const Call& call) {
  const Deadline deadline(timeout_s);
  for (;;) {
    const double left = deadline.left_s();
    const bool is_last = left >= 0 && left <= kSliceS;
    try {
      const py::gil_scoped_release release;
      return call(is_last ? left : kSliceS);
    } catch (const TimedOut& err) {
      if (is_last) say_again(err, timeout_s);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

int wait(RowPrefetcher& prefetcher, int64_t ticket, double timeout_s, uintptr_t stream, bool keep) {
  return in_slices<PrefetchTimeout>(timeout_s, [&](double slice_s) { return prefetcher.wait(ticket, slice_s, stream, keep); });
}

void drain(RowPrefetcher& prefetcher, double timeout_s) {
  in_slices<PrefetchTimeout>(timeout_s, [&](double slice_s) { prefetcher.drain(slice_s); });
}

// ids: (address, count, are_int64, on_device, stream)
int64_t submit(RowPrefetcher& prefetcher, const py::tuple& ids, std::vector<int64_t> sizes, double timeout_s) {
  const PrefetchIds wanted{{reinterpret_cast<const void*>(ids[0].cast<uintptr_t>()), ids[1].cast<int64_t>(), ids[2].cast<bool>()},
                           std::move(sizes),
                           ids[3].cast<bool>(),
                           ids[4].cast<uintptr_t>()};
  return in_slices<PrefetchQueueFull>(timeout_s, [&](double slice_s) { return prefetcher.submit(wanted, slice_s); });
}

py::dict counters(const RowPrefetcher& prefetcher) {
  PrefetchCounters c;
  {
    const py::gil_scoped_release release;
    c = prefetcher.counters();
  }
  py::dict hits;
  hits["device"] = c.device_rows;
  hits["host"] = c.host_rows;
  hits["device_cache"] = c.device_cache_rows;
  hits["cache"] = c.cached_rows;
  hits["file"] = c.file_rows;
  py::dict result;
  result["requests"] = c.requests;
  result["failed"] = c.failed;
  result["cancelled"] = c.cancelled;
  result["requested"] = c.requested;
  result["unique"] = c.unique;
  result["hits"] = hits;
  result["payload_bytes"] = c.payload_bytes;
  result["moved_bytes"] = c.moved_bytes;
  result["fetch_s"] = static_cast<double>(c.fetch_ns) * 1e-9;
  result["exposed_wait_s"] = static_cast<double>(c.exposed_wait_ns) * 1e-9;
  result["in_flight"] = c.in_flight;
  result["max_in_flight"] = c.max_in_flight;
  result["queued"] = c.queued;
  result["memory_bytes"] = prefetcher.memory_bytes();
  result["device_cache_slots"] = prefetcher.cache_slots();
  return result;
}

std::shared_ptr<CopyEngine> host_engine(int num_threads, bool has_device_memory, uint64_t seed, double error, int max_delay_us,
                                        bool reorder) {
  return make_host_engine({num_threads, has_device_memory, {seed, error, max_delay_us, reorder}});
}

void raise_as(const char* name, const char* message) {
  const py::object type = py::module_::import("engram_kernels.prefetch.errors").attr(name);
  PyErr_SetString(type.ptr(), message);
}

void translate_prefetch_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const PrefetchQueueFull& err) {
    raise_as("PrefetchQueueFull", err.what());
  } catch (const PrefetchCancelled& err) {
    raise_as("PrefetchCancelled", err.what());
  } catch (const FetchCancelled& err) {
    raise_as("PrefetchCancelled", err.what());
  } catch (const PrefetchTimeout& err) {
    PyErr_SetString(PyExc_TimeoutError, err.what());
  } catch (const UnknownTicket& err) {
    PyErr_SetString(PyExc_KeyError, err.what());
  }
}

}  // namespace

void bind_prefetcher(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::register_exception_translator(&translate_prefetch_error);
  py::class_<CopyEngine, std::shared_ptr<CopyEngine>>(m, "CopyEngine",
                                                      "What a prefetcher runs on. See csrc/prefetch/copy_engine.h.")
      .def_property_readonly("name", &CopyEngine::name)
      .def_property_readonly("reads_host_memory", &CopyEngine::reads_host_memory)
      .def(
          "register_host",
          [](CopyEngine& e, uintptr_t at, int64_t bytes) {
            return e.register_host(reinterpret_cast<const std::byte*>(at), bytes);
          },
          py::arg("address"), py::arg("bytes"), "Lets gathers read this memory; False: they can already.")
      .def(
          "unregister_host", [](CopyEngine& e, uintptr_t at) { e.unregister_host(reinterpret_cast<const std::byte*>(at)); },
          py::arg("address"));
  m.def("host_engine", &host_engine, py::arg("num_threads"), py::arg("has_device_memory") = false, py::arg("seed") = 0,
        py::arg("error") = 0.0, py::arg("max_delay_us") = 0, py::arg("reorder") = false,
        "An engine of CPU threads. All but the first argument are for tests; see HostEngineOptions.");
  py::class_<RowPrefetcher, std::shared_ptr<RowPrefetcher>>(m, "RowPrefetcher", "See csrc/prefetch/row_prefetcher.h.")
      .def(py::init(&make_prefetcher), py::arg("options"), py::arg("engine"))
      .def("submit", &submit, py::arg("ids"), py::arg("sizes"), py::arg("timeout_s"))
      .def("wait", &wait, py::arg("ticket"), py::arg("timeout_s"), py::arg("stream"), py::arg("keep"))
      .def("release", &RowPrefetcher::release, py::arg("slot"), py::arg("stream"), Released())
      .def("knows", &RowPrefetcher::knows, py::arg("ticket"), Released())
      .def("cancel", &RowPrefetcher::cancel, py::arg("ticket"), Released())
      .def("drain", &drain, py::arg("timeout_s"))
      .def("close", &RowPrefetcher::close, Released())
      .def("clear_cache", &RowPrefetcher::clear_cache)
      .def("counters", &counters)
      .def("chrome_trace", &RowPrefetcher::chrome_trace, Released());
}

}  // namespace engram_kernels
