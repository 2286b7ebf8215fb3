#include "io_faults.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace engram_kernels {
namespace {

class FaultyQueue final : public IoQueue {
 public:
  FaultyQueue(IoQueue* queue, const IoFaults& faults, uint64_t number)
      : queue_(queue), faults_(faults), random_(faults.seed * 1'000'003 + number) {}

  void submit(const IoRead& read) override {
    const bool bad = read.offset < faults_.bad_end && read.offset + read.bytes > faults_.bad_begin;
    if (faults_.refuse_direct && read.direct) {
      ready_.push_back({read.slot, -EINVAL});
    } else if (bad || draw(faults_.eio)) {
      ready_.push_back({read.slot, -EIO});
    } else {
      // a direct read takes whole sectors: all is read, but less of it reported, and the rest of the buffer spoiled
      Cut cut{read.bytes, read.to};
      if (read.bytes > 1 && draw(faults_.shorter)) cut.bytes = std::uniform_int_distribution<int64_t>(1, read.bytes - 1)(random_);
      cuts_.resize(std::max(cuts_.size(), static_cast<size_t>(read.slot) + 1));
      cuts_[static_cast<size_t>(read.slot)] = cut;
      queue_->submit(read);
      ++in_flight_;
    }
  }

  int wait(IoDone* done, int capacity) override {
    if (faults_.max_delay_us > 0) {
      std::this_thread::sleep_for(
          std::chrono::microseconds(std::uniform_int_distribution<int>(0, faults_.max_delay_us)(random_)));
    }
    // reordered: some results are held back until others came
    const size_t wanted = faults_.reorder ? std::uniform_int_distribution<size_t>(1, ready_.size() + in_flight_)(random_) : 1;
    while (ready_.size() < wanted) {
      IoDone results[16];
      const int count = queue_->wait(results, 16);
      in_flight_ -= static_cast<size_t>(count);
      for (int i = 0; i < count; ++i) {
        const Cut& cut = cuts_[static_cast<size_t>(results[i].slot)];
        if (results[i].result > cut.bytes)
          std::memset(cut.to + cut.bytes, 0xA5, static_cast<size_t>(results[i].result - cut.bytes));
        ready_.push_back({results[i].slot, std::min(results[i].result, cut.bytes)});
      }
    }
    if (faults_.reorder) std::shuffle(ready_.begin(), ready_.end(), random_);
    int count = 0;
    for (; count < capacity && !ready_.empty(); ready_.pop_back()) done[count++] = ready_.back();
    return count;
  }

 private:
  struct Cut {
    int64_t bytes;  // reported at most
    std::byte* to;
  };

  bool draw(double share) { return share > 0 && std::uniform_real_distribution<double>(0, 1)(random_) < share; }

  std::unique_ptr<IoQueue> queue_;
  IoFaults faults_;
  std::mt19937_64 random_;
  std::vector<IoDone> ready_;
  std::vector<Cut> cuts_;  // by slot
  size_t in_flight_ = 0;
};

}  // namespace

IoQueue* add_io_faults(IoQueue* queue, uint64_t number, void* faults) {
  return new FaultyQueue(queue, *static_cast<const IoFaults*>(faults), number);
}

}  // namespace engram_kernels

// For ctypes: tests/support/io_faults.py.
extern "C" engram_kernels::IoFaults* ek_io_faults(uint64_t seed, double eio, double shorter, bool reorder, int max_delay_us,
                                                  int64_t bad_begin, int64_t bad_end, bool refuse_direct) {
  return new engram_kernels::IoFaults{seed, eio, shorter, reorder, max_delay_us, bad_begin, bad_end, refuse_direct};
}
extern "C" uintptr_t ek_io_faults_wrapper() { return reinterpret_cast<uintptr_t>(&engram_kernels::add_io_faults); }
