// A tier whose rows a client in Python brings: of an engine for rows on other machines.
//
// Ownership   no address is given to Python: ids go as bytes, rows come back as buffers, which are copied from while they are
//             held. So nothing that the client keeps, or that a traceback keeps for it, points into the memory of a request.
// Threads     the interpreter lock is held while the client runs and not while its rows are copied.
// Failure     what the client raises, to whoever waits for the request. Once the interpreter ends, an error and no call.
#include <pybind11/pybind11.h>

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "bindings/module.h"
#include "common/error.h"
#include "prefetch/deadline.h"
#include "table/cached_tier.h"
#include "table/file_reader.h"
#include "table/row_tier.h"

namespace py = pybind11;

namespace engram_kernels {
namespace {

bool interpreter_runs() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() != 0 && Py_IsFinalizing() == 0;
#else
  return Py_IsInitialized() != 0 && _Py_IsFinalizing() == 0;
#endif
}

// What a client asks whether its request was given up. It may be kept: after the request it says that there is none any more.
struct RequestWatch {
  const std::atomic<bool>* flag = nullptr;
  bool ended = false;

  bool cancelled() const { return ended || DirectRead::ending || (flag != nullptr && flag->load(std::memory_order_relaxed)); }
};

class ClientTier : public RowTier {
 public:
  ClientTier(const TierShape& shape, py::object fetch) : RowTier(shape), fetch_(std::move(fetch)) {}

  ~ClientTier() override {
    if (!interpreter_runs()) {
      fetch_.release();  // nothing can end it any more
      return;
    }
    const py::gil_scoped_acquire acquire;
    fetch_ = py::object();
  }

  void check_unchanged(const int64_t*, int64_t) const override {}  // the client holds its servers to the table that it found

 protected:
  void read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) override {
    if (request.count == 0) return;
    if (!interpreter_runs())
      EK_THROW_AS(std::runtime_error, "RowTier: the interpreter ends, so its client brings no rows any more");
    const py::gil_scoped_acquire acquire;
    const auto watch = std::make_shared<RequestWatch>(RequestWatch{cancelled});
    struct End {
      RequestWatch& watch;
      ~End() { watch.ended = true; }
    } const end{*watch};
    const py::bytes ids(reinterpret_cast<const char*>(request.ids), static_cast<size_t>(request.count * 8));
    int64_t done = 0;
    for (const py::handle piece : fetch_(ids, watch)) {
      if (piece.is_none()) EK_THROW_AS(FetchCancelled, "RowTier: the request was cancelled");
      done += take(piece.cast<py::tuple>(), request, done, counters);
    }
    if (done != request.count) {
      EK_THROW_AS(std::runtime_error, "RowTier: the client brought " << done << " rows, expected " << request.count);
    }
  }

 private:
  // Copies (rows, scales or None), which follow the first `done` of a request; how many they are.
  int64_t take(const py::tuple& piece, const TierRequest& request, int64_t done, FetchCounters* counters) const {
    EK_CHECK(piece.size() == 2, "RowTier: the client brought " << piece.size() << " arrays, expected rows and scales");
    const py::buffer_info rows = piece[0].cast<py::buffer>().request();
    const int64_t bytes = rows.size * rows.itemsize, count = row_bytes() == 0 ? 0 : bytes / row_bytes();
    EK_CHECK(is_dense(rows) && bytes == count * row_bytes() && count <= request.count - done,
             "RowTier: the client brought " << bytes << " bytes of rows, expected dense rows of " << row_bytes()
                                            << " bytes, at most " << request.count - done);
    py::buffer_info scales;
    if (scale_bytes() > 0) {
      scales = piece[1].cast<py::buffer>().request();
      EK_CHECK(is_dense(scales) && scales.size * scales.itemsize == count * scale_bytes(),
               "RowTier: the client brought " << scales.size * scales.itemsize << " bytes of scales, expected " << count
                                              << " times " << scale_bytes());
    }
    {
      const py::gil_scoped_release release;
      copy(request, done, count, row_bytes(), rows.ptr, request.rows);
      copy(request, done, count, scale_bytes(), scales.ptr, request.scales);
    }
    counters->moved_bytes += count * (row_bytes() + scale_bytes());
    ++counters->reads;
    return count;
  }

  static bool is_dense(const py::buffer_info& buffer) {
    py::ssize_t bytes = buffer.itemsize;
    for (py::ssize_t d = buffer.ndim - 1; d >= 0; --d) {
      const auto at = static_cast<size_t>(d);
      if (buffer.shape[at] > 1 && buffer.strides[at] != bytes) return false;
      bytes *= buffer.shape[at];
    }
    return true;
  }

  static void copy(const TierRequest& request, int64_t done, int64_t count, int64_t size, const void* from, std::byte* to) {
    if (size == 0 || count == 0) return;
    const auto* bytes = static_cast<const std::byte*>(from);
    if (request.positions == nullptr) {
      std::memcpy(to + done * size, bytes, static_cast<size_t>(count * size));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + request.position(done + i) * size, bytes + i * size, static_cast<size_t>(size));
    }
  }

  py::object fetch_;
};

TierOfPython client_tier(int64_t num_rows, int64_t row_bytes, int64_t scale_bytes, py::object fetch, int64_t cache_bytes) {
  EK_CHECK(num_rows >= 0 && row_bytes >= 0 && scale_bytes >= 0 && cache_bytes >= 0,
           "RowTier: num_rows " << num_rows << ", row_bytes " << row_bytes << ", scale_bytes " << scale_bytes << ", cache_bytes "
                                << cache_bytes << ": expected at least 0 each");
  const TierShape shape{num_rows, row_bytes, scale_bytes, row_bytes + scale_bytes};
  std::shared_ptr<RowTier> tier(new ClientTier(shape, std::move(fetch)), DeleteUnlocked());
  if (cache_bytes > 0) tier = make_unlocked<CachedTier>(std::move(tier), cache_bytes);
  return {std::move(tier), nullptr};
}

// Ends reads of clients and waits, at most so long, until every direct read has left. A child after a fork has none of them.
bool end_reads(double timeout_s) {
  DirectRead::ending = true;
  const py::gil_scoped_release release;
  const Deadline deadline(timeout_s);
  while (DirectRead::inside > 0) {
    if (deadline.left_s() == 0) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace

void bind_client_tier(py::module_& m) {
  pthread_atfork(nullptr, nullptr, [] { DirectRead::inside = 0; });
  m.def("end_reads", &end_reads, py::arg("timeout_s"),
        "At exit: ends reads of client tiers; whether every read of a tier has left within the time-out.");
  py::class_<RequestWatch, std::shared_ptr<RequestWatch>>(m, "RequestWatch", "Whether a request of a client tier was given up.")
      .def("cancelled", &RequestWatch::cancelled);
  m.def("client_tier", &client_tier, py::arg("num_rows"), py::arg("row_bytes"), py::arg("scale_bytes"), py::arg("fetch"),
        py::arg("cache_bytes") = 0,
        "A RowTier of a client: fetch(ids, watch) takes distinct ids, int64, as bytes, and yields pieces (rows, scales or None), "
        "dense buffers in the order of the ids; None once `watch.cancelled()`.");
}

}  // namespace engram_kernels
