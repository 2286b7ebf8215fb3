// The device seam on CPU threads: a stream is a thread, an event a flag.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "common/error.h"
#include "prefetch/copy_engine.h"
#include "prefetch/process_owned.h"
#include "prefetch/thread_pool.h"

namespace engram_kernels {
namespace {

constexpr size_t kPageBytes = 4096;

using Clock = std::chrono::steady_clock;

int64_t now_ns() { return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count(); }

// How a launch ended. A message and not an exception: every waiter gets an exception of its own.
struct Outcome {
  enum { kDone, kBadId, kFailed } kind = kDone;
  std::string message;
  EngineTimes times;
};

class HostEvent final : public EngineEvent {
 public:
  void finish(Outcome outcome) {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
      outcome_ = std::move(outcome);
    }
    changed_.notify_all();
  }

  bool wait(double timeout_s) {
    std::unique_lock lock(mutex_);
    const auto done = [this] { return done_; };
    if (timeout_s < 0) {
      changed_.wait(lock, done);
    } else if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), done)) {
      return false;
    }
    if (outcome_.kind == Outcome::kBadId) throw std::out_of_range(outcome_.message);
    if (outcome_.kind == Outcome::kFailed) throw EngineError(outcome_.message);
    return true;
  }

  bool times(EngineTimes* times) {
    const std::lock_guard lock(mutex_);
    *times = outcome_.times;
    return done_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  Outcome outcome_;
};

HostEvent& of(const Event& event) { return static_cast<HostEvent&>(*event); }

class HostEngine final : public CopyEngine {
 public:
  HostEngine(int num_threads, bool has_device_memory)
      : has_device_memory_(has_device_memory), threads_(num_threads), stream_(start_thread("of the stream", [this] { run(); })) {}

  ~HostEngine() override {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    stream_.join();
  }

  std::string name() const override { return "cpu"; }
  bool reads_host_memory() const override { return !has_device_memory_; }

  std::byte* allocate_host(int64_t bytes) override {
    const size_t pages = (static_cast<size_t>(bytes) + kPageBytes - 1) / kPageBytes;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, std::max<size_t>(pages, 1) * kPageBytes));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  void free_host(std::byte* memory) noexcept override { std::free(memory); }
  std::byte* allocate_device(int64_t bytes) override { return allocate_host(bytes); }
  void free_device(std::byte* memory) noexcept override { free_host(memory); }
  bool can_read(const std::byte*, int64_t) const override { return true; }
  void adopt_thread() noexcept override {}

  Event launch(const EngineLaunch& launch) override {
    Task task{launch, {}, {}, std::make_shared<HostEvent>()};
    if (launch.gather != nullptr) task.gather = *launch.gather;
    if (launch.place != nullptr) task.place = *launch.place;
    Event event = task.event;
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    work_.notify_one();
    return event;
  }

  // a caller on the CPU has done what it queued
  Event record_on(uintptr_t) override { return nullptr; }
  bool wait_on(const Event& event, uintptr_t, double timeout_s) override { return wait_host(event, timeout_s); }
  bool wait_host(const Event& event, double timeout_s) override { return event == nullptr || of(event).wait(timeout_s); }
  bool times(const Event& event, EngineTimes* times) const override { return event != nullptr && of(event).times(times); }
  bool is_captured(const Event&) const override { return false; }

 private:
  struct Task {
    EngineLaunch launch;
    GatherRowsParams gather;
    PlaceRowsParams place;
    std::shared_ptr<HostEvent> event;
  };

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      Task task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      const std::shared_ptr<HostEvent> event = task.event;
      Outcome outcome;
      outcome.times.begin_ns = now_ns();
      try {
        execute(task);
      } catch (const std::out_of_range& err) {
        outcome = {Outcome::kBadId, err.what(), outcome.times};
      } catch (const std::exception& err) {
        outcome = {Outcome::kFailed, err.what(), outcome.times};
      }
      outcome.times.end_ns = now_ns();
      task = {};  // what it keeps alive goes before anybody is told
      event->finish(std::move(outcome));
      lock.lock();
    }
  }

  // launch.after is of this stream, and so before it; launch.ready is null: see record_on
  void execute(Task& task) {
    const EngineLaunch& launch = task.launch;
    for (const EngineCopy& copy : launch.copies) {
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    if (launch.gather != nullptr) {
      const GatherRowsParams& p = task.gather;
      check_params(p);
      if (p.error_count != nullptr) check_row_ids("RowPrefetcher", p.row_ids, p.source.num_rows, &p.row_ids.count, 1);
      gather_rows_cpu(p, threads_.parallel());
    }
    if (launch.place != nullptr) place_rows_cpu(task.place, threads_.parallel());
  }

  bool has_device_memory_;
  ThreadPool threads_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Task> tasks_;
  bool closing_ = false;
  std::thread stream_;
};

}  // namespace

std::shared_ptr<CopyEngine> make_host_engine(int num_threads, bool has_device_memory) {
  return make_process_owned<HostEngine>(num_threads, has_device_memory);
}

}  // namespace engram_kernels
