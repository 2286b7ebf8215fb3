// The first backward kernel of short_conv: walks like the forward one and leaves the sums over whole rows.
#pragma once

#include "kernels/short_conv/short_conv_bwd_rows_cuda.h"
#include "kernels/short_conv/short_conv_ring_cuda.h"

namespace engram_kernels {
namespace {

inline int stats_bytes(const Plan& plan) {
  return ring_bytes(plan.rows_held, plan.row_bytes, plan.threads) + kGroup * kPartials * static_cast<int>(sizeof(float));
}

// Rows of x lie in a ring, those of grad_out behind it: two groups of slots in turns.
template <DType kType>
struct StatsWalk {
  const ShortConvBwdParams& b;
  const Plan& plan;
  const Saved& saved;
  const Ring<kType>& ring;
  int branch, begin, oldest, first, last;

  __device__ __forceinline__ void fetch(int row, int slot, int grad_slot) const {
    const ShortConvParams& p = b.forward;
    const Span s{0, begin, last, 0, 0};
    for (int i = 0; i < plan.group && row + i < last; ++i) {
      ring.fetch(ring.wrapped(slot + i), input_row<kType>(p, plan, s, branch, row + i));
      if (row + i >= first) ring.fetch(grad_slot + i, grad_row<kType>(b, branch, row + i));
    }
    end_copies();
  }

  // Puts the parts of token t, summed over the warp.
  __device__ __forceinline__ void token(int t, int slot, int grad_slot, const float (&taps)[kTaps][kChannels],
                                        float* partials) const {
    const ShortConvParams& p = b.forward;
    float x[kChannels] = {}, dz[kChannels] = {}, z[kChannels] = {}, parts[kGroup] = {};
    const auto each_tap = [&](auto&& use) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const int back = (kTaps - 1 - j) * p.dilation;
        if (j < kTaps - p.width || t - back < oldest) continue;
        use(j, slot - back + (slot < back ? plan.ring_rows : 0));
      }
    };
    each_tap([&](int j, int from) { ring.add_row(from, taps[j], x, z); });
    ring.load(grad_slot, dz);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) dz[i] = grad_of_z<kType>(z[i], dz[i]);
    each_tap([&](int j, int from) {
      ring.load(from, x);
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum = __fmaf_rn(dz[i] * taps[j][i], x[i], sum);
      parts[j] = sum * ring.norms()[from];
    });
    put_partial(partials, warp_sums(parts));
  }

  __device__ __forceinline__ void save(int row, int count, int slot) const {
    const ShortConvParams& p = b.forward;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (warp == 0 && lane < count && row + lane >= first) {
      *saved.of(p, branch, row + lane) = ring.norms()[ring.wrapped(slot + lane)];
    }
    for (int i = warp; i < count; i += plan.threads / kWarp) {
      if (row + i < first) continue;
      const float part = sum_partials(ring.partials(2 + i));
      const int j = lane / 8 - (kTaps - p.width);
      if (lane % 8 == 0 && j >= 0) saved.of(p, branch, row + i)[1 + j] = part;
    }
  }

  __device__ __forceinline__ void run(const float (&taps)[kTaps][kChannels]) const {
    int slot = 0, grads = plan.ring_rows, other_grads = grads + plan.group;
    fetch(oldest, slot, grads);
    for (int row = oldest; row < last; row += plan.group) {
      const int next = ring.wrapped(slot + plan.group);
      fetch(row + plan.group, next, other_grads);
      wait_for_copies();
      const int count = min(plan.group, last - row);
      ring.norm_group(slot, (1U << count) - 1, 0);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (row + i >= first) token(row + i, ring.wrapped(slot + i), grads + i, taps, ring.partials(2 + i));
      }
      __syncthreads();
      save(row, count, slot);
      slot = next;
      const int swapped = grads;
      grads = other_grads;
      other_grads = swapped;
    }
  }
};

template <DType kType>
__global__ void __launch_bounds__(kMaxThreads, 1)
    short_conv_bwd_stats_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
  const ShortConvParams& p = b.forward;
  count_bad_data(p);
  const int branch = blockIdx.y;
  const Ring<kType> ring{p, plan};
  BlockTokens tokens(p, plan);
  float taps[kTaps][kChannels] = {};
  load_thread_taps<kType>(p, plan, branch * p.hidden_size, taps);
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    const int end = tokens.end_in(p, s);
    const int oldest = max(tokens.next - static_cast<int>(p.reach()), s.begin);
    StatsWalk<kType>{b, plan, saved, ring, branch, s.begin, oldest, tokens.next, end}.run(taps);
    tokens.next = end;
  }
}

}  // namespace
}  // namespace engram_kernels
