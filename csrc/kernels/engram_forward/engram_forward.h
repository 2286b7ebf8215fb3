// engram_forward: the contract of the kernels. Edge cases: docs/ops.md, engram_forward.
//
// e[t] is the concatenation of the token's rows, dequantized to float32 and rounded once to `dtype`. Its products with the
// rows of w_kv, summed in float32 and rounded to `dtype`, are the keys of the branches, branch after branch, and the value; with
// them out is that of gate (gate.h). They are written to nothing that outlives a tile of tokens.
// Row id -1 is a row of zeros. The row ids of a masked token are not looked at, its rows are not read.
#pragma once

#include <cstdint>

#include "common/row_format.h"
#include "common/row_ids.h"
#include "kernels/gate/gate.h"

namespace engram_kernels {

struct EngramForwardParams {
  BranchRows hidden;
  RowSource table;
  const void* row_ids;  // [num_tokens, columns] int32 or int64, any strides
  const void* w_kv;     // [(branches + 1) * hidden_size, columns * table.row_dim] of dtype, dense
  GateWeights weights;
  const uint8_t* mask;  // [num_tokens], nonzero = masked; or null
  BranchRows out;       // written; may be `hidden` itself
  int64_t num_tokens;
  int64_t branches;
  int64_t hidden_size;
  int64_t columns;
  int64_t id_token_stride;  // elements
  int64_t id_column_stride;
  DType dtype;  // of hidden, w_kv and out
  bool ids_are_int64;
  GateOptions options;

  EK_INLINE bool masked(int64_t t) const { return mask != nullptr && mask[t] != 0; }
  EK_INLINE int64_t memory_size() const { return columns * table.row_dim; }
  EK_INLINE int64_t row_id(int64_t t, int64_t column) const {
    const int64_t i = t * id_token_stride + column * id_column_stride;
    return ids_are_int64 ? static_cast<const int64_t*>(row_ids)[i] : static_cast<const int32_t*>(row_ids)[i];
  }
};

// Throws unless sizes and constants are in range.
void check_params(const EngramForwardParams& p);
// Throws unless the row ids (host memory) of the tokens that are not masked lie in [-1, num_rows).
void check_host_data(const EngramForwardParams& p);

// A matrix product that the caller lends, with room for a tile of tokens. Torch's, through the binding: it has the fastest
// instructions of the machine.
struct TileProduct {
  using Run = void (*)(int64_t count, void* context);

  Run run;  // kv[:count] = memory[:count] @ w_kv.T
  void* context;
  void* memory;      // [tokens, memory_size] of dtype, dense
  void* kv;          // [tokens, (branches + 1) * hidden_size] of dtype, dense
  int64_t* row_ids;  // [tokens, columns]
  int64_t tokens;
};

void engram_forward_cpu(const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel);

}  // namespace engram_kernels
