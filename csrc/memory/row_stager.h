// Brings rows of a table across the links that gathers do not cross by themselves: file to memory, memory to a device of its
// own. Block by block: distinct rows into a slot of the staging ring, a copy where the device has memory of its own, a gather
// that decodes and puts duplicates in their places.
//
// Memory      kNumSlots slots; a block has as many ids as a slot has room for rows, so a request of any size passes through.
// Threads     used by one thread at a time.
// Failure     thrown; what was launched before goes on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory/copy_engine.h"
#include "memory/file_tier.h"
#include "memory/staging_ring.h"
#include "memory/thread_pool.h"

namespace engram_kernels {

struct RowStagerOptions {
  RowSource table{};               // `rows` is null for a file
  std::shared_ptr<FileTier> file;  // null: the table is in memory
  bool direct = false;             // gathers read the table itself: ids alone are staged
  bool on_device = false;          // the table is in the device's memory
  int64_t staging_bytes = 0;       // of all slots
  int num_threads = 1;             // that copy rows of a table in memory
};

struct StageCounters {
  int64_t unique = 0, moved_bytes = 0, cached_rows = 0, file_rows = 0;
};

class RowStager {
 public:
  static constexpr int kNumSlots = 2;  // one is filled while the other is copied from

  RowStager(const RowStagerOptions& options, std::shared_ptr<CopyEngine> engine);

  // The ids of a device in host memory; waits for `ready`, where they are made.
  std::vector<std::byte> fetch_ids(const RowIds& ids, const Event& ready);

  // Launches what fills `gather.out` with the rows of gather.row_ids, which are in host memory and in range; an event a block.
  // `after`: before the first block writes.
  void stage(const GatherRowsParams& gather, const Event& after, const std::atomic<bool>& cancelled, std::vector<Event>* events,
             StageCounters* counters);

  bool is_needed() const { return needed_; }  // false: gathers of ids in host memory can be launched as they are
  int64_t memory_bytes() const { return needed_ ? options_.staging_bytes * (engine_->reads_host_memory() ? 1 : 2) : 0; }

 private:
  struct Block;
  RingSlot take_slot();
  void fill_with_rows(const RowIds& ids, const RingSlot& slot, const std::atomic<bool>& cancelled, Block* block,
                      StageCounters* counters);
  void copy_rows(std::byte* rows, std::byte* scales);

  const RowStagerOptions options_;
  std::shared_ptr<CopyEngine> engine_;
  const int64_t row_bytes_, scale_bytes_;
  const bool needed_;
  int64_t block_ids_ = 0;
  ThreadPool threads_;
  std::unique_ptr<StagingRing> ring_;
  std::vector<int64_t> distinct_;  // of the block
};

}  // namespace engram_kernels
