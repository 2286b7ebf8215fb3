// Checks of engram_forward on host memory. Compiled once, for the plainest instruction set.
#include "kernels/engram_forward/engram_forward.h"

namespace engram_kernels {

void check_params(const EngramForwardParams& p) {
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1 && p.columns >= 1,
           "engram_forward: hidden has " << p.branches << " branches of size " << p.hidden_size << " and row_ids " << p.columns
                                         << " columns, expected at least 1 of each");
  check_row_source("engram_forward", p.table);
  check_gate_options("engram_forward", p.options.eps, p.options.clamp);
}

void check_host_data(const EngramForwardParams& p) {
  const TokenRowIds ids{p.row_ids, p.num_tokens, p.columns, p.id_token_stride, p.id_column_stride, p.ids_are_int64, p.mask};
  check_row_ids("engram_forward", ids, p.table.num_rows);
}

}  // namespace engram_kernels
