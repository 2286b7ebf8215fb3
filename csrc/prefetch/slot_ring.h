// A ring of buffers of one size, taken in turn: each comes with the events that must be done before it is written again.
//
// Scope       numbers and events; and, where it is made with an engine, the memory: registered host memory, and as much on a
//             device that has its own, unless the owner has it.
// Threads     none of its own, and no lock: the caller has one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "prefetch/copy_engine.h"

namespace engram_kernels {

struct RingSlot {
  int number = -1;
  Event after, also_after;  // what still uses it: two where it was read on two streams
  std::byte* host = nullptr;
  std::byte* device = nullptr;  // as `host` where the engine reads host memory, null where the owner has it
};

class SlotRing {
 public:
  explicit SlotRing(int num_slots);  // no memory of its own
  SlotRing(int num_slots, int64_t slot_bytes, std::shared_ptr<CopyEngine> engine, bool on_device);
  ~SlotRing();
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  bool empty() const { return free_.empty(); }
  RingSlot take();  // the one that was given back first; not while empty
  void give(int number, Event after, Event also_after = nullptr);
  void forget_events();  // of slots that nobody takes any more

 private:
  std::shared_ptr<CopyEngine> engine_;
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
  int64_t slot_bytes_ = 0;
  std::deque<RingSlot> free_;
};

}  // namespace engram_kernels
