// Checks of gather_gate on host memory. Compiled once, for the plainest instruction set.
#include "kernels/gather_gate/gather_gate.h"

namespace engram_kernels {

void check_params(const GatherGateParams& p) {
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1,
           "gather_gate: hidden has " << p.branches << " branches of size " << p.hidden_size << ", expected at least 1 of each");
  check_row_source("gather_gate", p.table);
  EK_CHECK(p.columns * p.table.row_dim == p.hidden_size, "gather_gate: " << p.columns << " rows of " << p.table.row_dim
                                                                         << " elements do not make a hidden size of "
                                                                         << p.hidden_size);
  check_gate_options("gather_gate", p.options);
}

void check_host_data(const GatherGateParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.masked(t)) continue;
    for (int64_t c = 0; c < p.columns; ++c) {
      const int64_t id = p.row_id(t, c);
      EK_CHECK_INDEX(id >= kNoRow && id < p.table.num_rows, "gather_gate: row_ids[" << t << ", " << c << "] is " << id
                                                                                    << ", expected [0, " << p.table.num_rows
                                                                                    << ") or -1 (no row)");
    }
  }
}

}  // namespace engram_kernels
