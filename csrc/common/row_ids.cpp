#include "common/row_ids.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <utility>
#include <vector>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int64_t kCheckBlock = 4096;
constexpr int64_t kRangeIds = 16384, kMaxRanges = 64;  // of a batch that threads share
constexpr int64_t kBucketIds = 2048;                   // on average, sorted in L1 or L2
constexpr int kMaxBucketBits = 10, kDigitBits = 11;

// The position of the first of `count` ids, `stride` apart, that is out of range; -1: there is none.
// No branch per id, so that dense ids go at memory speed: id + 1 is negative below -1, num_rows - 1 - id above the end.
template <class Id>
int64_t first_bad(const Id* ids, int64_t count, int64_t stride, int64_t num_rows) {
  const uint64_t last = static_cast<uint64_t>(num_rows) - 1;
  for (int64_t begin = 0; begin < count; begin += kCheckBlock) {
    const int64_t end = std::min(count, begin + kCheckBlock);
    uint64_t signs = 0;
    const auto look = [&](int64_t step) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[i * step]));
        signs |= (id + 1) | (last - id);
      }
    };
    stride == 1 ? look(1) : look(stride);
    if (signs >> 63 == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (ids[i * stride] < kNoRow || ids[i * stride] >= num_rows) return i;
    }
  }
  return -1;
}

int64_t first_bad(const RowIds& ids, int64_t begin, int64_t count, int64_t stride, int64_t num_rows) {
  return ids.are_int64 ? first_bad(static_cast<const int64_t*>(ids.data) + begin, count, stride, num_rows)
                       : first_bad(static_cast<const int32_t*>(ids.data) + begin, count, stride, num_rows);
}

[[noreturn]] void throw_bad(const char* op, const Text& where, int64_t id, int64_t num_rows) {
  EK_THROW_AS(std::out_of_range,
              op << ": row_ids[" << where.str() << "] is " << id << ", expected [0, " << num_rows << ") or -1 (no row)");
}

// Sorts entries by `bits` bits from `shift` on, the lowest digit first: stable, so positions stay in order.
class BucketSort {
 public:
  BucketSort(int shift, int bits)
      : shift_(shift),
        passes_(static_cast<int>(ceil_div(bits, kDigitBits))),
        digit_bits_(static_cast<int>(ceil_div(bits, std::max(passes_, 1)))) {}

  bool ends_in_other() const { return passes_ % 2 == 1; }

  void operator()(uint64_t* entries, uint64_t* other, int64_t count) const {
    for (int pass = 0; pass < passes_; ++pass) {
      const int shift = shift_ + pass * digit_bits_;
      uint32_t starts[1 << kDigitBits];
      std::fill_n(starts, 1 << digit_bits_, 0U);
      const auto digit = [&](uint64_t entry) { return (entry >> shift) & ((uint64_t{1} << digit_bits_) - 1); };
      for (int64_t i = 0; i < count; ++i) ++starts[digit(entries[i])];
      uint32_t sum = 0;
      for (int d = 0; d < 1 << digit_bits_; ++d) sum += std::exchange(starts[d], sum);
      for (int64_t i = 0; i < count; ++i) other[starts[digit(entries[i])]++] = entries[i];
      std::swap(entries, other);
    }
  }

 private:
  const int shift_, passes_, digit_bits_;
};

}  // namespace

void check_row_ids(const char* op, const RowIds& ids, int64_t num_rows, const int64_t* sizes, int dims) {
  const int64_t bad = first_bad(ids, 0, ids.count, 1, num_rows);
  if (bad < 0) return;
  Text where;
  int64_t inner = ids.count;
  for (int d = 0; d < dims; ++d) {
    inner /= sizes[d];
    where << (d > 0 ? ", " : "") << bad / inner % sizes[d];
  }
  throw_bad(op, where, ids[bad], num_rows);
}

void check_row_ids(const char* op, const TokenRowIds& ids, int64_t num_rows) {
  const RowIds all{ids.data, 0, ids.are_int64};
  for (int64_t t = 0; t < ids.num_tokens; ++t) {
    if (ids.mask != nullptr && ids.mask[t] != 0) continue;
    const int64_t bad = first_bad(all, t * ids.token_stride, ids.columns, ids.column_stride, num_rows);
    if (bad < 0) continue;
    Text where;
    where << t << ", " << bad;
    throw_bad(op, where, all[t * ids.token_stride + bad * ids.column_stride], num_rows);
  }
}

RowOrder::RowOrder(const RowIds& ids, int64_t num_rows, const Parallel& parallel, RowOrderMemory* memory)
    : position_bits_(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(ids.count, 1) - 1))) {
  const int row_bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_rows, 1) - 1));
  EK_CHECK(row_bits + position_bits_ <= 64, "row ids: " << ids.count << " ids into " << num_rows << " rows are too many");
  // 1. ranges of positions are dealt out to buckets by the highest bits of the row; 2. each bucket is sorted on its own
  const int64_t ranges = std::clamp<int64_t>(ids.count / kRangeIds, 1, kMaxRanges);
  const int filled_bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(ids.count / kBucketIds)));
  const int bucket_bits = std::min({row_bits, kMaxBucketBits, filled_bits});
  const int64_t buckets = int64_t{1} << bucket_bits;
  const int shift = row_bits - bucket_bits;
  const Parallel threads = ranges > 2 ? parallel : Parallel{};  // less than it takes to wake them
  std::vector<int64_t> starts(static_cast<size_t>(ranges * buckets)), bounds(static_cast<size_t>(buckets) + 1);
  const auto for_ids = [&](const auto& body) {  // body(id, position, counters of the range)
    threads.for_range(ranges, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) {
        int64_t* of_range = starts.data() + range * buckets;
        const int64_t end = ids.count * (range + 1) / ranges;
        for (int64_t i = ids.count * range / ranges; i < end; ++i) {
          const int64_t id = ids[i];
          if (id != kNoRow) body(static_cast<uint64_t>(id), static_cast<uint64_t>(i), of_range);
        }
      }
    });
  };
  for_ids([&](uint64_t id, uint64_t, int64_t* counts) { ++counts[id >> shift]; });
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    bounds[static_cast<size_t>(bucket)] = count_;
    for (int64_t range = 0; range < ranges; ++range) {
      const int64_t count = std::exchange(starts[static_cast<size_t>(range * buckets + bucket)], count_);
      count_ += count;
    }
  }
  bounds.back() = count_;
  RowOrderMemory& arrays = memory == nullptr ? own_ : *memory;
  uint64_t* entries = arrays.take(0, count_);
  uint64_t* other = arrays.take(1, count_);
  for_ids([&](uint64_t id, uint64_t position, int64_t* next) { entries[next[id >> shift]++] = id << position_bits_ | position; });
  const BucketSort sort(position_bits_, shift);
  threads.for_range(buckets, 1, [&](int64_t first, int64_t last) {
    for (int64_t bucket = first; bucket < last; ++bucket) {
      const int64_t begin = bounds[static_cast<size_t>(bucket)];
      sort(entries + begin, other + begin, bounds[static_cast<size_t>(bucket) + 1] - begin);
    }
  });
  entries_ = sort.ends_in_other() ? other : entries;
  own_.drop(sort.ends_in_other() ? 0 : 1);
}

int64_t RowOrder::first_at_or_after(int64_t row) const {
  int64_t begin = 0, end = count_;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (this->row(middle) < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace engram_kernels
