#include "table/read_plan.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

namespace engram_kernels {

ReadPlan::ReadPlan(const RowsWanted* wanted, int num_wanted, const RowRequest& request, int64_t align_bytes, int64_t max_bytes)
    : request_(request), align_bytes_(align_bytes), max_bytes_(max_bytes), count_(request.count) {
  for (int i = 0; i < num_wanted; ++i) {
    if (wanted[i].rows->row_bytes > 0) wanted_.push_back(wanted[i]);
  }
  std::sort(wanted_.begin(), wanted_.end(), [](const RowsWanted& a, const RowsWanted& b) {
    const RowPart &of_a = a.rows->parts[0], &of_b = b.rows->parts[0];
    return std::pair(of_a.file, of_a.offset) < std::pair(of_b.file, of_b.offset);
  });
  parts_.resize(wanted_.size());
  const int64_t* ids = request.ids;
  if (std::adjacent_find(ids, ids + request.count, std::greater_equal<>()) == ids + request.count) return;
  std::vector<int64_t> sorted(static_cast<size_t>(request.count));
  std::iota(sorted.begin(), sorted.end(), int64_t{0});
  std::sort(sorted.begin(), sorted.end(), [ids](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  for (const int64_t at : sorted) {
    if (!order_.empty() && ids[order_.back()] == ids[at]) {
      duplicates_.emplace_back(at, order_.back());
    } else {
      order_.push_back(at);
    }
  }
  count_ = static_cast<int64_t>(order_.size());
}

Piece ReadPlan::piece(int64_t k) const {
  const auto array = static_cast<size_t>(k / count_);
  const RowsWanted& wanted = wanted_[array];
  const int64_t at = order_.empty() ? k % count_ : order_[static_cast<size_t>(k % count_)];
  const int64_t row = request_.ids[at];
  const FileRows& rows = *wanted.rows;
  const RowPart& part = rows.parts[parts_[array] = rows.part_of(row, parts_[array])];
  return {part.file, part.offset + (row - part.first_row) * rows.stride_bytes, rows.row_bytes,
          wanted.out + position(at) * rows.row_bytes, row};
}

bool ReadPlan::next(PlannedRead* read) {
  const int64_t num_pieces = count_ * static_cast<int64_t>(wanted_.size());
  if (piece_ >= num_pieces) return false;
  Piece piece = this->piece(piece_);
  const int64_t begin = down(piece.offset + done_bytes_), limit = begin + max_bytes_;
  *read = {piece.file, begin, 0, 0, piece_, piece_};
  for (;;) {
    read->last = piece_;
    const int64_t end = piece.offset + piece.bytes;
    if (end > limit) {  // the rest of this row begins the next read
      done_bytes_ = limit - piece.offset;
      read->needed = limit;
      break;
    }
    read->needed = std::max(read->needed, end);
    done_bytes_ = 0;
    if (++piece_ == num_pieces) break;
    piece = this->piece(piece_);
    if (piece.file != read->file || piece.offset < read->needed) break;  // of a part that lies elsewhere
    // the page after the one that this read ends in is read with it; a page further on is not
    if (piece.offset >= limit || piece.offset / kPageBytes > (read->needed - 1) / kPageBytes + 1) break;
  }
  read->end = std::min(up(read->needed), limit);
  return true;
}

PlannedRead ReadPlan::only(const PlannedRead& read, int64_t k) const {
  const Piece piece = this->piece(k);
  const int64_t begin = std::max(piece.offset, read.begin), needed = std::min(piece.offset + piece.bytes, read.needed);
  return {read.file, down(begin), std::min(up(needed), read.end), needed, k, k};
}

void ReadPlan::copy_out(const PlannedRead& read, const std::byte* bytes) const {
  for (int64_t k = read.first; k <= read.last; ++k) {
    const Piece piece = this->piece(k);
    const int64_t begin = std::max(piece.offset, read.begin), end = std::min(piece.offset + piece.bytes, read.needed);
    std::memcpy(piece.out + (begin - piece.offset), bytes + (begin - read.begin), static_cast<size_t>(end - begin));
  }
}

void ReadPlan::copy_duplicates() const {
  for (const RowsWanted& wanted : wanted_) {
    const int64_t bytes = wanted.rows->row_bytes;
    for (const auto& [to, from] : duplicates_) {
      std::memcpy(wanted.out + position(to) * bytes, wanted.out + position(from) * bytes, static_cast<size_t>(bytes));
    }
  }
}

}  // namespace engram_kernels
