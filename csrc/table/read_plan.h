// Which reads a request takes: the pages of its rows, part by part in file order, each page once per part, neighbouring pages
// in one read.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "table/file_reader.h"

namespace engram_kernels {

// One row of one array: its place in a file and where it goes.
struct Piece {
  int file;
  int64_t offset, bytes;
  std::byte* out;
  int64_t row;
};

// Bytes [begin, end) of a file, of which [begin, needed) hold parts of the pieces first..last.
struct PlannedRead {
  int file;
  int64_t begin, end, needed;
  int64_t first, last;
};

class ReadPlan {
 public:
  static constexpr int64_t kPageBytes = 4096;

  // align_bytes: reads begin and end at its multiples (direct reads); 1: where the rows do. A multiple of it, `max_bytes`
  // limits a read.
  ReadPlan(const RowsWanted* wanted, int num_wanted, const RowRequest& request, int64_t align_bytes, int64_t max_bytes);

  bool next(PlannedRead* read);                                // false: all rows are covered
  Piece piece(int64_t k) const;                                // array by array, in the order of the rows
  PlannedRead only(const PlannedRead& read, int64_t k) const;  // the part of a read that piece k needs
  void copy_out(const PlannedRead& read, const std::byte* bytes) const;
  void copy_duplicates() const;  // once all reads are copied out: rows that were asked for twice are read once

 private:
  int64_t position(int64_t at) const { return request_.positions == nullptr ? at : request_.positions[at]; }
  int64_t down(int64_t at) const { return at / align_bytes_ * align_bytes_; }
  int64_t up(int64_t at) const { return down(at + align_bytes_ - 1); }

  std::vector<RowsWanted> wanted_;     // by place in the files
  mutable std::vector<size_t> parts_;  // of each of these, the part that the last piece lay in
  RowRequest request_;
  int64_t align_bytes_, max_bytes_;
  std::vector<int64_t> order_;                           // indices of distinct ids, ascending by id; empty: all, as given
  std::vector<std::pair<int64_t, int64_t>> duplicates_;  // index of an id, and the one in `order_` of the same id
  int64_t count_;                                        // of distinct ids
  int64_t piece_ = 0;                                    // the next one
  int64_t done_bytes_ = 0;                               // of that piece, covered by earlier reads
};

}  // namespace engram_kernels
