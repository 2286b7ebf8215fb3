#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "table/io_queue.h"

namespace engram_kernels {
namespace {

class PreadQueue;

int64_t read_now(const IoRead& read) {
  const auto bytes = static_cast<size_t>(read.bytes);
  const ssize_t got = read.write ? pwrite(read.fd, read.to, bytes, read.offset) : pread(read.fd, read.to, bytes, read.offset);
  return got >= 0 ? int64_t{got} : -int64_t{errno};
}

}  // namespace

class PreadPool {
 public:
  explicit PreadPool(int max_threads) : max_threads_(max_threads) {}

  ~PreadPool() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // The reads of `queue`; the caller holds no lock.
  void add(PreadQueue* queue, const std::vector<IoRead>& reads) {
    size_t wake = 0;
    {
      const std::lock_guard lock(mutex_);
      for (const IoRead& read : reads) tasks_.push_back({queue, read});
      wake = tasks_.size() - 1;  // the caller takes one itself
      while (threads_.size() < static_cast<size_t>(max_threads_) && idle_ + started_ < wake) {
        try {
          threads_.emplace_back([this] { run(); });
          ++started_;
        } catch (const std::system_error&) {
          break;  // no more threads to be had: the caller reads what is left
        }
      }
    }
    for (size_t i = 0; i < wake; ++i) work_.notify_one();
  }

  bool take_one_of(PreadQueue* queue, IoRead* read) {
    const std::lock_guard lock(mutex_);
    for (auto task = tasks_.begin(); task != tasks_.end(); ++task) {
      if (task->queue != queue) continue;
      *read = task->read;
      tasks_.erase(task);
      return true;
    }
    return false;
  }

 private:
  struct Task {
    PreadQueue* queue;
    IoRead read;
  };

  void run();

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Task> tasks_;
  std::vector<std::thread> threads_;
  size_t idle_ = 0, started_ = 0;  // threads that wait for work; threads that do not run yet
  int max_threads_;
  bool closing_ = false;
};

namespace {

class PreadQueue final : public IoQueue {
 public:
  explicit PreadQueue(std::shared_ptr<PreadPool> pool) : pool_(std::move(pool)) {}

  void submit(const IoRead& read) override { held_.push_back(read); }

  int wait(IoDone* done, int capacity) override {
    if (!held_.empty()) {
      pool_->add(this, held_);
      held_.clear();
    }
    for (;;) {
      if (const int count = take(done, capacity, false); count > 0) return count;
      IoRead read;
      if (!pool_->take_one_of(this, &read)) return take(done, capacity, true);
      done[0] = {read.slot, read_now(read)};
      return 1 + take(done + 1, capacity - 1, false);
    }
  }

  void finish(const IoDone& result) {
    const std::lock_guard lock(mutex_);  // held while notifying: the queue may be gone as soon as its owner has the last result
    results_.push_back(result);
    arrived_.notify_one();
  }

 private:
  int take(IoDone* done, int capacity, bool block) {
    std::unique_lock lock(mutex_);
    if (block) arrived_.wait(lock, [this] { return !results_.empty(); });
    int count = 0;
    for (; count < capacity && !results_.empty(); results_.pop_back()) done[count++] = results_.back();
    return count;
  }

  std::shared_ptr<PreadPool> pool_;
  std::vector<IoRead> held_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<IoDone> results_;
};

}  // namespace

void PreadPool::run() {
  std::unique_lock lock(mutex_);
  --started_;
  for (;;) {
    ++idle_;
    work_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
    --idle_;
    if (tasks_.empty()) return;
    const Task task = tasks_.front();
    tasks_.pop_front();
    lock.unlock();
    task.queue->finish({task.read.slot, read_now(task.read)});
    lock.lock();
  }
}

std::shared_ptr<PreadPool> make_pread_pool(int max_threads) { return std::make_shared<PreadPool>(max_threads); }

std::unique_ptr<IoQueue> make_pread_queue(std::shared_ptr<PreadPool> pool) {
  return std::make_unique<PreadQueue>(std::move(pool));
}

}  // namespace engram_kernels
