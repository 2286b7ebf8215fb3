// The second backward kernel of short_conv: grad_x, and the taps' sums over a chunk of tokens. A thread keeps to itself.
#pragma once

#include "kernels/short_conv/short_conv_bwd_rows_cuda.h"
#include "kernels/short_conv/short_conv_ring_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxTileThreads = 128;

// Bytes of shared memory: rings of x and of grad_out, then of dz in float, then each warp's ring of stats.
inline int grads_bytes(const ShortConvParams& p, const Plan& plan) {
  return plan.rows_held * plan.row_bytes + static_cast<int>(p.reach() + 1) * plan.threads * kChannels * 4 +
         plan.threads / kWarp * plan.ring_rows * (kTaps + 1) * 4;
}

// Rows [oldest, visible) of a sequence, of which tokens [first, last) belong to the chunk; the others only reach them. plan is
// that of a tile of the channels, from vector `tile` on.
template <DType kType>
struct GradsWalk {
  const ShortConvBwdParams& b;
  const Plan& plan;
  const Saved& saved;
  const Ring<kType>& ring;
  int branch, tile, begin, oldest, first, last, visible;

  __device__ __forceinline__ int reach() const { return (b.forward.width - 1) * b.forward.dilation; }
  __device__ __forceinline__ float* stats(int slot) const {
    float* rings = reinterpret_cast<float*>(shared + plan.rows_held * plan.row_bytes) + (reach() + 1) * plan.threads * kChannels;
    return rings + (threadIdx.x / kWarp * plan.ring_rows + slot) * (kTaps + 1);
  }
  __device__ __forceinline__ float4* dz_of(int t) const {
    const int slot = (t - first) % (reach() + 1);
    return reinterpret_cast<float4*>(shared + plan.rows_held * plan.row_bytes) + slot * 2 * plan.threads + threadIdx.x;
  }
  __device__ __forceinline__ int behind(int slot, int back) const { return slot - back + (slot < back ? plan.ring_rows : 0); }

  __device__ __forceinline__ void fetch(int row, int slot) const {
    const ShortConvParams& p = b.forward;
    const Span s{0, begin, visible, 0, 0};
    const int lane = threadIdx.x % kWarp;
    for (int i = 0; i < plan.group && row + i < visible; ++i) {
      const int to = ring.wrapped(slot + i);
      ring.fetch(to, input_row<kType>(p, plan, s, branch, row + i) + tile * 16);
      if (row + i >= first) ring.fetch(plan.ring_rows + to, grad_row<kType>(b, branch, row + i) + tile * 16);
      if (lane <= p.width) {
        const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(stats(to) + lane));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(saved.of(p, branch, row + i) + lane)
                     : "memory");
      }
    }
    end_copies();
  }

  // dz of token t into its ring; its products with the taps' inputs into the sums, where t belongs to the chunk.
  __device__ __forceinline__ void differentiate(int t, int slot, const float (&taps)[kTaps][kChannels],
                                                float (&sums)[kTaps][kChannels]) const {
    const ShortConvParams& p = b.forward;
    float x[kChannels] = {}, z[kChannels] = {}, dz[kChannels] = {};
    const auto each_tap = [&](auto&& use) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const int back = (kTaps - 1 - j) * p.dilation;
        if (j < kTaps - p.width || t - back < oldest) continue;
        const int from = behind(slot, back);
        ring.load(from, x);
        use(j, *stats(from));
      }
    };
    each_tap([&](int j, float norm) { add_tap<kChannels>(taps[j], x, norm, z); });
    ring.load(plan.ring_rows + slot, dz);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) dz[i] = grad_of_z<kType>(z[i], dz[i]);
    dz_of(t)[0] = make_float4(dz[0], dz[1], dz[2], dz[3]);
    dz_of(t)[plan.threads] = make_float4(dz[4], dz[5], dz[6], dz[7]);
    if (t >= last) return;
    each_tap([&](int j, float norm) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sums[j][i] = __fmaf_rn(dz[i], x[i] * norm, sums[j][i]);
    });
  }

  // grad_x of token t, whose row is in `slot`; its last reader has been differentiated.
  __device__ __forceinline__ void write(int t, int slot, const float (&taps)[kTaps][kChannels]) const {
    const ShortConvParams& p = b.forward;
    float x[kChannels] = {}, grad[kChannels] = {}, dxh[kChannels] = {}, mean = 0.0F;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int back = (kTaps - 1 - j) * p.dilation;
      if (j < kTaps - p.width || t + back >= visible) continue;
      mean += stats(ring.wrapped(slot + back))[1 + j - (kTaps - p.width)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 dz = dz_of(t + back)[half * plan.threads];
        float* to = dxh + 4 * half;
        const float* tap = taps[j] + 4 * half;
        to[0] = __fmaf_rn(tap[0], dz.x, to[0]);
        to[1] = __fmaf_rn(tap[1], dz.y, to[1]);
        to[2] = __fmaf_rn(tap[2], dz.z, to[2]);
        to[3] = __fmaf_rn(tap[3], dz.w, to[3]);
      }
    }
    mean *= plan.inverse_size;
    ring.load(slot, x);
    ring.load(plan.ring_rows + slot, grad);
    const float norm = *stats(slot);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) grad[i] = grad_of_x(grad[i], x[i], dxh[i], norm, mean);
    std::byte* out = output_row<kType>(p, b.grad_x, branch, t) + tile * 16;
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (ring.has(v)) store_floats<kType>(out + (threadIdx.x + v * plan.threads) * 16, grad + v * kLanes<kType>);
    }
  }

  // Calls put_aside() before `sums` holds more than kSummedTokens.
  template <class F>
  __device__ __forceinline__ void run(const float (&taps)[kTaps][kChannels], float (&sums)[kTaps][kChannels], int* summed,
                                      const F& put_aside) const {
    int slot = 0;
    fetch(oldest, slot);
    for (int row = oldest; row < last + reach(); row += plan.group) {
      const int next = ring.wrapped(slot + plan.group);
      fetch(row + plan.group, next);
      wait_for_copies();
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < plan.group; ++i) {
        const int t = row + i, at = ring.wrapped(slot + i);
        if (t >= first && t < visible) differentiate(t, at, taps, sums);
        const int done = t - reach();
        if (done >= first && done < last) write(done, behind(at, reach()), taps);
      }
      __syncwarp();  // the next stats overwrite what other lanes have read
      slot = next;
      *summed += plan.group;
      if (*summed < kSummedTokens) continue;
      put_aside();
      *summed = 0;
    }
  }
};

