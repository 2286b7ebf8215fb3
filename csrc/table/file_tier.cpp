#include "table/file_tier.h"

#include <cstring>
#include <utility>
#include <vector>

#include "common/error.h"

namespace engram_kernels {
namespace {

TierShape shape_of(const FileRows& rows, const FileRows& scales, DType stored_scales) {
  const int64_t widening = stored_scales == DType::kF32 ? 1 : 2;
  return {rows.num_rows, rows.row_bytes, scales.row_bytes * widening, rows.row_bytes + scales.row_bytes};
}

}  // namespace

FileTier::FileTier(std::shared_ptr<FileReader> reader, const FileRows& rows, const FileRows& scales, DType stored_scales)
    : RowTier(shape_of(rows, scales, stored_scales)),
      reader_(std::move(reader)),
      rows_(rows),
      scales_(scales),
      stored_scales_(stored_scales) {
  reader_->check(rows_);
  reader_->check(scales_);
  EK_CHECK(scales.row_bytes == 0 || scales.num_rows == rows.num_rows,
           "FileTier: there are scales for " << scales.num_rows << " rows, expected " << rows.num_rows);
  EK_CHECK(scales.row_bytes % dtype_bytes(stored_scales) == 0 || stored_scales == DType::kF32,
           "FileTier: scales of " << scales.row_bytes << " bytes per row are no floats of two bytes");
}

void FileTier::read(const TierRequest& request, FetchCounters* counters, const std::atomic<bool>* cancelled) {
  ReadCounters reads;
  if (stored_scales_ != DType::kF32) {
    read_widened(request, &reads, cancelled);
  } else {
    const RowsWanted wanted[2] = {{&rows_, request.rows}, {&scales_, request.scales}};
    reader_->read(wanted, scales_.row_bytes > 0 ? 2 : 1, {request.ids, request.count, request.positions}, &reads, cancelled);
  }
  counters->moved_bytes = reads.moved_bytes;
  counters->reads = reads.reads;
}

// The scales as the file has them beside the output, and from there into it as fp32.
void FileTier::read_widened(const TierRequest& request, ReadCounters* reads, const std::atomic<bool>* cancelled) {
  const int64_t room = request.count == 0 ? 0 : request.position(request.count - 1) + 1;
  std::vector<std::byte> halves(static_cast<size_t>(room * scales_.row_bytes));
  const RowsWanted wanted[2] = {{&rows_, request.rows}, {&scales_, halves.data()}};
  reader_->read(wanted, scales_.row_bytes > 0 ? 2 : 1, {request.ids, request.count, request.positions}, reads, cancelled);
  const int64_t per_row = scales_.row_bytes / 2;
  for (int64_t i = 0; i < request.count; ++i) {
    for (int64_t at = request.position(i) * per_row, end = at + per_row; at < end; ++at) {
      uint16_t bits;
      std::memcpy(&bits, halves.data() + at * 2, sizeof(bits));
      const float value = stored_scales_ == DType::kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
      std::memcpy(request.scales + at * 4, &value, sizeof(value));
    }
  }
}

void FileTier::check_unchanged(const int64_t* ids, int64_t count) const {
  const RowsWanted wanted[2] = {{&rows_, nullptr}, {&scales_, nullptr}};
  reader_->check_unchanged(wanted, 2, ids, count);
}

}  // namespace engram_kernels
