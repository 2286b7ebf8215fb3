// The directory of a bounded row cache: which row lies in which slot, and which row makes room for another.
//
// Scope       ids and slots; it holds no rows and copies nothing. Used for the RAM cache of the file tier and for hot rows
//             on a device.
// Policy      set-associative: a row may lie in the kWays slots of its bucket. Each slot counts its recent uses (CLOCK, 0..3);
//             a sketch of small counters estimates how often any row was asked for lately, cached or not. A new row enters
//             where it was asked for at least as often as the least used row of its bucket: a scan does not wash hot rows out.
// Threads     none of its own, and no lock: the caller has one.
// Cost        kBytesPerSlot bytes a slot; find and admit look at one bucket.
#pragma once

#include <cstdint>
#include <vector>

namespace engram_kernels {

class RowCacheDirectory {
 public:
  static constexpr int kWays = 8;
  static constexpr int64_t kBytesPerSlot = 8 + 1 + 4 + 8;  // row id, uses, batch, its share of the sketch (1 to 8 bytes)

  // At most `max_slots` slots: whole buckets where there is more than one. 0: caches nothing.
  explicit RowCacheDirectory(int64_t max_slots);

  int64_t num_slots() const { return static_cast<int64_t>(rows_.size()); }
  int64_t num_rows() const { return num_rows_; }

  // The slot of `row`, or -1. Counts the use either way: call it once a request of the row.
  int64_t find(int64_t row);

  // A slot for `row`; -1: not admitted, or there already. `*evicted` is the row that lay in the slot, or -1. The caller fills
  // the slot, or calls `forget` where that fails. A row keeps its slot until an `admit` evicts it.
  int64_t admit(int64_t row, int64_t* evicted);

  // From here on slots that are found or admitted are kept until the next call: what one batch uses, it does not evict.
  // Without any call nothing is kept.
  void begin_batch() { ++batch_; }

  void forget(int64_t row);  // nothing where it is not cached
  void clear();              // rows, not what is known of their use

 private:
  int64_t bucket_of(int64_t row) const;
  void count_use(int64_t row);
  int estimate(int64_t row) const;
  void age();

  std::vector<int64_t> rows_;  // by slot; -1: free
  std::vector<uint8_t> uses_;
  std::vector<uint32_t> batches_;
  std::vector<uint64_t> sketch_;  // 16 counters of 4 bits a word
  int64_t num_buckets_ = 0, ways_ = kWays, num_rows_ = 0, uses_until_aging_ = 0;
  uint32_t batch_ = 0;
  uint32_t hand_ = 0;
};

}  // namespace engram_kernels
