#include "table/cached_tier.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "common/error.h"
#include "table/row_cache.h"

namespace engram_kernels {
namespace {

constexpr int64_t kRowsPerLock = 256;  // copied while the lock is held: about 20 us

}  // namespace

// Rows in memory: values, then scales, slot by slot.
struct CachedTier::Cache {
  Cache(int64_t slots, int64_t slot_bytes)
      : directory(slots), slot_bytes(slot_bytes), bytes(new std::byte[static_cast<size_t>(directory.num_slots() * slot_bytes)]) {}

  std::byte* slot(int64_t slot) const { return bytes.get() + slot * slot_bytes; }

  const pid_t process = getpid();  // a child after a fork starts with a cache of its own: this one may be half written there
  std::mutex mutex;
  RowCacheDirectory directory;
  int64_t slot_bytes;
  std::unique_ptr<std::byte[]> bytes;
};

// Rows that the cache does not hold, and where they go.
struct CachedTier::RowsMissed {
  std::vector<int64_t> ids, positions;
};

CachedTier::CachedTier(std::shared_ptr<RowTier> behind, int64_t cache_bytes)
    : RowTier(behind->shape()), behind_(std::move(behind)) {
  EK_CHECK(cache_bytes >= 0, "CachedTier: cache_bytes is " << cache_bytes << ", expected at least 0");
  const int64_t slot_bytes = row_bytes() + scale_bytes();
  // a cache of more slots than rows would only waste memory
  cache_slots_ = std::min(cache_bytes / (slot_bytes + RowCacheDirectory::kBytesPerSlot), (num_rows() + 1) * 2);
  if (cache_slots_ > 0) cache_slots_ = cache().directory.num_slots();
}

CachedTier::~CachedTier() {
  Cache* cache = cache_.load();
  if (cache != nullptr && cache->process == getpid()) delete cache;
}

CachedTier::Cache& CachedTier::cache() const {
  Cache* cache = cache_.load(std::memory_order_acquire);
  if (cache != nullptr && cache->process == getpid()) return *cache;
  auto* fresh = new Cache(cache_slots_, row_bytes() + scale_bytes());
  if (cache_.compare_exchange_strong(cache, fresh)) return *fresh;
  delete fresh;
  return *cache;
}

int64_t CachedTier::cached_rows() const {
  if (cache_slots_ == 0) return 0;
  Cache& cache = this->cache();
  const std::lock_guard lock(cache.mutex);
  return cache.directory.num_rows();
}

void CachedTier::read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) {
  FetchCounters fetched;
  if (cache_slots_ == 0) {
    behind_->fetch(request, &fetched, cancelled);
  } else if (request.count > 0) {
    RowsMissed missed;
    copy_cached(request, &missed);
    const auto num_missed = static_cast<int64_t>(missed.ids.size());
    if (num_missed > 0) {
      behind_->fetch({missed.ids.data(), num_missed, request.rows, request.scales, missed.positions.data()}, &fetched, cancelled);
    }
    // those that were cached may lie elsewhere than those that were read
    if (num_missed < request.count) check_unchanged(request.ids, request.count);
    keep(missed, request);
    counters->cache_hits = request.count - num_missed;
  }
  counters->moved_bytes = fetched.moved_bytes;
  counters->reads = fetched.reads;
}

void CachedTier::copy_cached(const TierRequest& request, RowsMissed* missed) const {
  Cache& cache = this->cache();
  const auto row_size = static_cast<size_t>(row_bytes()), scale_size = static_cast<size_t>(scale_bytes());
  for (int64_t begin = 0; begin < request.count; begin += kRowsPerLock) {
    const std::lock_guard lock(cache.mutex);
    for (int64_t i = begin; i < std::min(begin + kRowsPerLock, request.count); ++i) {
      const int64_t slot = cache.directory.find(request.ids[i]), to = request.position(i);
      if (slot < 0) {
        missed->ids.push_back(request.ids[i]);
        missed->positions.push_back(to);
        continue;
      }
      std::memcpy(request.rows + to * row_bytes(), cache.slot(slot), row_size);
      if (scale_size > 0) std::memcpy(request.scales + to * scale_bytes(), cache.slot(slot) + row_size, scale_size);
    }
  }
}

void CachedTier::keep(const RowsMissed& missed, const TierRequest& request) const {
  Cache& cache = this->cache();
  const auto count = static_cast<int64_t>(missed.ids.size());
  const auto row_size = static_cast<size_t>(row_bytes()), scale_size = static_cast<size_t>(scale_bytes());
  for (int64_t begin = 0; begin < count; begin += kRowsPerLock) {
    const std::lock_guard lock(cache.mutex);
    for (int64_t i = begin; i < std::min(begin + kRowsPerLock, count); ++i) {
      int64_t evicted = -1;
      const int64_t slot = cache.directory.admit(missed.ids[static_cast<size_t>(i)], &evicted);
      if (slot < 0) continue;
      const int64_t from = missed.positions[static_cast<size_t>(i)];
      std::memcpy(cache.slot(slot), request.rows + from * row_bytes(), row_size);
      if (scale_size > 0) std::memcpy(cache.slot(slot) + row_size, request.scales + from * scale_bytes(), scale_size);
    }
  }
}

}  // namespace engram_kernels
