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
  check_gate_options("gather_gate", p.options.eps, p.options.clamp);
}

void check_host_data(const GatherGateParams& p) {
  const TokenRowIds ids{p.row_ids, p.num_tokens, p.columns, p.id_token_stride, p.id_column_stride, p.ids_are_int64, p.mask};
  check_row_ids("gather_gate", ids, p.table.num_rows);
}

}  // namespace engram_kernels
