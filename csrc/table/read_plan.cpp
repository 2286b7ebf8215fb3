#include "table/read_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace engram_kernels {

ReadPlan::ReadPlan(const RowsWanted* wanted, int num_wanted, const RowRequest& request, int64_t align_bytes, int64_t max_bytes)
    : request_(request), align_bytes_(align_bytes), max_bytes_(max_bytes) {
  for (int i = 0; i < num_wanted; ++i) {
    if (wanted[i].rows.row_bytes > 0) wanted_.push_back(wanted[i]);
  }
  std::sort(wanted_.begin(), wanted_.end(), [](const auto& a, const auto& b) { return a.rows.offset < b.rows.offset; });
  const int64_t* ids = request.ids;
  if (!std::is_sorted(ids, ids + request.count)) {
    order_.resize(static_cast<size_t>(request.count));
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::sort(order_.begin(), order_.end(), [ids](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
}

Piece ReadPlan::piece(int64_t k) const {
  const RowsWanted& wanted = wanted_[static_cast<size_t>(k / request_.count)];
  const int64_t at = order_.empty() ? k % request_.count : order_[static_cast<size_t>(k % request_.count)];
  const int64_t row = request_.ids[at], position = request_.positions == nullptr ? at : request_.positions[at];
  const FileRows& rows = wanted.rows;
  return {rows.offset + row * rows.stride_bytes, rows.row_bytes, wanted.out + position * rows.row_bytes, row};
}

bool ReadPlan::next(PlannedRead* read) {
  const int64_t num_pieces = request_.count * static_cast<int64_t>(wanted_.size());
  if (piece_ >= num_pieces) return false;
  Piece piece = this->piece(piece_);
  const int64_t begin = down(piece.offset + done_bytes_), limit = begin + max_bytes_;
  *read = {begin, 0, 0, piece_, piece_};
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
    // the page after the one that this read ends in is read with it; a page further on is not
    if (piece.offset >= limit || piece.offset / kPageBytes > (read->needed - 1) / kPageBytes + 1) break;
  }
  read->end = std::min(up(read->needed), limit);
  return true;
}

PlannedRead ReadPlan::only(const PlannedRead& read, int64_t k) const {
  const Piece piece = this->piece(k);
  const int64_t begin = std::max(piece.offset, read.begin), needed = std::min(piece.offset + piece.bytes, read.needed);
  return {down(begin), std::min(up(needed), read.end), needed, k, k};
}

void ReadPlan::copy_out(const PlannedRead& read, const std::byte* bytes) const {
  for (int64_t k = read.first; k <= read.last; ++k) {
    const Piece piece = this->piece(k);
    const int64_t begin = std::max(piece.offset, read.begin), end = std::min(piece.offset + piece.bytes, read.needed);
    std::memcpy(piece.out + (begin - piece.offset), bytes + (begin - read.begin), static_cast<size_t>(end - begin));
  }
}

}  // namespace engram_kernels
