// What the files of the pybind11 module give each other.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>

namespace engram_kernels {

class FileReader;
class RowTier;

// Each adds the classes or functions of one folder of csrc to the module.
void bind_table(pybind11::module_& m);
void bind_client_tier(pybind11::module_& m);  // after bind_table
void bind_host_memory(pybind11::module_& m);
void bind_prefetcher(pybind11::module_& m);  // after bind_table: a table outside memory is a RowTier
void bind_probes(pybind11::module_& m);

// Ends an object without the interpreter lock: its memory may be gigabytes, and its threads may wait for a disk.
struct DeleteUnlocked {
  template <class T>
  void operator()(T* object) const {
    if (PyGILState_Check() == 0) {
      delete object;
      return;
    }
    const pybind11::gil_scoped_release release;
    delete object;
  }
};

template <class T, class... Args>
std::shared_ptr<T> make_unlocked(Args&&... args) {
  const pybind11::gil_scoped_release release;
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), DeleteUnlocked());
}

// A read that Python asked a tier for, until its thread has the interpreter lock again. At its end the interpreter waits for
// them: a thread that met that end in here would abort the process.
class DirectRead {
 public:
  DirectRead() { ++inside; }
  ~DirectRead() { --inside; }
  DirectRead(const DirectRead&) = delete;
  DirectRead& operator=(const DirectRead&) = delete;

  static inline std::atomic<int> inside{0};
  static inline std::atomic<bool> ending{false};  // reads of a client in Python end early
};

// What Python holds of a tier: the reader of its files beside it, where there are any.
struct TierOfPython {
  std::shared_ptr<RowTier> tier;
  std::shared_ptr<FileReader> reader;
};

}  // namespace engram_kernels