template <DType kType>
__global__ void __launch_bounds__(kMaxTileThreads, 2)
    short_conv_bwd_grads_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
  const ShortConvParams& p = b.forward;
  const int branch = blockIdx.y, tile = blockIdx.z * kVectors<kType> * plan.threads;
  Plan rest = plan;  // of the tile
  rest.vectors = plan.vectors - tile;
  const Ring<kType> ring{p, rest};
  BlockTokens tokens(p, plan);
  float taps[kTaps][kChannels] = {}, sums[kTaps][kChannels] = {};
  const int64_t tile_channel = int64_t{tile} * kLanes<kType>;
  load_thread_taps<kType>(p, rest, branch * p.hidden_size + tile_channel, taps);
  int summed = 0;
  bool stored = false;
  const auto put_aside = [&] {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      if (j < kTaps - p.width) continue;
      float* to = saved.tap_sum(p, blockIdx.x, branch, j - (kTaps - p.width)) + tile_channel;
#pragma unroll
      for (int i = 0; i < kChannels; i += 4) {
        const int vector = threadIdx.x + i / kLanes<kType> * plan.threads;
        if (vector >= rest.vectors) continue;
        auto* sum = reinterpret_cast<float4*>(to + vector * kLanes<kType> + i % kLanes<kType>);
        const float4 before = stored ? *sum : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        *sum =
            make_float4(before.x + sums[j][i], before.y + sums[j][i + 1], before.z + sums[j][i + 2], before.w + sums[j][i + 3]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][i + e] = 0.0F;
      }
    }
    stored = true;
  };
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    const int end = tokens.end_in(p, s), reach = static_cast<int>(p.reach());
    const int oldest = max(tokens.next - reach, s.begin), visible = min(end + reach, s.end);
    const GradsWalk<kType> walk{b, rest, saved, ring, branch, tile, s.begin, oldest, tokens.next, end, visible};
    walk.run(taps, sums, &summed, put_aside);
    tokens.next = end;
  }
  put_aside();
}

}  // namespace
}  // namespace engram_kernels
