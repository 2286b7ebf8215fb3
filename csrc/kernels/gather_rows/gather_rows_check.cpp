// Checks of gather_rows on sizes and pointers. Compiled once, for the plainest instruction set.
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

bool overlap(const std::byte* a, int64_t a_bytes, const std::byte* b, int64_t b_bytes) {
  const auto a_begin = reinterpret_cast<uintptr_t>(a), b_begin = reinterpret_cast<uintptr_t>(b);
  return a_bytes > 0 && b_bytes > 0 && a_begin < b_begin + static_cast<uintptr_t>(b_bytes) &&
         b_begin < a_begin + static_cast<uintptr_t>(a_bytes);
}

}  // namespace

void check_params(const GatherRowsParams& p) {
  const RowSource& s = p.source;
  check_row_source("gather_rows", s);
  EK_CHECK(p.row_ids.count >= 0, "gather_rows: the number of ids is " << p.row_ids.count);
  EK_CHECK(!p.as_stored || s.format == RowFormat::kFp8Block32Packed, "gather_rows: only packed rows can be had as stored");
  EK_CHECK(p.max_blocks >= 0, "gather_rows: max_blocks is " << p.max_blocks << ", expected at least 0");
  const int64_t out_row_bytes = p.as_stored ? row_value_bytes(s.format, s.row_dim) : s.row_dim * dtype_bytes(p.out_dtype);
  const int64_t out_bytes = p.row_ids.count * out_row_bytes;
  const int64_t table_bytes = s.num_rows == 0 ? 0 : (s.num_rows - 1) * s.row_stride_bytes + row_value_bytes(s.format, s.row_dim);
  EK_CHECK(!overlap(p.out, out_bytes, s.rows, table_bytes), "gather_rows: out overlaps the rows of the table");
  EK_CHECK(
      !overlap(p.out, out_bytes, static_cast<const std::byte*>(p.row_ids.data), p.row_ids.count * (p.row_ids.are_int64 ? 8 : 4)),
      "gather_rows: out overlaps row_ids");
}

void check_params(const GatherRowsBwdParams& p) {
  EK_CHECK(p.num_rows >= 0, "gather_rows_bwd: num_rows is " << p.num_rows << ", expected at least 0");
  EK_CHECK(p.row_dim >= 1, "gather_rows_bwd: row_dim is " << p.row_dim << ", expected at least 1");
}

}  // namespace engram_kernels
