// Checks of gather_rows on sizes and pointers. Compiled once, for the plainest instruction set.
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {

void check_params(const GatherRowsParams& p) {
  const RowSource& s = p.source;
  check_row_source("gather_rows", s);
  EK_CHECK(p.row_ids.count >= 0, "gather_rows: the number of ids is " << p.row_ids.count);
  EK_CHECK(!p.as_stored || traits_of(s.format).packed, "gather_rows: only packed rows can be had as stored");
  EK_CHECK(p.max_blocks >= 0, "gather_rows: max_blocks is " << p.max_blocks << ", expected at least 0");
}

void check_params(const GatherRowsBwdParams& p) {
  EK_CHECK(p.num_rows >= 0, "gather_rows_bwd: num_rows is " << p.num_rows << ", expected at least 0");
  EK_CHECK(p.row_dim >= 1, "gather_rows_bwd: row_dim is " << p.row_dim << ", expected at least 1");
}

}  // namespace engram_kernels
