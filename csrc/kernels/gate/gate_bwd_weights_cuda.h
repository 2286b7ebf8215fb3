// The last kernel of the backward pass of gate: weight gradients out of the shares of the kernels before. Included by
// gate_bwd_cuda.cu only.
//
// Mapping  a thread a share, in every kWeightRows-th of them; a block adds its rows in their order.
// Traffic  the shares once, in whole 128-byte lines.
#pragma once

#include "kernels/gate/gate_row_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kWeightColumns = 32, kWeightRows = 8;
constexpr int kShareElements = 8;  // of a vector
constexpr int kShareParts = kShareElements / 4;

// Where the shares lie: rows as they are, or [group][warp][branch][vector][plane][lane][4].
struct ShareOrder {
  int branches, vectors;  // of a thread; 0 branches: rows as they are
  int warps;
};

// The element of the weights whose share is the i-th, or -1.
__device__ __forceinline__ int64_t element_of(const GateParams& f, const ShareOrder& order, int i) {
  if (order.branches == 0) return i;
  const int lane = i / 4 % kWarp;
  i /= 4 * kWarp;
  const int plane = i % kShareParts, j = i / kShareParts % order.vectors;
  i /= order.vectors * kShareParts;
  const int m = i % order.branches, warp = i / order.branches % order.warps, group = i / order.branches / order.warps;
  const int vector = (warp * order.vectors + j) * kWarp + lane;
  if (vector * kShareElements >= f.hidden_size) return -1;
  return (int64_t{group} * order.branches + m) * f.hidden_size + vector * kShareElements + plane * 4;
}

// Weight gradients out of `count` times `size` shares, a thread a share in every kWeightRows-th of them.
__global__ void __launch_bounds__(kWeightColumns* kWeightRows)
    gate_bwd_weights(const GateBwdParams p, const float* shares, int count, int size, const ShareOrder order) {
  __shared__ float partial[kWeightRows][kWeightColumns];
  const GateParams& f = p.forward;
  const int i = blockIdx.x * kWeightColumns + threadIdx.x;
  float sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int n = threadIdx.y; n < count; n += kWeightRows) sum += shares[int64_t{n} * size + i];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
  for (int n = 1; n < kWeightRows; ++n) sum += partial[n][threadIdx.x];
  int64_t element = element_of(f, order, i);
  if (element < 0) return;
  if (order.branches > 0) element += i % 4;
  const DType dtype = f.weights.dtype;
  store_element(p.grad_w_hidden, dtype, element, sum * load_element(f.weights.w_key, dtype, element));
  store_element(p.grad_w_key, dtype, element, sum * load_element(f.weights.w_hidden, dtype, element));
}

void launch_weights(const GateBwdParams& p, const float* shares, int64_t count, int64_t size, const ShareOrder& order,
                    cudaStream_t stream) {
  const dim3 block(kWeightColumns, kWeightRows);
  gate_bwd_weights<<<static_cast<unsigned>(ceil_div(size, int64_t{kWeightColumns})), block, 0, stream>>>(
      p, shares, static_cast<int>(count), static_cast<int>(size), order);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace engram_kernels
