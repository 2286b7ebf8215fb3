#include "engine_faults.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "prefetch/process_owned.h"

namespace engram_kernels {
namespace {

constexpr size_t kMaxHeldBack = 3;  // events whose end is hidden at a time, where they are reordered

// Shows the event of the engine below once it is told to.
class FaultyEvent final : public EngineEvent {
 public:
  // inner null: the launch failed
  void show(Event inner) {
    {
      const std::lock_guard lock(mutex_);
      shown_ = true;
      inner_ = std::move(inner);
    }
    changed_.notify_all();
  }

  bool wait(CopyEngine& engine, double timeout_s) {
    std::unique_lock lock(mutex_);
    const auto shown = [this] { return shown_; };
    if (timeout_s < 0) {
      changed_.wait(lock, shown);
    } else if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), shown)) {
      return false;
    }
    if (inner_ == nullptr) throw EngineError("injected failure of a launch");
    return engine.wait_host(inner_, -1);
  }

  bool times(const CopyEngine& engine, EngineTimes* times) {
    const std::lock_guard lock(mutex_);
    return inner_ == nullptr ? shown_ : engine.times(inner_, times);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool shown_ = false;
  Event inner_;
};

FaultyEvent& of(const Event& event) { return static_cast<FaultyEvent&>(*event); }

// Its stream is a thread that hands one launch after the other to the engine below and waits for it.
class FaultyEngine final : public CopyEngine {
 public:
  FaultyEngine(std::shared_ptr<CopyEngine> engine, const EngineFaults& faults)
      : engine_(std::move(engine)), faults_(faults), random_(faults.seed), stream_([this] { run(); }) {}

  ~FaultyEngine() override {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    stream_.join();
  }

  std::string name() const override { return engine_->name(); }
  bool reads_host_memory() const override { return engine_->reads_host_memory(); }
  std::byte* allocate_host(int64_t bytes) override { return engine_->allocate_host(bytes); }
  void free_host(std::byte* memory) noexcept override { engine_->free_host(memory); }
  std::byte* allocate_device(int64_t bytes) override { return engine_->allocate_device(bytes); }
  void free_device(std::byte* memory) noexcept override { engine_->free_device(memory); }
  bool can_read(const std::byte* begin, int64_t bytes) const override { return engine_->can_read(begin, bytes); }
  void adopt_thread() noexcept override { engine_->adopt_thread(); }
  Event record_on(uintptr_t stream) override { return engine_->record_on(stream); }
  bool is_captured(const Event&) const override { return false; }

  Event launch(const EngineLaunch& launch) override {
    Task task{launch, {}, {}, std::make_shared<FaultyEvent>()};
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

  bool wait_on(const Event& event, uintptr_t, double timeout_s) override { return wait_host(event, timeout_s); }
  bool wait_host(const Event& event, double timeout_s) override {
    return event == nullptr || of(event).wait(*engine_, timeout_s);
  }
  bool times(const Event& event, EngineTimes* times) const override {
    return event != nullptr && of(event).times(*engine_, times);
  }

 private:
  struct Task {
    EngineLaunch launch;
    GatherRowsParams gather;
    PlaceRowsParams place;
    std::shared_ptr<FaultyEvent> event;
  };
  struct Finished {
    std::shared_ptr<FaultyEvent> event;
    Event inner;
  };

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (tasks_.empty()) {
        lock.unlock();
        show_finished(0);  // nobody waits for ever for what is held back
        lock.lock();
      }
      work_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      Task task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (faults_.max_delay_us > 0) {
        std::this_thread::sleep_for(
            std::chrono::microseconds(std::uniform_int_distribution<int>(0, faults_.max_delay_us)(random_)));
      }
      Finished finished{task.event, execute(task)};
      task = {};  // what it keeps alive goes before anybody is told
      finished_.push_back(std::move(finished));
      show_finished(faults_.reorder ? kMaxHeldBack : 0);
      lock.lock();
    }
  }

  // The event of the engine below, when it is done; null where the launch was to fail.
  Event execute(Task& task) {
    if (faults_.error > 0 && std::uniform_real_distribution<double>(0, 1)(random_) < faults_.error) return nullptr;
    EngineLaunch launch = std::move(task.launch);
    launch.after = launch.also_after = nullptr;  // of this stream, and so before it
    if (launch.gather != nullptr) launch.gather = &task.gather;
    if (launch.place != nullptr) launch.place = &task.place;
    Event event = engine_->launch(launch);
    launch = {};
    try {
      engine_->wait_host(event, -1);
    } catch (const std::exception&) {  // told to whoever waits for it
    }
    return event;
  }

  // Tells of all finished launches but `held_back`.
  void show_finished(size_t held_back) {
    if (faults_.reorder) std::shuffle(finished_.begin(), finished_.end(), random_);
    while (finished_.size() > held_back) {
      Finished finished = std::move(finished_.back());
      finished_.pop_back();
      finished.event->show(std::move(finished.inner));
    }
  }

  std::shared_ptr<CopyEngine> engine_;
  EngineFaults faults_;
  std::mt19937_64 random_;          // of the stream
  std::vector<Finished> finished_;  // of the stream
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Task> tasks_;
  bool closing_ = false;
  std::thread stream_;
};

}  // namespace

std::shared_ptr<CopyEngine> add_engine_faults(std::shared_ptr<CopyEngine> engine, const EngineFaults& faults) {
  return make_process_owned<FaultyEngine>(std::move(engine), faults);
}

}  // namespace engram_kernels

extern "C" {

engram_kernels::EngineFaults* ek_engine_faults(uint64_t seed, double error, int max_delay_us, bool reorder) {
  return new engram_kernels::EngineFaults{seed, error, max_delay_us, reorder};
}

// As _C.wrap_engine takes it: replaces the engine by one with faults.
void ek_add_engine_faults(std::shared_ptr<engram_kernels::CopyEngine>* engine, const void* faults) {
  *engine = engram_kernels::add_engine_faults(*engine, *static_cast<const engram_kernels::EngineFaults*>(faults));
}
}
