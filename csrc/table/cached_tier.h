// A row cache in memory in front of another tier.
//
// Ownership   shares the tier behind it; the cache is its own, at most `cache_bytes` with its directory.
// Threads     as the tier behind it. After a fork the child starts with a cache of its own.
// Failure     that of the tier behind it; nothing of a request that failed is cached. Rows that were cached are checked as far
//             as that tier can (`check_unchanged`).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "table/row_tier.h"

namespace engram_kernels {

class CachedTier : public RowTier {
 public:
  CachedTier(std::shared_ptr<RowTier> behind, int64_t cache_bytes);  // fewer bytes than a row takes: caches nothing
  ~CachedTier() override;

  void check_unchanged(const int64_t* ids, int64_t count) const override { behind_->check_unchanged(ids, count); }
  int64_t cache_slots() const override { return cache_slots_; }
  int64_t cached_rows() const override;

 protected:
  void read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) override;

 private:
  struct Cache;
  struct RowsMissed;
  Cache& cache() const;
  void copy_cached(const TierRequest& request, RowsMissed* missed) const;
  void keep(const RowsMissed& missed, const TierRequest& request) const;

  std::shared_ptr<RowTier> behind_;
  int64_t cache_slots_ = 0;
  mutable std::atomic<Cache*> cache_{nullptr};
};

}  // namespace engram_kernels
