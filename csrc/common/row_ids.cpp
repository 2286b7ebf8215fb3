#include "common/row_ids.h"

#include <algorithm>
#include <bit>
#include <memory>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int64_t kCheckBlock = 4096;
constexpr int kRadixBits = 11;  // 2048 counters: 16 KiB, half of L1

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

RowOrder::RowOrder(const RowIds& ids, int64_t num_rows)
    : position_bits_(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(ids.count, 1) - 1))) {
  const int row_bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_rows, 1) - 1));
  EK_CHECK(row_bits + position_bits_ <= 64, "row ids: " << ids.count << " ids into " << num_rows << " rows are too many");
  auto entries = std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(ids.count));
  for (int64_t i = 0; i < ids.count; ++i) {
    entries[static_cast<size_t>(count_)] = static_cast<uint64_t>(ids[i]) << position_bits_ | static_cast<uint64_t>(i);
    count_ += ids[i] != kNoRow;
  }
  // radix sort from the lowest digit of the row: stable, so positions stay in order
  auto other = std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(count_));
  for (int shift = position_bits_; shift < position_bits_ + row_bits; shift += kRadixBits) {
    int64_t starts[(1 << kRadixBits) + 1] = {};
    const auto digit = [&](uint64_t entry) { return (entry >> shift) & ((1 << kRadixBits) - 1); };
    for (int64_t i = 0; i < count_; ++i) ++starts[digit(entries[static_cast<size_t>(i)]) + 1];
    for (int d = 0; d < 1 << kRadixBits; ++d) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < count_; ++i) {
      const uint64_t entry = entries[static_cast<size_t>(i)];
      other[static_cast<size_t>(starts[digit(entry)]++)] = entry;
    }
    entries.swap(other);
  }
  entries_ = entries.release();
}

RowOrder::~RowOrder() { delete[] entries_; }

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
