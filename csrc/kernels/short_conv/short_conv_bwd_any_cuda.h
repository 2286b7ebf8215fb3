// The backward kernels of short_conv for what the others do not take: see short_conv_any_cuda.h.
#pragma once

#include "kernels/short_conv/short_conv_any_cuda.h"
#include "kernels/short_conv/short_conv_bwd_rows_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kAnyThreads = 256;
constexpr int kElementThreads = 128;

// As short_conv_bwd_stats_kernel, from memory.
template <DType kType>
__global__ void __launch_bounds__(kAnyThreads, 1)
    short_conv_bwd_stats_any_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
  __shared__ AnyMemory memory;
  const ShortConvParams& p = b.forward;
  constexpr int kCount = kLanes<kType>;
  count_bad_data(p);
  const int branch = blockIdx.y, lane = threadIdx.x % kWarp;
  const BlockTokens tokens(p, plan);
  int parity = 0;
#pragma unroll 1
  for (int t = tokens.next; t < tokens.last; ++t) {
    const Span s = span_of(p, plan, t);
    const Reached<kType> reached(p, plan, s, branch, t, &memory);
    reached.norm(&memory, &parity);
    float parts[kMaxTaps / kGroup][kGroup] = {};
#pragma unroll 1
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
      const int64_t channel = int64_t{vector} * kCount;
      float dz[kCount], z[kCount], x[kCount];
      reached.convolve(channel, z);
      load_lanes<kType>(p, plan, grad_row<kType>(b, branch, t), channel, dz);
#pragma unroll
      for (int i = 0; i < kCount; ++i) dz[i] = grad_of_z<kType>(z[i], dz[i]);
#pragma unroll
      for (int j = 0; j < kMaxTaps; ++j) {
        if (!reached.has(j)) continue;
        float sum = 0.0F;
        load_lanes<kType>(p, plan, reached.row(j), channel, x);
        reached.load_taps_of(j, channel, z);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum = __fmaf_rn(dz[i] * z[i], x[i], sum);
        parts[j / kGroup][j % kGroup] = __fmaf_rn(sum, reached.norms[j], parts[j / kGroup][j % kGroup]);
      }
    }
    float* to = saved.of(p, branch, t);
    if (threadIdx.x == 0) *to = reached.norms[p.width - 1];  // the last tap is the token itself
#pragma unroll
    for (int half = 0; half < kMaxTaps / kGroup; ++half) {
      if (half * kGroup >= p.width) break;
      const float part = block_sums(parts[half], memory.partials[parity]);
      parity ^= 1;
      const int j = half * kGroup + lane / 8;
      if (threadIdx.x < kWarp && lane % 8 == 0 && j < p.width) to[1 + j] = part;
    }
  }
}

// One channel of a sequence: its inputs, normalized, and the gradient of z, which is computed again for every reader.
template <DType kType>
struct Channel {
  const ShortConvBwdParams& b;
  const Saved& saved;
  int branch;
  int64_t channel;
  float taps[kMaxTaps];

  __device__ __forceinline__ float input(int t) const {
    const ShortConvParams& p = b.forward;
    return load_element<kType>(p.x, t * p.x_token_stride + branch * p.x_branch_stride + channel);
  }
  __device__ __forceinline__ float grad(int t) const { return load_element<kType>(grad_row<kType>(b, branch, t), channel); }
  __device__ __forceinline__ float normalized(int t) const { return input(t) * *saved.of(b.forward, branch, t); }
  __device__ __forceinline__ float dz(const Span& s, int t) const {
    float z = 0.0F;
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      const int64_t from = t - b.forward.back(j);
      if (j < b.forward.width && from >= s.begin) z = __fmaf_rn(taps[j], normalized(static_cast<int>(from)), z);
    }
    return grad_of_z<kType>(z, grad(t));
  }
};

// As short_conv_bwd_grads_kernel: a thread has a channel.
template <DType kType>
__global__ void __launch_bounds__(kElementThreads, 4)
    short_conv_bwd_grads_any_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
  const ShortConvParams& p = b.forward;
  const int64_t wanted = int64_t{blockIdx.z} * kElementThreads + threadIdx.x;
  const bool there = wanted < p.hidden_size;  // the others go along: a warp looks for sequences together
  Channel<kType> c{b, saved, static_cast<int>(blockIdx.y), there ? wanted : p.hidden_size - 1, {}};
  float sums[kMaxTaps] = {};
#pragma unroll
  for (int j = 0; j < kMaxTaps; ++j) {
    if (j < p.width) c.taps[j] = folded_tap<kType>(p, c.branch * p.hidden_size + c.channel, j);
  }
  const BlockTokens tokens(p, plan);
  const int first = tokens.next;
#pragma unroll 1
  for (int t = first; t < tokens.last; ++t) {
    const Span s = span_of(p, plan, t);
    const float dz = c.dz(s, t), *stats = saved.of(p, c.branch, t);
    float dxh = 0.0F, mean = 0.0F;
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      const int64_t from = t - p.back(j), reader = t + p.back(j);
      if (j < p.width && from >= s.begin) sums[j] = __fmaf_rn(dz, c.normalized(static_cast<int>(from)), sums[j]);
      if (j >= p.width || reader >= s.end) continue;
      dxh = __fmaf_rn(c.taps[j], c.dz(s, static_cast<int>(reader)), dxh);
      mean += saved.of(p, c.branch, static_cast<int>(reader))[1 + j];
    }
    const float grad = grad_of_x(c.grad(t), c.input(t), dxh, *stats, mean * plan.inverse_size);
    if (there) store_element<kType>(grad, output_row<kType>(p, b.grad_x, c.branch, t), c.channel);
    if ((t - first) % kSummedTokens != kSummedTokens - 1 && t != tokens.last - 1) continue;
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      if (j >= p.width || !there) continue;
      float* sum = saved.tap_sum(p, blockIdx.x, c.branch, j) + c.channel;
      *sum = t - first < kSummedTokens ? sums[j] : *sum + sums[j];
      sums[j] = 0.0F;
    }
  }
}

}  // namespace
}  // namespace engram_kernels
