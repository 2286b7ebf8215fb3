// CUDA kernel of the backward pass of gather_rows: a dense gradient of the rows. Contract: gather_rows.h.
//
// A warp looks at a position of the sorted ids. Where a new row begins, it sums the row's positions in their order, in fp32
// registers, a chunk of columns at a time; elsewhere it has nothing to do. So every output row has one writer, and its bits
// do not depend on the grid.
// Traffic  reads the gradient once and 12 to 16 bytes per id of the sort, and writes each row that is named once; the caller
//          has zeroed the others.
// Limits   one warp sums a row, even one that thousands of positions name.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/sum_positions_cuda.h"
#include "common/vector_cuda.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // elements of a lane
constexpr int kBlocksPerSm = 16;

template <DType kOut, int kCount>
__device__ __forceinline__ void store_sums(const GatherRowsBwdParams& p, int64_t id, int column, const float* sums) {
  std::byte* to = p.grad_rows + (id * p.row_dim + column) * dtype_bytes(kOut);
  if constexpr (kCount > 1) {
    constexpr int kStored = 16 / dtype_bytes(kOut);
#pragma unroll
    for (int e = 0; e < kCount; e += kStored) store_floats<kOut>(to + e * dtype_bytes(kOut), sums + e);
  } else if constexpr (kOut == DType::kF32) {
    *reinterpret_cast<float*>(to) = sums[0];
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack_pair<kOut>(sums[0], 0.0F));
  }
}

template <DType kGrad, DType kOut, int kCount>
__global__ void __launch_bounds__(kThreads) gather_rows_bwd_kernel(const GatherRowsBwdParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp);
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < p.row_ids.count; i += step) {
    const int64_t id = p.row_ids[i];
    if (!begins_row(p.row_ids, p.num_rows, i, id)) continue;
    const SortedGradients gradients{p.grad, p.positions, p.row_ids, p.row_dim};
#pragma unroll 1
    for (int column = lane * kCount; column < p.row_dim; column += kWarp * kCount) {
      float sums[kCount] = {};
      sum_positions<kGrad, kCount>(gradients, i, id, column, sums);
      store_sums<kOut, kCount>(p, id, column, sums);
    }
  }
}

template <DType kGrad, DType kOut>
void launch(const GatherRowsBwdParams& p, bool vectors, cudaStream_t stream) {
  const int64_t wanted = ceil_div(p.row_ids.count, int64_t{kThreads / kWarp});
  const auto blocks = static_cast<unsigned>(std::min(wanted, int64_t{num_multiprocessors()} * kBlocksPerSm));
  if (vectors) {
    gather_rows_bwd_kernel<kGrad, kOut, kVector><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    gather_rows_bwd_kernel<kGrad, kOut, 1><<<blocks, kThreads, 0, stream>>>(p);
  }
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kGrad>
void launch_to(const GatherRowsBwdParams& p, bool vectors, cudaStream_t stream) {
  dispatch_dtype(p.out_dtype, [&](auto type) { launch<kGrad, type.value>(p, vectors, stream); });
}

}  // namespace

void gather_rows_bwd_cuda(const GatherRowsBwdParams& p, void* stream) {
  check_params(p);
  if (p.row_ids.count == 0 || p.num_rows == 0) return;
  const bool vectors =
      p.row_dim % kVector == 0 && (reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.grad_rows)) % 16 == 0;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.grad_dtype, [&](auto type) { launch_to<type.value>(p, vectors, on); });
}

}  // namespace engram_kernels
