// The directory of a bounded row cache: which row lies in which slot, and which row makes room for another.
//
// Scope       ids and slots; it holds no rows and copies nothing. Used for the RAM cache of the file tier and for hot rows
//             on a device.
// Policy      set-associative S3-FIFO: a row may lie in the kWays slots of its bucket. A new row is on trial in half of them,
//             first in, first out; a hit there makes it resident, and a resident row goes when its turn comes and it had no hit
//             since (CLOCK, 0..3). A sketch of small counters remembers rows that left: one that comes back is resident at once.
//             So rows that are asked for once pass through half of the cache and do not wash out the others.
// Threads     none of its own, and no lock: the caller has one.
// Cost        kBytesPerSlot bytes per slot; find and admit look at one bucket.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "common/huge_pages.h"

namespace engram_kernels {

// An allocator for tables that are looked at here and there: transparent huge pages from their size on, where the kernel gives
// them, since with small ones most looks miss the TLB as well.
template <class T>
struct HugeAllocator {
  using value_type = T;

  HugeAllocator() = default;
  template <class U>
  HugeAllocator(const HugeAllocator<U>&) {}

  T* allocate(size_t count) {
    constexpr size_t page = static_cast<size_t>(kHugePageBytes);
    const size_t bytes = count * sizeof(T), align = bytes >= page ? page : alignof(std::max_align_t);
    const size_t aligned = align > alignof(T) ? align : alignof(T);
    void* memory = std::aligned_alloc(aligned, (bytes + aligned - 1) / aligned * aligned);
    if (memory == nullptr) throw std::bad_alloc();
    ask_for_huge_pages(memory, static_cast<int64_t>(bytes));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }

  friend bool operator==(const HugeAllocator&, const HugeAllocator&) { return true; }
};

class RowCacheDirectory {
 public:
  static constexpr int kWays = 16;
  static constexpr int64_t kBytesPerSlot = 16 + 1 + 8;  // row id, turn and batch; uses; its share of the sketch

  // At most `max_slots` slots: whole buckets where there is more than one. 0: caches nothing.
  explicit RowCacheDirectory(int64_t max_slots);

  int64_t num_slots() const { return num_buckets_ * ways_; }
  int64_t num_rows() const { return num_rows_; }

  // The slot of `row`, or -1. Counts the use either way: call it once per request of the row.
  int64_t find(int64_t row);

  // A slot for `row`; -1: it is there already, or the batch keeps its whole bucket. `*evicted` is the row that lay in the slot,
  // or -1. The caller fills the slot, or calls `forget` where that fails. A row keeps its slot until an `admit` evicts it.
  int64_t admit(int64_t row, int64_t* evicted);

  // From here on slots that are found or admitted are kept until the next call: what one batch uses, it does not evict.
  // Without any call nothing is kept.
  void begin_batch() { batch_ += batch_ == UINT32_MAX ? 2 : 1; }  // 0: no call yet

  int64_t row_in(int64_t slot) const { return of(slot).rows[slot % kWays]; }  // -1: none

  // Requests the memory that `find` and `admit` of the row look at: some rows ahead of them it is there in time. The first slot
  // of its bucket; -1: there are none.
  int64_t prefetch(int64_t row) const;

  void forget(int64_t row);  // nothing where it is not cached
  void clear();              // rows, not what is known of their use

 private:
  struct Age {
    uint32_t turn = 0;  // when it came, or passed its turn
    uint32_t batch = 0;
  };
  struct alignas(64) Bucket {
    int64_t rows[kWays];  // -1: free
    Age ages[kWays];
  };

  Bucket& of(int64_t slot) { return buckets_[static_cast<size_t>(slot / kWays)]; }
  const Bucket& of(int64_t slot) const { return buckets_[static_cast<size_t>(slot / kWays)]; }
  int64_t bucket_of(int64_t row) const;
  int64_t slot_of(int64_t row) const;
  int64_t make_room(int64_t begin);
  bool older(int64_t slot, int64_t than) const;
  template <class Visit>
  void for_each_counter(int64_t row, const Visit& visit) const;
  void count_use(int64_t row);
  int estimate(int64_t row) const;
  void age();

  std::vector<Bucket, HugeAllocator<Bucket>> buckets_;
  std::vector<uint8_t, HugeAllocator<uint8_t>> uses_;      // by slot: hits that count, and kResident
  std::vector<uint64_t, HugeAllocator<uint64_t>> sketch_;  // 16 counters of 4 bits per word, a word per slot
  int64_t num_buckets_ = 0, ways_ = 0, trial_ways_ = 0, num_rows_ = 0, uses_until_aging_ = 0;
  uint32_t batch_ = 0;
  uint32_t turn_ = 0;
};

}  // namespace engram_kernels
