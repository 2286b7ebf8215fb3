#include "table/row_tier.h"

#include "common/error.h"

namespace engram_kernels {

FetchCounters& FetchCounters::operator+=(const FetchCounters& other) {
  rows += other.rows;
  cache_hits += other.cache_hits;
  tier_rows += other.tier_rows;
  payload_bytes += other.payload_bytes;
  moved_bytes += other.moved_bytes;
  reads += other.reads;
  return *this;
}

void RowTier::fetch(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) {
  for (int64_t i = 0; i < request.count; ++i) {
    EK_CHECK_INDEX(request.ids[i] >= 0 && request.ids[i] < shape_.num_rows,
                   "RowTier: row_ids[" << i << "] is " << request.ids[i] << ", expected [0, " << shape_.num_rows << ")");
  }
  FetchCounters counted;
  read(request, &counted, cancelled);
  counted.rows = request.count;
  counted.tier_rows = request.count - counted.cache_hits;
  counted.payload_bytes = request.count * shape_.payload_bytes;
  const int64_t add[6] = {counted.rows,          counted.cache_hits,  counted.tier_rows,
                          counted.payload_bytes, counted.moved_bytes, counted.reads};
  for (int i = 0; i < 6; ++i) totals_[i].fetch_add(add[i], std::memory_order_relaxed);
  if (counters != nullptr) *counters += counted;
}

FetchCounters RowTier::totals() const { return {totals_[0], totals_[1], totals_[2], totals_[3], totals_[4], totals_[5]}; }

}  // namespace engram_kernels
