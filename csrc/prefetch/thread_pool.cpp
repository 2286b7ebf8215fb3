#include "prefetch/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <system_error>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kRangesAThread = 4;  // so that a thread that was interrupted does not hold up the others

thread_local ThreadPool* pool_of_thread = nullptr;

}  // namespace

struct ThreadPool::Job {
  int64_t begin, end, range;
  Parallel::Body body;
  void* context;
  std::atomic<int64_t> next;
  int helpers = 0;  // threads of the pool that work on it
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  EK_CHECK(num_threads >= 1 && num_threads <= kMaxThreads,
           "RowPrefetcher: threads is " << num_threads << ", expected [1, " << kMaxThreads << "]");
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Parallel ThreadPool::parallel() {
  if (num_threads_ == 1) return {};
  pool_of_thread = this;
  Parallel parallel;
  parallel.run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    pool_of_thread->run(begin, end, grain, body, context);
  };
  return parallel;
}

void ThreadPool::take_ranges(Job& job) {
  for (;;) {
    const int64_t begin = job.next.fetch_add(job.range);
    if (begin >= job.end) return;
    job.body(begin, std::min(begin + job.range, job.end), job.context);
  }
}

void ThreadPool::run(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  const int64_t count = end - begin, wanted = num_threads_ * kRangesAThread;
  Job job{begin, end, std::max(grain, (count + wanted - 1) / wanted), body, context, {begin}};
  const int64_t helpers = std::min<int64_t>(num_threads_, (count + job.range - 1) / job.range) - 1;
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(&job);
    while (static_cast<int64_t>(threads_.size()) < helpers) {
      try {
        threads_.emplace_back([this] { help(); });
      } catch (const std::system_error&) {
        break;  // no more threads to be had: the caller does what is left
      }
    }
  }
  for (int64_t i = 0; i < helpers; ++i) work_.notify_one();
  take_ranges(job);
  std::unique_lock lock(mutex_);
  const auto found = std::find(jobs_.begin(), jobs_.end(), &job);
  if (found != jobs_.end()) jobs_.erase(found);
  left_.wait(lock, [&job] { return job.helpers == 0; });
}

void ThreadPool::help() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return closing_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job& job = *jobs_.front();
    ++job.helpers;
    lock.unlock();
    take_ranges(job);
    lock.lock();
    if (!jobs_.empty() && jobs_.front() == &job) jobs_.pop_front();  // nothing of it is left to be taken
    if (--job.helpers == 0) left_.notify_all();
  }
}

}  // namespace engram_kernels
