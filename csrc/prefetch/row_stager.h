// Brings rows of a table across the links that gathers do not cross by themselves: file to memory, memory to a device of its
// own. Block by block: distinct rows into a slot of the staging ring, a copy where the device has memory of its own, a gather
// that decodes and puts duplicates in their places. Rows that a cache on the device has are gathered there; others may go into
// it when they have been gathered.
//
// Order       ids are sorted and made distinct before a slot is waited for: while the blocks before are copied.
// Memory      kNumSlots slots; a block has at most as many ids as a slot has room for rows, so a request of any size passes
//             through. With a cache its device memory holds the device's half of the slots too.
// Threads     used by one thread at a time; its own pool shares the sorting of ids and the copying of rows.
// Failure     thrown; what was launched before goes on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "prefetch/copy_engine.h"
#include "prefetch/device_row_cache.h"
#include "prefetch/fetch_way.h"
#include "prefetch/slot_ring.h"
#include "prefetch/thread_pool.h"
#include "table/row_tier.h"

namespace engram_kernels {

struct RowStagerOptions {
  RowSource table{};              // `rows` is null where a tier has them
  std::shared_ptr<RowTier> tier;  // null: the table is in memory
  FetchWay way = FetchWay::kInPlace;
  int64_t staging_bytes = 0;  // of all slots
  int64_t cache_bytes = 0;    // of rows on a device that rows are copied to; 0: no cache
  int num_threads = 1;        // that copy rows of a table in memory
};

struct StageCounters {
  int64_t unique = 0, moved_bytes = 0;
  int64_t id_ns = 0;                                          // that ids were sorted and made distinct
  int64_t device_cached = 0, cached_rows = 0, tier_rows = 0;  // of `unique`, from: the device's cache, the tier's, the tier
};

class RowStager {
 public:
  static constexpr int kNumSlots = 2;  // one is filled while the other is copied from

  RowStager(const RowStagerOptions& options, std::shared_ptr<CopyEngine> engine);

  // The ids of a device in host memory; waits for `ready`, where they are made.
  std::vector<std::byte> fetch_ids(const RowIds& ids, const Event& ready);

  // Launches what fills `gather.out` with the rows of gather.row_ids, which are in host memory and in range; an event per block.
  // `first`: the events that come before the first block.
  void stage(const GatherRowsParams& gather, const EngineLaunch& first, const std::atomic<bool>& cancelled,
             std::vector<Event>* events, StageCounters* counters);

  void clear_cache();  // any thread: what is staged from here on finds nothing that was cached before

  int64_t memory_bytes() const;
  int64_t cache_slots() const { return cache_ == nullptr ? 0 : cache_->cache_slots(); }

 private:
  struct Block;
  void make_ring();
  RingSlot take_slot();
  template <class Body>
  void for_parts(const RowOrder& order, const Body& body);
  void find_distinct(const RowOrder& order);
  Event launch_block(GatherRowsParams* gather, const std::optional<RowOrder>& order, const RingSlot& slot, EngineLaunch launch,
                     const std::atomic<bool>& cancelled, StageCounters* counters);
  void fill_with_ids(const RowIds& ids, const RingSlot& slot, Block* block);
  void lay_out(const RowIds& ids, const RingSlot& slot, Block* block, StageCounters* counters);
  void place_ids(const RowIds& ids, const RowOrder& order, int32_t* local_ids);
  void read_rows(const Block& block, const std::atomic<bool>& cancelled, StageCounters* counters);
  void admit_rows(const RingSlot& slot, Block* block);
  void copy_rows(const Block& block);

  const RowStagerOptions options_;
  std::shared_ptr<CopyEngine> engine_;
  const FetchWayTraits& way_;
  const int64_t row_bytes_, scale_bytes_;
  int64_t block_ids_ = 0;
  int64_t rows_per_slot_ = 0;  // with a cache: the room of a slot in rows, ids included
  ThreadPool threads_;
  std::unique_ptr<DeviceRowCache> cache_;
  std::unique_ptr<SlotRing> staging_;
  RowOrderMemory sorting_;
  std::vector<int64_t> before_;    // by part of the block's order: its distinct rows before that part
  std::vector<int64_t> distinct_;  // rows of the block; then, at its front, those that are staged
  std::vector<int32_t> indices_;   // with a cache: of its distinct rows, where the gather finds them
};

}  // namespace engram_kernels
