// gather_gate: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, gather_gate.
//
// e[t] is the concatenation of the token's rows, dequantized to float32 and not rounded further; it is the key of every
// branch and the value of gate (gate.h). It is never written to memory that outlives the token.
// Row id -1 is a row of zeros. The row ids of a masked token are not looked at, its rows are not read.
//
// The backward pass is that of gate.h, with grad_rows[t] = dv + sum_m dk[m].
#pragma once

#include <cstdint>

#include "common/row_format.h"
#include "common/row_ids.h"
#include "kernels/gate/gate.h"

namespace engram_kernels {

struct GatherGateParams {
  BranchRows hidden;
  RowSource table;
  const void* row_ids;  // [num_tokens, columns] int32 or int64, any strides
  GateWeights weights;
  const uint8_t* mask;  // [num_tokens], nonzero = masked; or null
  BranchRows out;       // written; may be `hidden` itself
  int64_t num_tokens;
  int64_t branches;
  int64_t hidden_size;  // columns * table.row_dim
  int64_t columns;
  int64_t id_token_stride;  // elements
  int64_t id_column_stride;
  DType dtype;  // of hidden and out
  bool ids_are_int64;
  GateOptions options;
  uint32_t* error_count = nullptr;  // CUDA only: device memory, counts ids out of range, whose rows are zeros; or null

  EK_INLINE bool masked(int64_t t) const { return mask != nullptr && mask[t] != 0; }
  EK_INLINE int64_t row_id(int64_t t, int64_t column) const {
    const int64_t i = t * id_token_stride + column * id_column_stride;
    return ids_are_int64 ? static_cast<const int64_t*>(row_ids)[i] : static_cast<const int32_t*>(row_ids)[i];
  }
};

struct GatherGateBwdParams {
  GatherGateParams forward;  // its `out` is not used
  BranchRows grad_out;       // dtype of hidden
  BranchRows grad_hidden;
  void* grad_rows;      // [num_tokens, columns, row_dim] dense, dtype of hidden
  void* grad_w_hidden;  // [branches, hidden_size] dense, dtype of the weights
  void* grad_w_key;
  void* scratch = nullptr;  // CUDA only: device memory of gather_gate_bwd_cuda_scratch_bytes, 16-byte aligned
};

// Throws unless sizes and constants are in range.
void check_params(const GatherGateParams& p);
// Throws unless the row ids (host memory) of the tokens that are not masked lie in [-1, num_rows).
void check_host_data(const GatherGateParams& p);

void gather_gate_cpu(const GatherGateParams& p, const Parallel& parallel);
void gather_gate_bwd_cpu(const GatherGateBwdParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// Every pointer is device memory; the table may be host memory that the device can read. An id that names no row is -1.
void gather_gate_cuda(const GatherGateParams& p, void* stream);
int64_t gather_gate_bwd_cuda_scratch_bytes(const GatherGateBwdParams& p);  // on the current device
void gather_gate_bwd_cuda(const GatherGateBwdParams& p, void* stream);
#endif

}  // namespace engram_kernels
