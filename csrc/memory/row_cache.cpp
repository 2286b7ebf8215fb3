#include "memory/row_cache.h"

#include <algorithm>
#include <bit>

#include "common/error.h"
#include "common/math.h"

namespace engram_kernels {
namespace {

constexpr int kMaxUses = 3;
constexpr int kSketchRows = 4;                  // counters that a row has; its estimate is the smallest
constexpr int64_t kUsesPerSlotUntilAging = 10;  // as TinyLFU: a sample of ten times the capacity
constexpr uint64_t kHalf = 0x7777777777777777;

// splitmix64
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

RowCacheDirectory::RowCacheDirectory(int64_t max_slots) {
  EK_CHECK(max_slots >= 0 && max_slots < int64_t{1} << 40,
           "RowCacheDirectory: max_slots is " << max_slots << ", expected [0, 2^40)");
  ways_ = std::min<int64_t>(kWays, max_slots);
  num_buckets_ = ways_ == 0 ? 0 : max_slots / ways_;
  const auto slots = static_cast<size_t>(num_buckets_ * ways_);
  rows_.assign(slots, -1);
  uses_.assign(slots, 0);
  batches_.assign(slots, 0);
  // two to four counters a slot at 4 bits: 1 to 2 bytes
  sketch_.assign(slots == 0 ? 0 : std::bit_ceil(std::max<size_t>(slots / 4, 8)), 0);
  uses_until_aging_ = kUsesPerSlotUntilAging * static_cast<int64_t>(slots);
}

int64_t RowCacheDirectory::bucket_of(int64_t row) const {
  return static_cast<int64_t>(mul_high(mix(static_cast<uint64_t>(row)), static_cast<uint64_t>(num_buckets_)));
}

int64_t RowCacheDirectory::find(int64_t row) {
  if (num_buckets_ == 0) return -1;
  count_use(row);
  const int64_t begin = bucket_of(row) * ways_;
  for (int64_t slot = begin; slot < begin + ways_; ++slot) {
    const auto s = static_cast<size_t>(slot);
    if (rows_[s] != row) continue;
    uses_[s] = static_cast<uint8_t>(std::min(uses_[s] + 1, kMaxUses));
    batches_[s] = batch_;
    return slot;
  }
  return -1;
}

int64_t RowCacheDirectory::admit(int64_t row, int64_t* evicted) {
  *evicted = -1;
  if (num_buckets_ == 0) return -1;
  const int64_t begin = bucket_of(row) * ways_;
  for (int64_t slot = begin; slot < begin + ways_; ++slot) {
    if (rows_[static_cast<size_t>(slot)] == row) return -1;
  }
  int64_t victim = -1;
  const uint32_t first = hand_++;  // ties go round
  for (int64_t way = 0; way < ways_; ++way) {
    const int64_t slot = begin + (first + way) % ways_;
    const auto s = static_cast<size_t>(slot);
    if (rows_[s] < 0) {
      victim = slot;
      break;
    }
    if (batch_ != 0 && batches_[s] == batch_) continue;
    if (victim < 0 || uses_[s] < uses_[static_cast<size_t>(victim)]) victim = slot;
  }
  if (victim < 0) return -1;
  const auto v = static_cast<size_t>(victim);
  if (rows_[v] >= 0) {
    for (int64_t slot = begin; slot < begin + ways_; ++slot) {  // the hand passes: every use is worth less
      uint8_t& uses = uses_[static_cast<size_t>(slot)];
      uses = static_cast<uint8_t>(uses - (uses > 0));
    }
    if (estimate(row) < estimate(rows_[v])) return -1;
    *evicted = rows_[v];
  } else {
    ++num_rows_;
  }
  rows_[v] = row;
  uses_[v] = 0;
  batches_[v] = batch_;
  return victim;
}

void RowCacheDirectory::forget(int64_t row) {
  if (num_buckets_ == 0) return;
  const int64_t begin = bucket_of(row) * ways_;
  for (int64_t slot = begin; slot < begin + ways_; ++slot) {
    if (rows_[static_cast<size_t>(slot)] != row) continue;
    rows_[static_cast<size_t>(slot)] = -1;
    uses_[static_cast<size_t>(slot)] = 0;
    --num_rows_;
    return;
  }
}

void RowCacheDirectory::clear() {
  std::fill(rows_.begin(), rows_.end(), -1);
  std::fill(uses_.begin(), uses_.end(), uint8_t{0});
  num_rows_ = 0;
}

void RowCacheDirectory::count_use(int64_t row) {
  uint64_t hash = mix(~static_cast<uint64_t>(row));
  for (int i = 0; i < kSketchRows; ++i, hash = mix(hash)) {
    uint64_t& word = sketch_[(hash >> 8) & (sketch_.size() - 1)];
    const int shift = static_cast<int>(hash & 15) * 4;
    if (((word >> shift) & 15) < 15) word += uint64_t{1} << shift;
  }
  if (--uses_until_aging_ <= 0) age();
}

int RowCacheDirectory::estimate(int64_t row) const {
  uint64_t hash = mix(~static_cast<uint64_t>(row));
  int least = 15;
  for (int i = 0; i < kSketchRows; ++i, hash = mix(hash)) {
    const uint64_t word = sketch_[(hash >> 8) & (sketch_.size() - 1)];
    least = std::min(least, static_cast<int>((word >> (static_cast<int>(hash & 15) * 4)) & 15));
  }
  return least;
}

// Halves every counter: what was hot long ago stops to count.
void RowCacheDirectory::age() {
  for (uint64_t& word : sketch_) word = (word >> 1) & kHalf;
  uses_until_aging_ = kUsesPerSlotUntilAging * num_slots() / 2;
}

}  // namespace engram_kernels
