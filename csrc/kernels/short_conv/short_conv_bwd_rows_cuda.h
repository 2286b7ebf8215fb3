// What the backward CUDA kernels of short_conv share: rows of the gradient, and what one kernel leaves for the next.
#pragma once

#include "kernels/short_conv/short_conv_rows_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kSummedTokens = 64;  // added one after another; sums of those are added in turn

// Scratch memory. The mean that the gradient of the norm needs, over all channels of token t, is a sum over the taps' readers:
//   sum of dxh * xh = sum over j of part[t + back(j)][j],  part[u][j] = sum over channels of dz[u] * tap j * xh[u - back(j)]
// and part[u] needs only what lies behind u. So the first kernel sums it over whole rows, and the second may split rows.
struct Saved {
  float* stats;     // [num_tokens, branches, 1 + width]: inverse root mean square, then part
  float* tap_sums;  // [chunks, branches, width, hidden_size]: sums over a chunk's tokens of dz[t] * xh[t - back(j)]
  int chunk_tokens;
  int chunks;

  __device__ __forceinline__ float* of(const ShortConvParams& p, int branch, int t) const {
    return stats + (t * p.branches + branch) * (p.width + 1);
  }
  __device__ __forceinline__ float* tap_sum(const ShortConvParams& p, int chunk, int branch, int j) const {
    return tap_sums + ((chunk * p.branches + branch) * p.width + j) * p.hidden_size;
  }
};

template <DType kType>
__device__ __forceinline__ const std::byte* grad_row(const ShortConvBwdParams& b, int branch, int t) {
  return static_cast<const std::byte*>(b.grad_out) +
         (t * b.grad_token_stride + branch * b.grad_branch_stride) * dtype_bytes(kType);
}

// d out / d z times the gradient
template <DType kType>
__device__ __forceinline__ float grad_of_z(float z, float grad) {
  const float s = sigmoid<kType>(z);
  return grad * (s * __fmaf_rn(z, 1.0F - s, 1.0F));
}

// grad_out + d xh -> x; mean: over the channels, of dxh * xh
__device__ __forceinline__ float grad_of_x(float grad, float x, float dxh, float inverse_rms, float mean) {
  return __fmaf_rn(inverse_rms, __fmaf_rn(-x * inverse_rms, mean, dxh), grad);
}

}  // namespace
}  // namespace engram_kernels
