// The sum of the gradients of one row over its positions, on a GPU. Included by .cu files only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert_cuda.h"
#include "common/row_ids.h"

namespace engram_kernels {

constexpr int kPositionsAtOnce = 4;

// kCount elements of kType as floats; one of them need not be aligned to 4 bytes.
template <DType kType, int kCount>
__device__ __forceinline__ void load_elements(const std::byte* from, float (&values)[kCount]) {
  if constexpr (kCount > 1) {
    load_floats<kType, kCount>(from, values);
  } else if constexpr (kType == DType::kF32) {
    values[0] = *reinterpret_cast<const float*>(from);
  } else {
    float unused;
    unpack_pair<kType>(*reinterpret_cast<const uint16_t*>(from), values, &unused);
  }
}

// Whether `id`, at place i of the sorted ids, names a row and is the first to do so.
__device__ __forceinline__ bool begins_row(const RowIds& sorted, int64_t num_rows, int64_t i, int64_t id) {
  return id >= 0 && id < num_rows && (i == 0 || sorted[i - 1] != id);
}

// The gradients of a batch [count, row_dim], dense, beside its sorted ids and where each stood.
struct SortedGradients {
  const std::byte* grad;
  const int64_t* positions;
  RowIds ids;
  int row_dim;
};

// sums[..] += the elements from `column` on of the gradients at sorted places i, i + 1, .. of the row, in float32 in order.
template <DType kGrad, int kCount>
__device__ __forceinline__ void sum_positions(const SortedGradients& s, int64_t i, int64_t id, int column, float* sums) {
#pragma unroll 1
  for (; i < s.ids.count && s.ids[i] == id; i += kPositionsAtOnce) {
    float values[kPositionsAtOnce][kCount] = {};
#pragma unroll
    for (int n = 0; n < kPositionsAtOnce; ++n) {  // independent loads first
      if (i + n < s.ids.count && s.ids[i + n] == id) {
        load_elements<kGrad>(s.grad + (s.positions[i + n] * s.row_dim + column) * dtype_bytes(kGrad), values[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kPositionsAtOnce; ++n) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) sums[e] += values[n][e];
    }
  }
}

}  // namespace engram_kernels
