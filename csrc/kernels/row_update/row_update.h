// row_update: the contract of its kernels. Edge cases: docs/ops.md, row_update.
//
// For each row r that ids name, once, with g = grad_scale * (the sum of grad over its positions, in float32 in their order):
//   squares[first position of r] = sum g^2      0 at every other position
//   the step of the row: one more than steps[r]; m, v: its moments; a: 1 / lr, see the .cpp
// Nothing else is read or written: rows that no id names stay as they are, to the bit. Arithmetic is in float32 without
// contraction, sums of squares are taken in 16 parts whatever the instruction set: results depend on neither threads nor ISA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/parallel.h"
#include "common/row_format.h"
#include "common/row_ids.h"

namespace engram_kernels {

enum class UpdateRule : int { kNone, kSgd, kAdagrad, kAdam };

struct RowUpdateParams {
  RowIds row_ids;         // -1 or [0, num_rows): check_row_ids
  const std::byte* grad;  // [row_ids.count, row_dim] of grad_dtype, dense
  DType grad_dtype;
  std::byte* rows;  // [num_rows, row_dim] of row_dtype, row_stride elements apart
  int64_t row_stride;
  DType row_dtype;
  int64_t num_rows;
  int row_dim;
  float* second;  // [num_rows, row_dim], or [num_rows] with second_per_row, dense; or null
  bool second_per_row;
  std::byte* first;  // [num_rows, row_dim] of first_dtype (float32 or bfloat16), dense; or null
  DType first_dtype;
  int32_t* steps;  // [num_rows]: updates that a row has had; or null
  float* squares;  // out [row_ids.count]
  UpdateRule rule;
  double lr, beta1, beta2, eps, grad_scale;
  int64_t step;  // for the bias correction of all rows alike; 0: each row's own
  bool stochastic;
  uint64_t seed;
  int64_t first_row;  // what row 0 is called when its random bits are drawn
};

// What is wrong with the gradients, before anything is written. Positions and rows are -1 where all is well.
struct GradientFault {
  int64_t position = -1;   // the first whose gradient is NaN or infinite
  int64_t row = -1;        // the first whose summed and scaled gradient is infinite
  int64_t spent_row = -1;  // the first whose count of steps is negative or cannot grow
};

// Throws unless sizes, options and pointers fit one another. Ids and gradients are not inspected.
void check_params(const RowUpdateParams& p);
// Throws where `fault` has one: names the position, the row and the element.
void throw_fault(const RowUpdateParams& p, const GradientFault& fault);

void find_gradient_fault_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel, GradientFault& fault);
void row_update_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel);

}  // namespace engram_kernels
