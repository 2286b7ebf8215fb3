// Rows of one table that lie in files: values and, where they lie apart, scales; a row cache in memory in front of them.
//
// Scope       raw rows by id; no formats, no duplicates (the caller has made ids distinct).
// Ownership   shares the FileReader; the cache is its own, at most `cache_bytes` with its directory.
// Threads     `fetch` may be called from several threads at once; see file_reader.h for how many read at the same time. After a
//             fork the child starts with queues, threads and a cache of its own.
// Failure     FileReadError names tier, path and row; the outputs are then unspecified and nothing of the request is cached. A
//             file that was cut short or written to since it was opened fails every fetch of its rows, cached ones included.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/row_format.h"
#include "table/file_reader.h"

namespace engram_kernels {

struct FetchCounters {
  int64_t rows = 0;           // asked for
  int64_t cache_hits = 0;     // rows that came from the cache
  int64_t file_rows = 0;      // rows that came from the file
  int64_t payload_bytes = 0;  // bytes of all rows asked for, scales included
  int64_t moved_bytes = 0;    // bytes read from the file
  int64_t reads = 0;          // reads submitted

  FetchCounters& operator+=(const FetchCounters& other);
};

class FileTier {
 public:
  // `scales.row_bytes` 0: the table has no scales per row. cache_bytes 0: no cache. `stored_scales` kBf16 or kF16: the file has
  // floats of two bytes, which are handed out as fp32.
  FileTier(std::shared_ptr<FileReader> reader, const FileRows& rows, const FileRows& scales, int64_t cache_bytes,
           DType stored_scales = DType::kF32);
  ~FileTier();
  FileTier(const FileTier&) = delete;
  FileTier& operator=(const FileTier&) = delete;

  // rows_out[i * row_bytes() ..] and scales_out[i * scale_bytes() ..] = row distinct_ids[i], for `count` distinct ids in
  // [0, num_rows); any order, ascending is fastest. Blocks. `*counters` is added to (may be null; unchanged on failure).
  // `*cancelled` (may be null) is looked at between submissions; once it is true the call ends with FetchCancelled.
  void fetch(const int64_t* distinct_ids, int64_t count, std::byte* rows_out, std::byte* scales_out, FetchCounters* counters,
             const std::atomic<bool>* cancelled);

  // FileReadError where a file that holds one of the rows is not what was opened.
  void check_unchanged(const int64_t* ids, int64_t count) const;

  int64_t row_bytes() const { return rows_.row_bytes; }
  int64_t scale_bytes() const { return scales_.row_bytes * (stored_scales_ == DType::kF32 ? 1 : 2); }  // as they are handed out
  int64_t num_rows() const { return rows_.num_rows; }
  int64_t cache_slots() const { return cache_slots_; }
  int64_t cached_rows() const;
  FetchCounters totals() const;  // of all fetches that succeeded
  const FileReader& reader() const { return *reader_; }

 private:
  struct Cache;
  struct RowsMissed;
  Cache& cache() const;
  void copy_cached(const int64_t* ids, int64_t count, std::byte* rows_out, std::byte* scales_out, RowsMissed* missed) const;
  void keep(const RowsMissed& missed, const std::byte* rows, const std::byte* scales) const;
  void widen(std::byte* scales, int64_t count) const;

  std::shared_ptr<FileReader> reader_;
  FileRows rows_, scales_;
  DType stored_scales_;
  int64_t cache_slots_ = 0;
  mutable std::atomic<Cache*> cache_{nullptr};
  std::atomic<int64_t> totals_[6] = {};
};

}  // namespace engram_kernels
