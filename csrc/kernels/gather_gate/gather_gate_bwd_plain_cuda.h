// The backward pass of gather_gate for any size and alignment, element by element. Included by gather_gate_bwd_cuda.cu only.
#pragma once

#include "kernels/gather_gate/gather_gate_block_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kPlainThreads = 128;
constexpr int kPlainChunks = 64;  // of tokens, for the weights

struct Slopes {  // of a (token, branch)
  float a, b, c, gate;
};

// sums: dot, hidden^2, key^2, grad_out . value
__device__ __forceinline__ Slopes slopes_of(const GatherGateParams& p, const float (&sums)[4]) {
  const GateScore score = gate_score(p.options, p.hidden_size, sums[0], sums[1], sums[3]);
  const GateSlopes s = gate_slopes(p.options, p.hidden_size, score, sums[2]);
  return {s.a, s.b, s.c, score.gate};
}

__device__ __forceinline__ float product(const GateWeights& w, int64_t element) {
  return load_element(w.w_hidden, w.dtype, element) * load_element(w.w_key, w.dtype, element);
}

// The slopes of every (token, branch), a block each; zeros for a masked token.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gather_gate_bwd_slopes(const GatherGateBwdParams p, Slopes* slopes) {
  __shared__ float4 partial[kPlainThreads / kWarp];
  const GatherGateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const void* hidden = vector_at<std::byte>(f.hidden, kType, t, m, 0);
    const void* grad_out = vector_at<std::byte>(p.grad_out, kType, t, m, 0);
    float sums[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < size && !f.masked(t); i += kPlainThreads) {
      const float h = load_element(hidden, kType, i), e = memory_element(f, t, i);
      sums[0] = fmaf(h, e * product(f.weights, int64_t{m} * size + i), sums[0]), sums[1] = fmaf(h, h, sums[1]);
      sums[2] = fmaf(load_element(grad_out, kType, i), e, sums[2]), sums[3] = fmaf(e, e, sums[3]);
    }
    branch_sums(sums, partial);
    if (threadIdx.x == 0) slopes[t * f.branches + m] = f.masked(t) ? Slopes{0, 0, 0, 0} : slopes_of(f, sums);
    __syncthreads();
  }
}

// A thread takes an element of a token in every branch.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gather_gate_bwd_elements(const GatherGateBwdParams p, const Slopes* slopes) {
  const GatherGateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size);
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const bool masked = f.masked(t);
#pragma unroll 1
    for (int i = blockIdx.y * kPlainThreads + threadIdx.x; i < size; i += gridDim.y * kPlainThreads) {
      const float e = masked ? 0.0F : memory_element(f, t, i);
      float grad_e = 0;
#pragma unroll 1
      for (int m = 0; m < f.branches; ++m) {
        const float g = load_element(vector_at<std::byte>(p.grad_out, kType, t, m, 0), kType, i);
        float to_hidden = f.options.add_residual ? g : 0.0F;
        if (!masked) {
          const Slopes s = slopes[t * f.branches + m];
          const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
          const float aw = s.a * product(f.weights, int64_t{m} * size + i);
          to_hidden = fmaf(aw, e, fmaf(-s.b, h, to_hidden));
          grad_e = fmaf(s.gate, g, fmaf(aw, h, fmaf(-s.c, e, grad_e)));
        }
        store_element(vector_at<std::byte>(p.grad_hidden, kType, t, m, 0), kType, i, to_hidden);
      }
      store_element(p.grad_rows, kType, t * size + i, grad_e);
    }
  }
}

// The shares of kPlainChunks chunks of tokens, whose bounds depend on the number of tokens only.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8)
    gather_gate_bwd_shares(const GatherGateBwdParams p, const Slopes* slopes, float* shares) {
  const GatherGateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
  const int64_t chunk = ceil_div(f.num_tokens, int64_t{kPlainChunks});
  const int64_t begin = blockIdx.z * chunk, end = begin + chunk < f.num_tokens ? begin + chunk : f.num_tokens;
  const int i = blockIdx.x * kPlainThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    if (f.masked(t)) continue;
    const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
    sum = fmaf(slopes[t * f.branches + m].a * h, memory_element(f, t, i), sum);
  }
  shares[(int64_t{blockIdx.z} * f.branches + m) * size + i] = sum;
}

// Weight gradients out of the shares [count][branches * hidden_size]; `planes` float4 planes a row, or 0 for rows as they are.
__global__ void __launch_bounds__(kPlainThreads)
    gather_gate_bwd_weights(const GatherGateBwdParams p, const float* shares, int count, int planes) {
  const GatherGateParams& f = p.forward;
  const int64_t weights = f.branches * f.hidden_size;
  const int64_t i = int64_t{blockIdx.x} * kPlainThreads + threadIdx.x;  // where the share lies
  if (i >= weights) return;
  float sum = 0;
#pragma unroll 8
  for (int n = 0; n < count; ++n) sum += shares[n * weights + i];
  int64_t element = i;
  if (planes > 0) {
    const int size = static_cast<int>(f.hidden_size), row = static_cast<int>(i) / size, at = static_cast<int>(i) % size;
    const int plane = at / (size / planes), in_plane = at % (size / planes);
    element = int64_t{row} * size + in_plane / 4 * (4 * planes) + plane * 4 + in_plane % 4;
  }
  const DType dtype = f.weights.dtype;
  store_element(p.grad_w_hidden, dtype, element, sum * load_element(f.weights.w_key, dtype, element));
  store_element(p.grad_w_key, dtype, element, sum * load_element(f.weights.w_hidden, dtype, element));
}

}  // namespace
}  // namespace engram_kernels
