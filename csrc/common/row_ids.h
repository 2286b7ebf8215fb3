// Row ids of a batch: int32 or int64, -1 where there is no row.
#pragma once

#include <cstdint>
#include <memory>

#include "common/math.h"
#include "common/parallel.h"

namespace engram_kernels {

constexpr int64_t kNoRow = -1;  // zeros are written, nothing is read

struct RowIds {
  const void* data;  // [count]
  int64_t count;
  bool are_int64;

  EK_INLINE int64_t operator[](int64_t i) const {
    return are_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Row ids of tokens, [num_tokens, columns]; strides in elements.
struct TokenRowIds {
  const void* data;
  int64_t num_tokens;
  int64_t columns;
  int64_t token_stride;
  int64_t column_stride;
  bool are_int64;
  const uint8_t* mask;  // [num_tokens], nonzero = the ids of the token are not looked at; or null
};

// Throws std::out_of_range unless every id is kNoRow or in [0, num_rows). The message names the value and the position
// in an array of `dims` sizes.
void check_row_ids(const char* op, const RowIds& ids, int64_t num_rows, const int64_t* sizes, int dims);
void check_row_ids(const char* op, const TokenRowIds& ids, int64_t num_rows);

// What a RowOrder sorts in: kept from one to the next, its pages are faulted in once.
class RowOrderMemory {
 public:
  uint64_t* take(int which, int64_t count) {  // what it held is gone where it was too small
    if (count > sizes_[which]) {
      drop(which);
      arrays_[which] = std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(count));
      sizes_[which] = count;
    }
    return arrays_[which].get();
  }
  void drop(int which) {
    arrays_[which].reset();
    sizes_[which] = 0;
  }

 private:
  std::unique_ptr<uint64_t[]> arrays_[2];
  int64_t sizes_[2] = {};
};

// Positions of a batch in the order of their rows, and of themselves within a row; kNoRow left out. Owns 8 bytes per id.
class RowOrder {
 public:
  // ids checked; holds another 8 bytes per id while it sorts. The order does not depend on `parallel`. `memory`: which it uses
  // until it goes, instead of its own.
  RowOrder(const RowIds& ids, int64_t num_rows, const Parallel& parallel = {}, RowOrderMemory* memory = nullptr);
  RowOrder(const RowOrder&) = delete;
  RowOrder& operator=(const RowOrder&) = delete;

  EK_INLINE int64_t count() const { return count_; }
  EK_INLINE int64_t row(int64_t i) const { return static_cast<int64_t>(entries_[i] >> position_bits_); }
  EK_INLINE int64_t position(int64_t i) const {
    return static_cast<int64_t>(entries_[i] & ((uint64_t{1} << position_bits_) - 1));
  }
  EK_INLINE bool begins_row(int64_t i) const { return i == 0 || row(i) != row(i - 1); }
  int64_t first_at_or_after(int64_t row) const;  // in [0, count]

 private:
  RowOrderMemory own_;
  const uint64_t* entries_ = nullptr;  // row << position_bits_ | position
  int64_t count_ = 0;
  int position_bits_ = 0;
};

}  // namespace engram_kernels
