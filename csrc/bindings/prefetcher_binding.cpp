// pybind11 face of the prefetcher: addresses and sizes in, numbers of slots out; no call keeps the interpreter lock. Who owns the
// memory behind the addresses is prefetch/runtime.py.
#include <pybind11/stl.h>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "common/error.h"
#include "prefetch/deadline.h"
#include "prefetch/fetch_way.h"
#include "prefetch/row_prefetcher.h"
#include "table/file_reader.h"
#include "table/row_tier.h"

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
  table.table_scale = option<float>(o, "table_scale");
  return table;
}

// A prefetcher of Python. `calls` counts the calls that are inside, with or without the interpreter lock.
struct PythonPrefetcher {
  PythonPrefetcher(const PrefetcherOptions& options, std::shared_ptr<CopyEngine> engine)
      : prefetcher(options, std::move(engine)) {}
  RowPrefetcher prefetcher;
  std::atomic<int> calls{0};
  const pid_t process = getpid();
};

class Inside {
 public:
  explicit Inside(PythonPrefetcher& owner) : owner_(owner) { ++owner_.calls; }
  ~Inside() { --owner_.calls; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  PythonPrefetcher& owner_;
};

struct DeleteInItsProcess {
  void operator()(PythonPrefetcher* object) const {
    if (getpid() == process) DeleteUnlocked()(object);  // a child after a fork has neither threads nor locks of it
  }
  pid_t process = getpid();
};

std::shared_ptr<PythonPrefetcher> make_prefetcher(const py::dict& o, std::shared_ptr<CopyEngine> engine) {
  PrefetcherOptions options;
  options.stager.table = table_of(o);
  if (!o["tier"].is_none()) options.stager.tier = option<const TierOfPython&>(o, "tier").tier;
  options.stager.way = fetch_way_from_name(option<std::string>(o, "way"));
  options.stager.staging_bytes = option<int64_t>(o, "staging_bytes");
  options.stager.cache_bytes = option<int64_t>(o, "cache_bytes");
  options.stager.num_threads = option<int>(o, "num_threads");
  const auto out_dtype = option<std::string>(o, "out_dtype");
  options.out_dtype = out_dtype == "float32" ? DType::kF32 : out_dtype == "float16" ? DType::kF16 : DType::kBf16;
  options.depth = option<int>(o, "depth");
  options.slots = const_cast<std::byte*>(address<std::byte>(o, "slots"));
  options.slot_bytes = option<int64_t>(o, "slot_bytes");
  options.distinct_rows = const_cast<std::byte*>(address<std::byte>(o, "distinct_rows"));
  options.max_blocks = option<int>(o, "max_blocks");
  options.trace_spans = option<int>(o, "trace_spans");
  const py::gil_scoped_release release;
  return {new PythonPrefetcher(options, std::move(engine)), DeleteInItsProcess()};
}

constexpr double kSliceS = 0.1;

[[noreturn]] void throw_with_timeout(const PrefetchTimeout& err, double timeout_s) {
  throw PrefetchTimeout(err.ticket, timeout_s);
}
[[noreturn]] void throw_with_timeout(const PrefetchQueueFull& err, double) { throw err; }

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
      if (is_last) throw_with_timeout(err, timeout_s);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

int wait(PythonPrefetcher& p, int64_t ticket, double timeout_s, uintptr_t stream, bool keep) {
  const Inside inside(p);
  return in_slices<PrefetchTimeout>(timeout_s, [&](double slice_s) { return p.prefetcher.wait(ticket, slice_s, stream, keep); });
}

void drain(PythonPrefetcher& p, double timeout_s) {
  const Inside inside(p);
  in_slices<PrefetchTimeout>(timeout_s, [&](double slice_s) { p.prefetcher.drain(slice_s); });
}

// ids: (ticket, address, count, are_int64, on_device, stream, address of places)
void submit(PythonPrefetcher& p, const py::tuple& ids, std::vector<int64_t> sizes, double timeout_s) {
  const Inside inside(p);
  const PrefetchIds wanted{{reinterpret_cast<const void*>(ids[1].cast<uintptr_t>()), ids[2].cast<int64_t>(), ids[3].cast<bool>()},
                           std::move(sizes),
                           ids[4].cast<bool>(),
                           ids[5].cast<uintptr_t>(),
                           reinterpret_cast<const void*>(ids[6].cast<uintptr_t>()),
                           ids[0].cast<int64_t>()};
  in_slices<PrefetchQueueFull>(timeout_s, [&](double slice_s) { p.prefetcher.submit(wanted, slice_s); });
}

// A call that the prefetcher has itself, without the interpreter lock.
template <class Result, class... Args>
auto unlocked(Result (RowPrefetcher::*call)(Args...)) {
  return [call](PythonPrefetcher& p, Args... args) {
    const Inside inside(p);
    const py::gil_scoped_release release;
    return (p.prefetcher.*call)(args...);
  };
}

template <class Result, class... Args>
auto unlocked(Result (RowPrefetcher::*call)(Args...) const) {
  return [call](PythonPrefetcher& p, Args... args) {
    const Inside inside(p);
    const py::gil_scoped_release release;
    return (p.prefetcher.*call)(args...);
  };
}

// At most so long, until every other call has left and its thread has the interpreter lock again, so that none of them meets
// the end of the interpreter in here.
bool others_left(PythonPrefetcher& p, double timeout_s) {
  if (getpid() != p.process) return true;  // a child after a fork has none of the threads that were inside
  const py::gil_scoped_release release;
  const Deadline deadline(timeout_s);
  while (p.calls > 0) {
    if (deadline.left_s() == 0) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

py::dict counters(PythonPrefetcher& p) {
  const Inside inside(p);
  const RowPrefetcher& prefetcher = p.prefetcher;
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
  hits["remote"] = c.remote_rows;
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
  result["id_s"] = static_cast<double>(c.id_ns) * 1e-9;
  result["exposed_wait_s"] = static_cast<double>(c.exposed_wait_ns) * 1e-9;
  result["in_flight"] = c.in_flight;
  result["max_in_flight"] = c.max_in_flight;
  result["queued"] = c.queued;
  result["memory_bytes"] = prefetcher.memory_bytes();
  result["device_cache_slots"] = prefetcher.cache_slots();
  return result;
}

// Replaces an engine by another one around it.
using EngineWrapper = void (*)(std::shared_ptr<CopyEngine>* engine, const void* context);

std::shared_ptr<CopyEngine> wrap_engine(std::shared_ptr<CopyEngine> engine, uintptr_t wrapper, uintptr_t context) {
  reinterpret_cast<EngineWrapper>(wrapper)(&engine, reinterpret_cast<const void*>(context));
  return engine;
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
  py::register_exception_translator(&translate_prefetch_error);
  py::class_<CopyEngine, std::shared_ptr<CopyEngine>>(m, "CopyEngine",
                                                      "What a prefetcher runs on. See csrc/prefetch/copy_engine.h.")
      .def_property_readonly("name", &CopyEngine::name)
      .def_property_readonly("reads_host_memory", &CopyEngine::reads_host_memory)
      .def(
          "can_read",
          [](CopyEngine& e, uintptr_t at, int64_t bytes) { return e.can_read(reinterpret_cast<const std::byte*>(at), bytes); },
          py::arg("address"), py::arg("bytes"), "Whether gathers can read this memory where it is.");
  m.def("host_engine", &make_host_engine, py::arg("num_threads"), py::arg("has_device_memory") = false,
        "An engine of CPU threads; has_device_memory stands for a device, to which rows are staged and copied.");
  m.def("wrap_engine", &wrap_engine, py::arg("engine"), py::arg("wrapper"), py::arg("context"),
        "For tests: the engine as the C function at this address wraps it.");
  py::class_<PythonPrefetcher, std::shared_ptr<PythonPrefetcher>>(m, "RowPrefetcher", "See csrc/prefetch/row_prefetcher.h.")
      .def(py::init(&make_prefetcher), py::arg("options"), py::arg("engine"))
      .def("submit", &submit, py::arg("ids"), py::arg("sizes"), py::arg("timeout_s"))
      .def("wait", &wait, py::arg("ticket"), py::arg("timeout_s"), py::arg("stream"), py::arg("keep"))
      .def("release", unlocked(&RowPrefetcher::release), py::arg("slot"), py::arg("stream"))
      .def("restore", unlocked(&RowPrefetcher::restore), py::arg("ticket"))
      .def("knows", unlocked(&RowPrefetcher::knows), py::arg("ticket"))
      .def("cancel", unlocked(&RowPrefetcher::cancel), py::arg("ticket"))
      .def("drain", &drain, py::arg("timeout_s"))
      .def("close", unlocked(&RowPrefetcher::close))
      .def("others_left", &others_left, py::arg("timeout_s"))
      .def("clear_cache", unlocked(&RowPrefetcher::clear_cache))
      .def("counters", &counters)
      .def("chrome_trace", unlocked(&RowPrefetcher::chrome_trace));
}

}  // namespace engram_kernels
