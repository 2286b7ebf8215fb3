// A fixed number of threads that share the ranges of one call at a time with the thread that makes it: what the prefetcher hands
// to the torch-free kernels as their `Parallel`, since it may not use torch's threads behind the caller's back.
//
// Threads     `run` may be called from several threads at once; each works on its own ranges, the pool's threads help.
// Failure     a body must not throw.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/parallel.h"

namespace engram_kernels {

// A thread that there is no doing without; says so where the system has none left.
template <class Run>
std::thread start_thread(const char* which, Run run) {
  try {
    return std::thread(std::move(run));
  } catch (const std::system_error& err) {
    EK_THROW_AS(std::runtime_error, "RowPrefetcher: the thread " << which << " cannot be started: " << err.what());
  }
}

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // callers included: num_threads - 1 are started, when there is work for them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // For kernels that are called on this thread, until another pool says the same.
  Parallel parallel();

 private:
  struct Job;
  void run(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context);
  void help();
  static void take_ranges(Job& job);

  const int num_threads_;
  std::mutex mutex_;
  std::condition_variable work_, left_;
  std::deque<Job*> jobs_;
  std::vector<std::thread> threads_;
  bool closing_ = false;
};

}  // namespace engram_kernels
