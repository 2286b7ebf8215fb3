// What a prefetcher knows of a ticket. Of row_prefetcher*.cpp alone.
#pragma once

#include "prefetch/row_prefetcher.h"

namespace engram_kernels {

struct RowPrefetcher::Request {
  int64_t number = 0, count = 0;
  RowIds ids{};  // in `kept_ids`, or on the device
  std::vector<int64_t> sizes;
  std::vector<std::byte> kept_ids;
  Event ids_ready, slot_free;
  int slot = -1;
  bool ids_on_device = false;
  std::atomic<bool> cancelled{false};
  int64_t submitted_ns = 0, fetch_begin_ns = 0, fetch_end_ns = 0;
  StageCounters staged;

  // of the prefetcher's lock
  bool settled = false;  // launched or failed: what is above does not change any more
  bool gone = false;     // cancelled: its slot is free once it is settled
  std::exception_ptr error;
  std::vector<Event> events;
  std::condition_variable changed;
};

}  // namespace engram_kernels
