// Hot rows of one table in the memory of a device that rows are copied to.
//
// Scope       which rows are cached, and the memory: cache slots behind the device's half of a staging ring, as one array of
//             rows and, where scales lie apart, one of scales, so that one gather reads staged and cached rows alike. It
//             launches nothing: rows get into their slots by the RowPlaces that `admit` gives, after the gather of their block.
// Exactness   a row can be found once the launch that wrote it is known to be done. Until then it is staged like one that is not
//             cached; if the launch fails, what it admitted is forgotten. A slot is written by a launch behind those that read
//             the row that leaves it: no block evicts what it uses itself.
// Threads     used by one thread at a time, but for `clear`.
// Cost        besides the rows on the device, kHostBytesPerSlot bytes per slot in host memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "prefetch/copy_engine.h"
#include "prefetch/place_rows.h"
#include "table/row_cache.h"

namespace engram_kernels {

struct DeviceRowCacheOptions {
  int64_t cache_bytes = 0;                 // of rows and scales, at most; and no more rows than the table has
  int64_t row_bytes = 0, scale_bytes = 0;  // of a row
  int64_t num_table_rows = 0;
  int num_staging_slots = 0;
  int64_t staging_rows = 0;  // that a slot of the staging ring has room for
};

class DeviceRowCache {
 public:
  static constexpr int64_t kHostBytesPerSlot = RowCacheDirectory::kBytesPerSlot + 4;

  DeviceRowCache(const DeviceRowCacheOptions& options, std::shared_ptr<CopyEngine> engine);
  ~DeviceRowCache();
  DeviceRowCache(const DeviceRowCache&) = delete;
  DeviceRowCache& operator=(const DeviceRowCache&) = delete;

  // The arrays: staging slot after staging slot, then the cache.
  std::byte* rows() const { return memory_; }
  std::byte* scales() const { return memory_ + num_rows_ * options_.row_bytes; }
  int64_t num_rows() const { return num_rows_; }
  int64_t first_row(int staging_slot) const { return staging_slot * options_.staging_rows; }
  int64_t cache_slots() const { return directory_.num_slots(); }
  int64_t cache_bytes() const { return cache_slots() * (options_.row_bytes + options_.scale_bytes + kHostBytesPerSlot); }

  // Before a staging slot is written: waits until it is known how the launch ended that read it, and learns what it can of the
  // others.
  void settle(int staging_slot);

  // Which of the block's rows are cached, in the order of `rows`: indices[i] is the place in the arrays of rows[i], or that of
  // the next staged row. Rows that must be staged move to the front of `rows`; how many.
  int64_t find(int64_t* rows, int64_t count, int staging_slot, int32_t* indices);
  // Gives slots to rows that the block stages, rows[i] at index first_row(staging_slot) + i, and writes where they go to
  // `places`, which stays as it is until the staging slot is settled. How many got one. Then comes `launched`, with what launches
  // the block and places them, or `abandon`.
  int64_t admit(const int64_t* rows, int64_t count, int staging_slot, RowPlace* places);
  void launched(Event event);
  void abandon();  // also where `admit` was not come to

  // Any thread: blocks that begin later find nothing that was admitted before.
  void clear() { clear_ = true; }

 private:
  struct Block {
    uint32_t number = 0;
    int staging_slot = -1;
    const RowPlace* places = nullptr;
    int64_t count = 0;
    Event event;
  };

  void prefetch(int64_t row) const;
  int64_t find_one(int64_t row);
  void forget(const Block& block);

  const DeviceRowCacheOptions options_;
  std::shared_ptr<CopyEngine> engine_;
  RowCacheDirectory directory_;
  std::vector<uint32_t, HugeAllocator<uint32_t>> written_by_;  // by slot: the block that admitted its row
  int64_t first_slot_, num_rows_;
  std::byte* memory_ = nullptr;
  uint32_t block_ = 0;
  std::deque<Block> in_flight_;  // not known to be done; the last one may have no event yet
  std::atomic<bool> clear_{false};
};

}  // namespace engram_kernels
