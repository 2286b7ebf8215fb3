#include "table/row_cache.h"

#include <algorithm>

#include "common/error.h"
#include "common/math.h"

namespace engram_kernels {
namespace {

constexpr uint8_t kResident = 4;  // beside the uses, 0..3
constexpr uint8_t kMaxUses = 3;
constexpr int kTrialShare = 2;     // one way in so many is for rows on trial
constexpr int kCountersOfRow = 4;  // its estimate is the smallest of them
constexpr int kMaxCount = 15;
// the sketch remembers about so many uses a slot; both numbers chosen on docs/dedup_and_cache.md's texts
constexpr int64_t kUsesPerSlotUntilAging = 4;
constexpr size_t kCacheLine = 64;
constexpr uint64_t kHalfOfCounters = 0x7777777777777777;

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
  trial_ways_ = std::max<int64_t>(ways_ / kTrialShare, 1);
  num_buckets_ = ways_ == 0 ? 0 : max_slots / ways_;
  const auto slots = static_cast<size_t>(num_slots());
  buckets_.resize(static_cast<size_t>(num_buckets_));
  uses_.assign(slots, 0);
  sketch_.assign(slots, 0);
  uses_until_aging_ = kUsesPerSlotUntilAging * num_slots();
  clear();
}

// The first slot of the row's bucket. Buckets have kWays slots where there is more than one.
int64_t RowCacheDirectory::bucket_of(int64_t row) const {
  return static_cast<int64_t>(mul_high(mix(static_cast<uint64_t>(row)), static_cast<uint64_t>(num_buckets_))) * ways_;
}

int64_t RowCacheDirectory::slot_of(int64_t row) const {
  if (num_buckets_ == 0) return -1;
  const int64_t begin = bucket_of(row);
  const Bucket& bucket = of(begin);
  for (int64_t way = 0; way < ways_; ++way) {
    if (bucket.rows[way] == row) return begin + way;
  }
  return -1;
}

// Calls visit(word, shift) with each counter of the row.
template <class Visit>
void RowCacheDirectory::for_each_counter(int64_t row, const Visit& visit) const {
  uint64_t hash = mix(~static_cast<uint64_t>(row));
  for (int i = 0; i < kCountersOfRow; ++i, hash = mix(hash)) {
    visit(mul_high(hash, sketch_.size()), static_cast<int>(hash & 15) * 4);
  }
}

int64_t RowCacheDirectory::prefetch(int64_t row) const {
  if (num_buckets_ == 0) return -1;
  const int64_t begin = bucket_of(row);
  const auto* bucket = reinterpret_cast<const char*>(&of(begin));
  for (size_t at = 0; at < sizeof(Bucket); at += kCacheLine) __builtin_prefetch(bucket + at);
  __builtin_prefetch(&uses_[static_cast<size_t>(begin)]);
  // written out: gcc 12 takes a function that only prefetches for one without effect, and drops its calls
  uint64_t hash = mix(~static_cast<uint64_t>(row));
  for (int i = 0; i < kCountersOfRow; ++i, hash = mix(hash)) __builtin_prefetch(&sketch_[mul_high(hash, sketch_.size())]);
  return begin;
}

int64_t RowCacheDirectory::find(int64_t row) {
  if (num_buckets_ == 0) return -1;
  count_use(row);
  const int64_t slot = slot_of(row);
  if (slot >= 0) {
    uint8_t& uses = uses_[static_cast<size_t>(slot)];
    uses = static_cast<uint8_t>(uses + ((uses & kMaxUses) < kMaxUses));
    of(slot).ages[slot % kWays].batch = batch_;
  }
  return slot;
}

int64_t RowCacheDirectory::admit(int64_t row, int64_t* evicted) {
  *evicted = -1;
  if (num_buckets_ == 0 || slot_of(row) >= 0) return -1;
  const int64_t slot = make_room(bucket_of(row));
  if (slot < 0) return -1;
  int64_t& place = of(slot).rows[slot % kWays];
  // a row that was here, or was asked for, not long ago needs no trial; where there is room none is needed yet
  const bool returns = place >= 0 && estimate(row) >= 2;
  num_rows_ += place < 0;
  *evicted = place;
  place = row;
  of(slot).ages[slot % kWays] = {++turn_, batch_};
  uses_[static_cast<size_t>(slot)] = returns ? kResident : 0;
  return slot;
}

bool RowCacheDirectory::older(int64_t slot, int64_t than) const {
  if (than < 0) return true;
  // turns wrap around: the difference tells which is older as long as neither is 2^31 turns old
  const Age* ages = of(slot).ages;  // both are of one bucket
  return static_cast<int32_t>(ages[slot % kWays].turn - ages[than % kWays].turn) < 0;
}

// A slot of the bucket that begins at `begin`: a free one, or that of the row to evict; -1: the batch keeps them all.
int64_t RowCacheDirectory::make_room(int64_t begin) {
  Bucket& bucket = of(begin);
  for (;;) {
    int64_t on_trial = 0, trial = -1, resident = -1;  // how many; the oldest of each that may go
    for (int64_t slot = begin; slot < begin + ways_; ++slot) {
      const int64_t way = slot - begin;
      if (bucket.rows[way] < 0) return slot;
      const bool is_resident = (uses_[static_cast<size_t>(slot)] & kResident) != 0;
      on_trial += !is_resident;
      if (batch_ != 0 && bucket.ages[way].batch == batch_) continue;
      int64_t& oldest = is_resident ? resident : trial;
      if (older(slot, oldest)) oldest = slot;
    }
    const bool from_trial = trial >= 0 && (on_trial >= trial_ways_ || resident < 0);
    const int64_t slot = from_trial ? trial : resident;
    if (slot < 0) return -1;
    uint8_t& uses = uses_[static_cast<size_t>(slot)];
    if ((uses & kMaxUses) == 0) return slot;
    uses = static_cast<uint8_t>(from_trial ? kResident : uses - 1);
    bucket.ages[slot - begin].turn = ++turn_;
  }
}

void RowCacheDirectory::forget(int64_t row) {
  const int64_t slot = row < 0 ? -1 : slot_of(row);
  if (slot < 0) return;
  of(slot).rows[slot % kWays] = -1;
  of(slot).ages[slot % kWays] = {};
  uses_[static_cast<size_t>(slot)] = 0;
  --num_rows_;
}

void RowCacheDirectory::clear() {
  for (Bucket& bucket : buckets_) {
    std::fill_n(bucket.rows, kWays, int64_t{-1});
    std::fill_n(bucket.ages, kWays, Age{});
  }
  std::fill(uses_.begin(), uses_.end(), uint8_t{0});
  num_rows_ = 0;
}

// Only the smallest counters of a row grow: the others count rows that they share.
void RowCacheDirectory::count_use(int64_t row) {
  uint64_t words[kCountersOfRow];
  int shifts[kCountersOfRow], least = kMaxCount, i = 0;
  for_each_counter(row, [&](uint64_t word, int shift) {
    words[i] = word;
    shifts[i++] = shift;
    least = std::min(least, static_cast<int>((sketch_[word] >> shift) & kMaxCount));
  });
  for (i = 0; i < kCountersOfRow && least < kMaxCount; ++i) {
    uint64_t& word = sketch_[words[i]];
    if (static_cast<int>((word >> shifts[i]) & kMaxCount) == least) word += uint64_t{1} << shifts[i];
  }
  if (--uses_until_aging_ <= 0) age();
}

int RowCacheDirectory::estimate(int64_t row) const {
  int least = kMaxCount;
  for_each_counter(
      row, [&](uint64_t word, int shift) { least = std::min(least, static_cast<int>((sketch_[word] >> shift) & kMaxCount)); });
  return least;
}

// Halves every counter: what was hot long ago stops to count.
void RowCacheDirectory::age() {
  for (uint64_t& word : sketch_) word = (word >> 1) & kHalfOfCounters;
  uses_until_aging_ = kUsesPerSlotUntilAging * num_slots() / 2 + 1;
}

}  // namespace engram_kernels
