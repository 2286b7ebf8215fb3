// Checks of engram_forward on host memory. Compiled once, for the plainest instruction set.
#include "kernels/engram_forward/engram_forward.h"

namespace engram_kernels {

void check_params(const EngramForwardParams& p) {
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1 && p.columns >= 1,
           "engram_forward: hidden has " << p.branches << " branches of size " << p.hidden_size << " and row_ids " << p.columns
                                         << " columns, expected at least 1 of each");
  check_row_source("engram_forward", p.table);
  check_gate_options("engram_forward", p.options);
}

void check_host_data(const EngramForwardParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.masked(t)) continue;
    for (int64_t c = 0; c < p.columns; ++c) {
      const int64_t id = p.row_id(t, c);
      EK_CHECK_INDEX(id >= kNoRow && id < p.table.num_rows, "engram_forward: row_ids[" << t << ", " << c << "] is " << id
                                                                                       << ", expected [0, " << p.table.num_rows
                                                                                       << ") or -1 (no row)");
    }
  }
}

}  // namespace engram_kernels
