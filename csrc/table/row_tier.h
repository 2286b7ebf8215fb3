// Where the rows of one table come from when gathers cannot read them in place: a file, a cache in front of another tier, a
// process on another machine.
//
// Scope       raw rows by id; no formats, no duplicates (the caller has made ids distinct).
// Threads     `fetch` may be called from several threads at once.
// Failure     thrown by `fetch`: names the tier, where it looked and a row. The outputs are then unspecified.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace engram_kernels {

struct FetchCounters {
  int64_t rows = 0;           // asked for
  int64_t cache_hits = 0;     // rows that came from a cache in front of the tier
  int64_t tier_rows = 0;      // rows that came from the tier itself
  int64_t payload_bytes = 0;  // bytes of all rows asked for as they are stored, scales included
  int64_t moved_bytes = 0;    // bytes read from the tier
  int64_t reads = 0;          // reads submitted to it

  FetchCounters& operator+=(const FetchCounters& other);
};

struct TierShape {
  int64_t num_rows = 0;
  int64_t row_bytes = 0;
  int64_t scale_bytes = 0;    // of a row, as they are handed out; 0: the table has no scales per row
  int64_t payload_bytes = 0;  // of a row with its scales, as they are stored
};

// Row ids[i] goes to row positions[i] of the outputs; positions null: to row i.
struct TierRequest {
  const int64_t* ids;  // distinct, in [0, num_rows); any order, ascending is fastest
  int64_t count;
  std::byte* rows;                     // row_bytes each
  std::byte* scales;                   // scale_bytes each
  const int64_t* positions = nullptr;  // ascending

  int64_t position(int64_t i) const { return positions == nullptr ? i : positions[i]; }
};

class RowTier {
 public:
  explicit RowTier(const TierShape& shape) : shape_(shape) {}
  virtual ~RowTier() = default;
  RowTier(const RowTier&) = delete;
  RowTier& operator=(const RowTier&) = delete;

  // Fills the outputs of the request. Blocks. `*counters` is added to (may be null; unchanged on failure). `*cancelled` (may be
  // null) is looked at while the tier is waited for; once it is true the call ends with FetchCancelled.
  void fetch(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled);

  // Throws where a row is not what it was when the tier was made, as far as the tier can know.
  virtual void check_unchanged(const int64_t* ids, int64_t count) const = 0;

  // How many rows a tier that caches rows in memory can hold, and holds.
  virtual int64_t cache_slots() const { return 0; }
  virtual int64_t cached_rows() const { return 0; }

  const TierShape& shape() const { return shape_; }
  int64_t num_rows() const { return shape_.num_rows; }
  int64_t row_bytes() const { return shape_.row_bytes; }
  int64_t scale_bytes() const { return shape_.scale_bytes; }
  FetchCounters totals() const;  // of all fetches that succeeded

 protected:
  // Fills the outputs and sets cache_hits, moved_bytes and reads of `*counters`, which are zero.
  virtual void read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) = 0;

 private:
  const TierShape shape_;
  std::atomic<int64_t> totals_[6] = {};
};

}  // namespace engram_kernels
