#include "prefetch/slot_ring.h"

#include <utility>

namespace engram_kernels {

SlotRing::SlotRing(int num_slots) {
  for (int i = 0; i < num_slots; ++i) free_.push_back({i, nullptr, nullptr, nullptr, nullptr});
}

SlotRing::SlotRing(int num_slots, int64_t slot_bytes, std::shared_ptr<CopyEngine> engine, bool on_device)
    : engine_(std::move(engine)), slot_bytes_(slot_bytes) {
  host_ = engine_->allocate_host(num_slots * slot_bytes);
  if (engine_->reads_host_memory()) {
    device_ = host_;
  } else if (on_device) {
    try {
      device_ = engine_->allocate_device(num_slots * slot_bytes);
    } catch (...) {
      engine_->free_host(host_);
      throw;
    }
  }
  for (int i = 0; i < num_slots; ++i) give(i, nullptr);
}

SlotRing::~SlotRing() {
  if (engine_ == nullptr) return;
  if (device_ != nullptr && device_ != host_) engine_->free_device(device_);
  engine_->free_host(host_);
}

RingSlot SlotRing::take() {
  RingSlot slot = std::move(free_.front());
  free_.pop_front();
  return slot;
}

void SlotRing::give(int number, Event after, Event also_after) {
  const int64_t at = number * slot_bytes_;
  free_.push_back({number, std::move(after), std::move(also_after), host_ == nullptr ? nullptr : host_ + at,
                   device_ == nullptr ? nullptr : device_ + at});
}

void SlotRing::forget_events() {
  for (RingSlot& slot : free_) slot.after = slot.also_after = nullptr;
}

}  // namespace engram_kernels
