// gather_rows: the contract that the CPU and CUDA kernels share. Semantics 5 and 6.
//
//   out[i, :] = decode(row row_ids[i])        zeros where row_ids[i] is -1; such a row is not read
//   grad_rows[r, :] = sum over i with row_ids[i] = r of grad[i, :]
// Dequantization is in fp32 with one rounding to the output dtype; rows of the output dtype are copied bit for bit. The
// gradient of a row is summed in fp32 in the order of the positions and rounded once, so that it does not depend on
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/parallel.h"
#include "common/row_format.h"
#include "common/row_ids.h"

namespace engram_kernels {

struct GatherRowsParams {
  RowSource source;
  RowIds row_ids;  // -1 or [0, source.num_rows): check_row_ids
  std::byte* out;  // [row_ids.count, source.row_dim] of out_dtype, dense; overlaps nothing that is read
  DType out_dtype;
};

struct GatherRowsBwdParams {
  const std::byte* grad;  // [row_ids.count, row_dim] of grad_dtype, dense
  RowIds row_ids;         // -1 or [0, num_rows)
  std::byte* grad_rows;   // out [num_rows, row_dim] of out_dtype, dense; rows that no id names are zero
  int64_t num_rows;
  int row_dim;
  DType grad_dtype;
  DType out_dtype;
};

// Throw unless sizes, strides and pointers are in range. Ids are not inspected.
void check_params(const GatherRowsParams& p);
void check_params(const GatherRowsBwdParams& p);

void gather_rows_cpu(const GatherRowsParams& p, const Parallel& parallel);
void gather_rows_bwd_cpu(const GatherRowsBwdParams& p, const RowOrder& order, const Parallel& parallel);

}  // namespace engram_kernels
