// Kernels of the backward pass of gate for any size and alignment, element by element. Included by gate_bwd_cuda.cu only.
//
// Mapping  first the slopes of every (token, branch), a block each; then a thread an element of a token in every branch; then
//          the shares of the weights' gradients, of kPlainChunks chunks of tokens.
// Traffic  hidden and key are read three times, grad_out and value twice, by and large out of the cache.
#pragma once

#include "kernels/gate/gate_row_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kPlainThreads = 128;
constexpr int kPlainChunks = 64;  // of tokens, for the weights

struct Slopes {  // of a (token, branch)
  float a, b, c, gate;
};

__device__ __forceinline__ Slopes slopes_of(const GateParams& p, const float (&sums)[4]) {
  const GateScore score = gate_score(p.options, p.hidden_size, sums[0], sums[1], sums[2]);
  const GateSlopes s = gate_slopes(p.options, p.hidden_size, score, sums[3]);
  return {s.a, s.b, s.c, score.gate};
}

// The slopes of every (token, branch), a block each; zeros for a masked token.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_slopes(const GateBwdParams p, Slopes* slopes) {
  __shared__ float4 partial[kPlainThreads / kWarp];
  const GateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const void* hidden = vector_at<std::byte>(f.hidden, kType, t, m, 0);
    const void* key = vector_at<std::byte>(f.key, kType, t, m, 0);
    const void* grad_out = vector_at<std::byte>(p.grad_out, kType, t, m, 0);
    float sums[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < size && !f.masked(t); i += kPlainThreads) {
      const float h = load_element(hidden, kType, i), k = load_element(key, kType, i);
      const float w = load_element(f.weights.w_hidden, f.weights.dtype, int64_t{m} * size + i) *
                      load_element(f.weights.w_key, f.weights.dtype, int64_t{m} * size + i);
      sums[0] = fmaf(h, k * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(k, k, sums[2]);
      sums[3] = fmaf(load_element(grad_out, kType, i), load_element(f.value, kType, t * f.value_stride + i), sums[3]);
    }
    branch_sums(sums, partial);
    if (threadIdx.x == 0) slopes[t * f.branches + m] = f.masked(t) ? Slopes{0, 0, 0, 0} : slopes_of(f, sums);
    __syncthreads();
  }
}

// A thread takes an element of a token in every branch.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_elements(const GateBwdParams p, const Slopes* slopes) {
  const GateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size);
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const bool masked = f.masked(t);
#pragma unroll 1
    for (int i = blockIdx.y * kPlainThreads + threadIdx.x; i < size; i += gridDim.y * kPlainThreads) {
      float grad_value = 0;
#pragma unroll 1
      for (int m = 0; m < f.branches; ++m) {
        const float g = load_element(vector_at<std::byte>(p.grad_out, kType, t, m, 0), kType, i);
        float to_hidden = f.options.add_residual ? g : 0.0F, to_key = 0;
        if (!masked) {
          const Slopes s = slopes[t * f.branches + m];
          const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
          const float k = load_element(vector_at<std::byte>(f.key, kType, t, m, 0), kType, i);
          const float w = load_element(f.weights.w_hidden, f.weights.dtype, int64_t{m} * size + i) *
                          load_element(f.weights.w_key, f.weights.dtype, int64_t{m} * size + i);
          to_hidden = fmaf(s.a * w, k, fmaf(-s.b, h, to_hidden));
          to_key = fmaf(w, s.a * h, -s.c * k);
          grad_value += s.gate * g;
        }
        store_element(vector_at<std::byte>(p.grad_hidden, kType, t, m, 0), kType, i, to_hidden);
        store_element(vector_at<std::byte>(p.grad_key, kType, t, m, 0), kType, i, to_key);
      }
      store_element(p.grad_value, kType, t * size + i, grad_value);
    }
  }
}

// The shares of kPlainChunks chunks of tokens, whose bounds depend on the number of tokens only.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_shares(const GateBwdParams p, const Slopes* slopes, float* shares) {
  const GateParams& f = p.forward;
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
    sum = fmaf(slopes[t * f.branches + m].a * h, load_element(vector_at<std::byte>(f.key, kType, t, m, 0), kType, i), sum);
  }
  shares[(int64_t{blockIdx.z} * f.branches + m) * size + i] = sum;
}

template <DType kType>
void launch_plain(const GateBwdParams& p, cudaStream_t stream) {
  const GateParams& f = p.forward;
  auto* slopes = static_cast<Slopes*>(p.scratch);
  auto* shares = reinterpret_cast<float*>(slopes + f.num_tokens * f.branches);
  const auto branches = static_cast<unsigned>(f.branches);
  const auto columns = static_cast<unsigned>(ceil_div(f.hidden_size, int64_t{kPlainThreads}));
  const auto tokens = static_cast<unsigned>(std::min(f.num_tokens, int64_t{num_multiprocessors()} * 16));
  gate_bwd_slopes<kType><<<dim3(tokens, branches), kPlainThreads, 0, stream>>>(p, slopes);
  gate_bwd_elements<kType><<<dim3(tokens, std::min(columns, 64U)), kPlainThreads, 0, stream>>>(p, slopes);
  gate_bwd_shares<kType><<<dim3(columns, branches, kPlainChunks), kPlainThreads, 0, stream>>>(p, slopes, shares);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace engram_kernels
