// gather_rows: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, gather_rows and Row formats.
//
//   out[i, :] = decode(row row_ids[i])        zeros where row_ids[i] is -1; such a row is not read
//   grad_rows[r, :] = sum over i with row_ids[i] = r of grad[i, :]
// Dequantization is in fp32 with one rounding to the output dtype; rows of the output dtype are copied bit for bit. The
// gradient of a row is summed in fp32 in the order of the positions and rounded once: it does not depend on threads.
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
  // CUDA only
  bool as_stored = false;           // copy packed rows whole: out is [row_ids.count, row_value_bytes]
  int max_blocks = 0;               // blocks to run, for a gather in the background; 0: as many as there is work for
  uint32_t* error_count = nullptr;  // device memory, counts ids out of range, whose rows are zeros; or null
};

struct GatherRowsBwdParams {
  const std::byte* grad;  // [row_ids.count, row_dim] of grad_dtype, dense
  RowIds row_ids;         // -1 or [0, num_rows)
  std::byte* grad_rows;   // out [num_rows, row_dim] of out_dtype, dense; rows that no id names are zero
  int64_t num_rows;
  int row_dim;
  DType grad_dtype;
  DType out_dtype;
  // CUDA only: row_ids is sorted stably, this is where each id stood, and grad_rows holds zeros
  const int64_t* positions = nullptr;
};

// Throw unless sizes, strides and pointers are in range. Ids are not inspected.
void check_params(const GatherRowsParams& p);
void check_params(const GatherRowsBwdParams& p);

void gather_rows_cpu(const GatherRowsParams& p, const Parallel& parallel);
void gather_rows_bwd_cpu(const GatherRowsBwdParams& p, const RowOrder& order, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// ids and out are device memory; rows and scales may be host memory that the device can read.
void gather_rows_cuda(const GatherRowsParams& p, void* stream);
// Ids that name no row are left out.
void gather_rows_bwd_cuda(const GatherRowsBwdParams& p, void* stream);
#endif

}  // namespace engram_kernels
