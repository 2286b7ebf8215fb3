#include "prefetch/device_row_cache.h"

#include <algorithm>
#include <utility>

#include "common/error.h"
#include "common/math.h"

namespace engram_kernels {
namespace {

constexpr int64_t kMaxRows = INT32_MAX;  // of the arrays: a gather's ids are int32
constexpr int64_t kPrefetchRows = 16;    // looked for ahead: each is some accesses to memory

int64_t slots_of(const DeviceRowCacheOptions& o) {
  const int64_t row_bytes = o.row_bytes + o.scale_bytes;
  EK_CHECK(o.cache_bytes >= row_bytes,
           "RowPrefetcher: cache_bytes is " << o.cache_bytes << ", expected at least a row, " << row_bytes << " bytes");
  const int64_t of_table = ceil_div(o.num_table_rows, RowCacheDirectory::kWays) * RowCacheDirectory::kWays;
  return std::min({o.cache_bytes / row_bytes, of_table, kMaxRows - o.num_staging_slots * o.staging_rows});
}

}  // namespace

DeviceRowCache::DeviceRowCache(const DeviceRowCacheOptions& options, std::shared_ptr<CopyEngine> engine)
    : options_(options),
      engine_(std::move(engine)),
      directory_(slots_of(options)),
      written_by_(static_cast<size_t>(directory_.num_slots())),
      first_slot_(options.num_staging_slots * options.staging_rows),
      num_rows_(first_slot_ + directory_.num_slots()),
      memory_(engine_->allocate_device(num_rows_ * (options.row_bytes + options.scale_bytes))) {}

DeviceRowCache::~DeviceRowCache() { engine_->free_device(memory_); }

void DeviceRowCache::settle(int staging_slot) {
  size_t needed = 0;  // blocks at the front whose end must be known
  for (size_t i = 0; i < in_flight_.size(); ++i) {
    if (in_flight_[i].staging_slot == staging_slot) needed = i + 1;
  }
  for (; !in_flight_.empty(); needed -= needed > 0) {
    const Block& block = in_flight_.front();
    try {
      if (!engine_->wait_host(block.event, needed > 0 ? -1 : 0)) return;
    } catch (...) {  // its ticket says so
      forget(block);
    }
    in_flight_.pop_front();
  }
}

int64_t DeviceRowCache::find(int64_t* rows, int64_t count, int staging_slot, int32_t* indices) {
  if (clear_.exchange(false)) directory_.clear();
  directory_.begin_batch();
  ++block_;
  int64_t staged = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) prefetch(rows[i + kPrefetchRows]);
    int64_t index = find_one(rows[i]);
    if (index < 0) {
      index = first_row(staging_slot) + staged;
      rows[staged++] = rows[i];
    }
    indices[i] = static_cast<int32_t>(index);
  }
  return staged;
}

void DeviceRowCache::prefetch(int64_t row) const {
  const int64_t slot = directory_.prefetch(row);
  if (slot >= 0) __builtin_prefetch(&written_by_[static_cast<size_t>(slot)]);
}

// -1: it is not cached, or it is not known yet whether it was written.
int64_t DeviceRowCache::find_one(int64_t row) {
  const int64_t slot = directory_.find(row);
  if (slot < 0) return -1;
  const uint32_t by = written_by_[static_cast<size_t>(slot)];
  for (const Block& block : in_flight_) {
    if (block.number == by) return -1;
  }
  return first_slot_ + slot;
}

int64_t DeviceRowCache::admit(const int64_t* rows, int64_t count, int staging_slot, RowPlace* places) {
  in_flight_.push_back({block_, staging_slot, places, 0, nullptr});
  int64_t& admitted = in_flight_.back().count;
  for (int64_t i = 0, evicted = -1; i < count; ++i) {
    if (i + kPrefetchRows < count) prefetch(rows[i + kPrefetchRows]);
    const int64_t slot = directory_.admit(rows[i], &evicted);
    if (slot < 0) continue;
    written_by_[static_cast<size_t>(slot)] = block_;
    places[admitted++] = {static_cast<int32_t>(first_row(staging_slot) + i), static_cast<int32_t>(first_slot_ + slot)};
  }
  return admitted;
}

void DeviceRowCache::launched(Event event) {
  if (in_flight_.back().count > 0) {
    in_flight_.back().event = std::move(event);
  } else {
    in_flight_.pop_back();
  }
}

void DeviceRowCache::abandon() {
  if (in_flight_.empty() || in_flight_.back().event != nullptr) return;
  forget(in_flight_.back());
  in_flight_.pop_back();
}

// What lies in the slots of a block: its rows or, which costs no more than a hit, those of a block that has taken a slot since.
void DeviceRowCache::forget(const Block& block) {
  for (int64_t i = 0; i < block.count; ++i) directory_.forget(directory_.row_in(block.places[i].to - first_slot_));
}

}  // namespace engram_kernels
