// The sum of the gradients of one row over its positions, on a CPU.
#pragma once

#include <algorithm>

#include "common/row_ids.h"
#include "common/simd.h"

namespace engram_kernels::EK_ISA {

constexpr int kSumVectors = 8;  // accumulators in registers
constexpr int kSumColumns = kSumVectors * kLanes;

// out[0, count) = sum over entries [begin, end) of grad[position, column ..), in float32 in the order of the positions;
// count <= kSumColumns. `grad` is [positions, row_dim], dense.
template <class Grad, class Out>
EK_LANE void sum_columns(const Grad* grad, int row_dim, const RowOrder& order, int64_t begin, int64_t end, int column, int count,
                         Out* out) {
  grad += column;
  F32 sums[kSumVectors];
  for (int v = 0; v < kSumVectors; ++v) sums[v] = zeros();
  if (count == kSumColumns) {
    for (int64_t e = begin; e < end; ++e) {
      const Grad* from = grad + order.position(e) * row_dim;
      for (int v = 0; v < kSumVectors; ++v) sums[v] = add(sums[v], load(from + v * kLanes));
    }
    for (int v = 0; v < kSumVectors; ++v) store(out + v * kLanes, sums[v]);
    return;
  }
  for (int64_t e = begin; e < end; ++e) {
    const Grad* from = grad + order.position(e) * row_dim;
    for (int v = 0, rest = count; rest > 0; ++v, rest -= kLanes) {
      sums[v] = add(sums[v], load_first(from + v * kLanes, std::min(rest, kLanes)));
    }
  }
  for (int v = 0, rest = count; rest > 0; ++v, rest -= kLanes) store_first(out + v * kLanes, sums[v], std::min(rest, kLanes));
}

}  // namespace engram_kernels::EK_ISA
