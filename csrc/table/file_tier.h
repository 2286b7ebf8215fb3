// Rows of one table that lie in files: values and, where they lie apart, scales.
//
// Ownership   shares the FileReader.
// Threads     see file_reader.h for how many fetches read at the same time. After a fork the child starts with queues and
//             threads of its own.
// Failure     FileReadError names tier, path and row. A file that was cut short or written to since it was opened fails every
//             fetch of its rows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/row_format.h"
#include "table/file_reader.h"
#include "table/row_tier.h"

namespace engram_kernels {

class FileTier : public RowTier {
 public:
  // `scales.row_bytes` 0: the table has no scales per row. `stored_scales` kBf16 or kF16: the file has floats of two bytes, which
  // are handed out as fp32.
  FileTier(std::shared_ptr<FileReader> reader, const FileRows& rows, const FileRows& scales, DType stored_scales = DType::kF32);

  // FileReadError where a file that holds one of the rows is not what was opened.
  void check_unchanged(const int64_t* ids, int64_t count) const override;

 protected:
  void read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) override;

 private:
  void read_widened(const TierRequest& request, ReadCounters* reads, const std::atomic<bool>* cancelled);

  std::shared_ptr<FileReader> reader_;
  FileRows rows_, scales_;
  DType stored_scales_;
};

}  // namespace engram_kernels
