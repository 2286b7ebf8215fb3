#include "table/file_tier.h"

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

FetchCounters& FetchCounters::operator+=(const FetchCounters& other) {
  rows += other.rows;
  cache_hits += other.cache_hits;
  file_rows += other.file_rows;
  payload_bytes += other.payload_bytes;
  moved_bytes += other.moved_bytes;
  reads += other.reads;
  return *this;
}

// Rows in memory: values, then scales, slot by slot.
struct FileTier::Cache {
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
struct FileTier::RowsMissed {
  std::vector<int64_t> ids, positions;
};

FileTier::FileTier(std::shared_ptr<FileReader> reader, const FileRows& rows, const FileRows& scales, int64_t cache_bytes,
                   DType stored_scales)
    : reader_(std::move(reader)), rows_(rows), scales_(scales), stored_scales_(stored_scales) {
  EK_CHECK(cache_bytes >= 0, "FileTier: cache_bytes is " << cache_bytes << ", expected at least 0");
  reader_->check(rows_);
  reader_->check(scales_);
  EK_CHECK(scales.row_bytes == 0 || scales.num_rows == rows.num_rows,
           "FileTier: there are scales for " << scales.num_rows << " rows, expected " << rows.num_rows);
  EK_CHECK(scales.row_bytes % dtype_bytes(stored_scales) == 0 || stored_scales == DType::kF32,
           "FileTier: scales of " << scales.row_bytes << " bytes per row are no floats of two bytes");
  const int64_t slot_bytes = rows.row_bytes + scales.row_bytes;
  // a cache of more slots than rows would only waste memory
  cache_slots_ = std::min(cache_bytes / (slot_bytes + RowCacheDirectory::kBytesPerSlot), (rows.num_rows + 1) * 2);
  if (cache_slots_ > 0) cache_slots_ = cache().directory.num_slots();
}

FileTier::~FileTier() {
  Cache* cache = cache_.load();
  if (cache != nullptr && cache->process == getpid()) delete cache;
}

FileTier::Cache& FileTier::cache() const {
  Cache* cache = cache_.load(std::memory_order_acquire);
  if (cache != nullptr && cache->process == getpid()) return *cache;
  auto* fresh = new Cache(cache_slots_, rows_.row_bytes + scales_.row_bytes);
  if (cache_.compare_exchange_strong(cache, fresh)) return *fresh;
  delete fresh;
  return *cache;
}

int64_t FileTier::cached_rows() const {
  if (cache_slots_ == 0) return 0;
  Cache& cache = this->cache();
  const std::lock_guard lock(cache.mutex);
  return cache.directory.num_rows();
}

FetchCounters FileTier::totals() const { return {totals_[0], totals_[1], totals_[2], totals_[3], totals_[4], totals_[5]}; }

void FileTier::fetch(const int64_t* distinct_ids, int64_t count, std::byte* rows_out, std::byte* scales_out,
                     FetchCounters* counters, const std::atomic<bool>* cancelled) {
  for (int64_t i = 0; i < count; ++i) {
    EK_CHECK_INDEX(distinct_ids[i] >= 0 && distinct_ids[i] < rows_.num_rows,
                   "FileTier: row_ids[" << i << "] is " << distinct_ids[i] << ", expected [0, " << rows_.num_rows << ")");
  }
  FetchCounters counted;
  ReadCounters reads;
  const RowsWanted wanted[2] = {{&rows_, rows_out}, {&scales_, scales_out}};
  const int num_wanted = scales_.row_bytes > 0 ? 2 : 1;
  if (cache_slots_ == 0) {
    reader_->read(wanted, num_wanted, {distinct_ids, count}, &reads, cancelled);
  } else if (count > 0) {
    RowsMissed missed;
    copy_cached(distinct_ids, count, rows_out, scales_out, &missed);
    const auto num_missed = static_cast<int64_t>(missed.ids.size());
    counted.cache_hits = count - num_missed;
    if (num_missed > 0) {
      reader_->read(wanted, num_wanted, {missed.ids.data(), num_missed, missed.positions.data()}, &reads, cancelled);
    }
    // those that were cached may be of other files than those that were read
    if (num_missed < count && (num_missed == 0 || reader_->num_files() > 1)) check_unchanged(distinct_ids, count);
    keep(missed, rows_out, scales_out);
  }
  widen(scales_out, count);
  counted.rows = count;
  counted.file_rows = count - counted.cache_hits;
  counted.payload_bytes = count * (rows_.row_bytes + scales_.row_bytes);
  counted.moved_bytes = reads.moved_bytes;
  counted.reads = reads.reads;
  const int64_t add[6] = {counted.rows,          counted.cache_hits,  counted.file_rows,
                          counted.payload_bytes, counted.moved_bytes, counted.reads};
  for (int i = 0; i < 6; ++i) totals_[i].fetch_add(add[i], std::memory_order_relaxed);
  if (counters != nullptr) *counters += counted;
}

// From what the file has, one behind the other, to fp32 in the same place: from the last on, which nothing behind it needs.
void FileTier::widen(std::byte* scales, int64_t count) const {
  if (stored_scales_ == DType::kF32) return;
  for (int64_t i = count * (scales_.row_bytes / 2) - 1; i >= 0; --i) {
    uint16_t bits;
    std::memcpy(&bits, scales + i * 2, sizeof(bits));
    const float value = stored_scales_ == DType::kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
    std::memcpy(scales + i * 4, &value, sizeof(value));
  }
}

void FileTier::check_unchanged(const int64_t* ids, int64_t count) const {
  const RowsWanted wanted[2] = {{&rows_, nullptr}, {&scales_, nullptr}};
  reader_->check_unchanged(wanted, 2, ids, count);
}

void FileTier::copy_cached(const int64_t* ids, int64_t count, std::byte* rows_out, std::byte* scales_out,
                           RowsMissed* missed) const {
  Cache& cache = this->cache();
  const auto row_bytes = static_cast<size_t>(rows_.row_bytes), scale_bytes = static_cast<size_t>(scales_.row_bytes);
  for (int64_t begin = 0; begin < count; begin += kRowsPerLock) {
    const std::lock_guard lock(cache.mutex);
    for (int64_t i = begin; i < std::min(begin + kRowsPerLock, count); ++i) {
      const int64_t slot = cache.directory.find(ids[i]);
      if (slot < 0) {
        missed->ids.push_back(ids[i]);
        missed->positions.push_back(i);
        continue;
      }
      std::memcpy(rows_out + i * rows_.row_bytes, cache.slot(slot), row_bytes);
      if (scale_bytes > 0) std::memcpy(scales_out + i * scales_.row_bytes, cache.slot(slot) + row_bytes, scale_bytes);
    }
  }
}

void FileTier::keep(const RowsMissed& missed, const std::byte* rows, const std::byte* scales) const {
  Cache& cache = this->cache();
  const auto count = static_cast<int64_t>(missed.ids.size());
  const auto row_bytes = static_cast<size_t>(rows_.row_bytes), scale_bytes = static_cast<size_t>(scales_.row_bytes);
  for (int64_t begin = 0; begin < count; begin += kRowsPerLock) {
    const std::lock_guard lock(cache.mutex);
    for (int64_t i = begin; i < std::min(begin + kRowsPerLock, count); ++i) {
      int64_t evicted = -1;
      const int64_t slot = cache.directory.admit(missed.ids[static_cast<size_t>(i)], &evicted);
      if (slot < 0) continue;
      const int64_t from = missed.positions[static_cast<size_t>(i)];
      std::memcpy(cache.slot(slot), rows + from * rows_.row_bytes, row_bytes);
      if (scale_bytes > 0) std::memcpy(cache.slot(slot) + row_bytes, scales + from * scales_.row_bytes, scale_bytes);
    }
  }
}

}  // namespace engram_kernels
