#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "prefetch/prefetch_trace.h"

namespace engram_kernels {

// What is left of a time-out; negative: for ever.
class Deadline {
 public:
  explicit Deadline(double timeout_s) : timeout_s_(timeout_s), begin_ns_(steady_ns()) {}
  double left_s() const {
    return timeout_s_ < 0 ? -1 : std::max(0.0, timeout_s_ - static_cast<double>(steady_ns() - begin_ns_) * 1e-9);
  }

  template <class Ready>
  bool wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const Ready& ready) const {
    if (timeout_s_ < 0) {
      changed.wait(lock, ready);
      return true;
    }
    return changed.wait_for(lock, std::chrono::duration<double>(left_s()), ready);
  }

 private:
  double timeout_s_;
  int64_t begin_ns_;
};

}  // namespace engram_kernels
