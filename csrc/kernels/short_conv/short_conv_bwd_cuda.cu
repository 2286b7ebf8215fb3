// CUDA kernels of short_conv, backward. Contract: short_conv.h; formulas: short_conv_bwd_cpu.cpp.
//
// There are three launches:
//   1. stats    walks like the forward kernel and leaves the sums over whole rows: norms, and parts of the
//               norm's gradient.
//   2. grads    computes grad_x and the taps' sums, by tiles of channels and chunks of tokens.
//   3. weights  adds the chunks' sums in order and writes the weights' gradients.
// The first two have a plain form for cases that the fast one does not take: see short_conv_plain_cuda.h. The
// order of all sums depends on the sizes and the number of multiprocessors alone, so every run gives the same
// bits.
//
// Traffic: at least x and grad_out are read once and grad_x is written once, 3 rows per token and branch.
// Here x and grad_out are read twice: 5 rows (1.67x), plus the rows that blocks reach to in front and behind,
// plus (width + 1) * 4 B of stats three times. One pass would have to hold x, grad_out and dz in float over
// the reach for whole rows: 8 B per channel and token of the reach. A multiprocessor has that for rows of
// 2,000 channels, not of 5,120.
#include "kernels/short_conv/short_conv_cuda.h"
#include "kernels/short_conv/short_conv_plain_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kSummedTokens = 64;  // so many are added one after another; their sums are added in turn
constexpr int kMaxTileThreads = 128;
constexpr int kPlainThreads = 256;
constexpr int kElementThreads = 128;
constexpr int kSumThreads = 128;
constexpr int kMinChunk = 32;

// Scratch memory, written by one launch for the next. The gradient of the norm needs a mean over all channels
// of token t, which is a sum over the taps' readers:
//   sum of dxh * xh = sum over j of part[t + back(j)][j],  part[u][j] = sum over channels of dz[u] * tap j *
//   xh[u - back(j)]
// and part[u] needs only inputs at or before u. So the first kernel sums it over whole rows, and the second
// may split rows.
struct Saved {
  float* stats;     // [num_tokens, branches, 1 + width]: the inverse root mean square, then part
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

// The gradient of z, from that of silu(z).
template <DType kType>
__device__ __forceinline__ float grad_of_z(float z, float grad) {
  const float s = sigmoid<kType>(z);
  return grad * (s * __fmaf_rn(z, 1.0F - s, 1.0F));
}

// grad_out plus what comes through the norm; `mean` is the mean of dxh * xh over the channels.
__device__ __forceinline__ float grad_of_x(float grad, float x, float dxh, float inverse_rms, float mean) {
  return __fmaf_rn(inverse_rms, __fmaf_rn(-x * inverse_rms, mean, dxh), grad);
}

inline int stats_bytes(const Plan& plan) {
  return ring_bytes(plan.rows_held, plan.row_bytes, plan.threads) + kGroup * kPartials * static_cast<int>(sizeof(float));
}

// Rows of x lie in a ring. Rows of grad_out lie behind it, in two groups of slots that take turns.
template <DType kType>
struct StatsWalk {
  const ShortConvBwdParams& b;
  const Plan& plan;
  const Saved& saved;
  const Ring<kType>& ring;
  int branch, begin, oldest, first, last;

  __device__ __forceinline__ void fetch(int row, int slot, int grad_slot) const {
    const ShortConvParams& p = b.forward;
    const Span s{begin, last, 0, 0, 0};
    for (int i = 0; i < plan.group && row + i < last; ++i) {
      ring.fetch(ring.wrapped(slot + i), input_row<kType>(p, plan, s, branch, row + i));
      if (row + i >= first) ring.fetch(grad_slot + i, grad_row<kType>(b, branch, row + i));
    }
    end_copies();
  }

  // Puts the parts of token t, summed over the warp, among the partial sums.
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

// Bytes of shared memory: rings of x and of grad_out, then one of dz in float, then a ring of stats for each
// warp.
inline int grads_bytes(const ShortConvParams& p, const Plan& plan) {
  return plan.rows_held * plan.row_bytes + static_cast<int>(p.reach() + 1) * plan.threads * kChannels * 4 +
         plan.threads / kWarp * plan.ring_rows * (kTaps + 1) * 4;
}

// Walks over rows [oldest, visible) of a sequence. Tokens [first, last) belong to the chunk; the others only
// reach them. `plan` is that of a tile of the channels, which begins at vector `tile`.
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
    const Span s{begin, visible, 0, 0, 0};
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

  // Puts dz of token t into its ring, and adds its products with the taps' inputs to the sums where t belongs
  // to the chunk.
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

  // Writes grad_x of token t, whose row is in `slot`, once its last reader has been differentiated.
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

// The plain form of short_conv_bwd_stats_kernel reads every row from memory.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 1)
    short_conv_bwd_stats_plain_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
  __shared__ PlainMemory memory;
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

// One channel of a sequence: its normalized inputs, and the gradient of z, which is computed again for every
// reader.
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

// The plain form of short_conv_bwd_grads_kernel: a thread has one channel.
template <DType kType>
__global__ void __launch_bounds__(kElementThreads, 4)
    short_conv_bwd_grads_plain_kernel(const ShortConvBwdParams b, const Plan plan, const Saved saved) {
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

// Writes grad_weight and grad_norm_weight from the sums over the chunks. Both are sums of dz * xh, since
// sum of dn[t] * xh[t] = sum over j of weight[j] * sum over t of dz[t] * xh[t - back(j)].
template <DType kType>
__global__ void __launch_bounds__(kSumThreads) short_conv_bwd_weights_kernel(const ShortConvBwdParams b, const Saved saved) {
  const ShortConvParams& p = b.forward;
  const int64_t channel = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const int branch = blockIdx.y;
  if (channel >= p.hidden_size) return;
  const int64_t at = branch * p.hidden_size + channel;
  const float norm_weight = load_weight<kType>(p, p.norm_weight, at);
  float norm_grad = 0.0F;
  const auto store = [&](float value, void* to, int64_t i) {
    p.weight_dtype == DType::kF32 ? store_element<DType::kF32>(value, to, i) : store_element<kType>(value, to, i);
  };
#pragma unroll 1
  for (int j = 0; j < p.width; ++j) {
    float sum = 0.0F;
#pragma unroll 4
    for (int chunk = 0; chunk < saved.chunks; ++chunk) sum += saved.tap_sum(p, chunk, branch, j)[channel];
    store(sum * norm_weight, b.grad_weight, at * p.width + j);
    norm_grad = __fmaf_rn(load_weight<kType>(p, p.weight, at * p.width + j), sum, norm_grad);
  }
  store(norm_grad, b.grad_norm_weight, at);
}

struct BwdPlan {
  Plan stats, grads;
  bool stats_in_ring, grads_in_ring;
  int tiles;
  Saved saved;
  int64_t scratch_bytes;
};

// Whether the rows within reach fit into shared memory.
template <DType kType>
bool plan_stats(const ShortConvParams& p, Plan* plan) {
  if (!plan->aligned || !fits_registers<kType>(p, *plan) || p.reach() * plan->row_bytes > kSharedBytesOfSm) return false;
  for (plan->group = kGroup; plan->group > 0; plan->group /= 2) {
    plan->ring_rows = static_cast<int>(p.reach()) + 2 * plan->group;
    plan->rows_held = plan->ring_rows + 2 * plan->group;
    plan->shared_bytes = stats_bytes(*plan);
    if (plan->shared_bytes > max_shared_bytes()) continue;
    plan->tokens = std::max({even_tokens<kType>(p, *plan), static_cast<int>(p.reach()), kGroup});
    return true;
  }
  return false;
}

// Whether there are tiles of the channels whose rows within reach fit into shared memory.
template <DType kType>
bool plan_grads(const ShortConvParams& p, Plan* plan, int* tiles) {
  if (!plan->aligned || p.width > kTaps || p.reach() * kWarp * 16 > kSharedBytesOfSm) return false;
  const int needed = static_cast<int>(ceil_div(ceil_div(plan->vectors, kVectors<kType>), kWarp)) * kWarp;
  plan->group = 2;
  plan->ring_rows = static_cast<int>(p.reach()) + 2 * plan->group;
  plan->rows_held = 2 * plan->ring_rows;
  for (plan->threads = std::min(needed, kMaxTileThreads); plan->threads >= kWarp; plan->threads -= kWarp) {
    plan->row_bytes = plan->threads * kVectors<kType> * 16;
    plan->shared_bytes = grads_bytes(p, *plan);
    if (plan->shared_bytes <= max_shared_bytes()) break;
  }
  if (plan->threads < kWarp) return false;
  *tiles = static_cast<int>(ceil_div(plan->vectors, plan->threads * kVectors<kType>));
  return true;
}

int chunk_tokens(const ShortConvParams& p, const Plan& plan, int tiles) {
  const int blocks_of_sm = std::clamp(kSharedBytesOfSm / (plan.shared_bytes + kReservedSharedBytes), 1, kMaxBlocksOfSm);
  const int64_t even = ceil_div(p.num_tokens * p.branches * tiles, int64_t{blocks_of_sm} * num_multiprocessors());
  return static_cast<int>(std::max({even, 2 * p.reach() < p.num_tokens ? 2 * p.reach() : p.num_tokens, int64_t{kMinChunk}}));
}

template <DType kType>
BwdPlan make_bwd_plan(const ShortConvBwdParams& b) {
  const ShortConvParams& p = b.forward;
  BwdPlan plan{};
  plan.stats = make_plan<kType>(p, kMaxThreads);
  plan.stats.aligned &= all_aligned(p.dtype, {b.grad_token_stride, b.grad_branch_stride}, {b.grad_out, b.grad_x});
  plan.grads = plan.stats;
  plan.stats_in_ring = plan_stats<kType>(p, &plan.stats);
  if (!plan.stats_in_ring) {
    plan.stats = make_plan<kType>(p, kPlainThreads);
    plan.stats.aligned = plan.grads.aligned;
    plan.stats.tokens = even_tokens<kType>(p, plan.stats);
  }
  plan.grads_in_ring = plan_grads<kType>(p, &plan.grads, &plan.tiles);
  if (!plan.grads_in_ring) {
    plan.grads.shared_bytes = 0;
    plan.grads.threads = kElementThreads;
    plan.tiles = static_cast<int>(ceil_div(p.hidden_size, kElementThreads));
  }
  plan.grads.tokens = plan.saved.chunk_tokens = chunk_tokens(p, plan.grads, plan.tiles);
  plan.saved.chunks = static_cast<int>(ceil_div(p.num_tokens, plan.grads.tokens));
  const int64_t stats = ceil_div(p.num_tokens * p.branches * (p.width + 1), 4) * 4;
  plan.scratch_bytes = 4 * (stats + plan.saved.chunks * p.branches * p.width * p.hidden_size);
  plan.saved.stats = static_cast<float*>(b.scratch);
  plan.saved.tap_sums = plan.saved.stats + stats;
  return plan;
}

template <DType kType>
void launch(const ShortConvBwdParams& b, cudaStream_t stream) {
  const ShortConvParams& p = b.forward;
  const BwdPlan plan = make_bwd_plan<kType>(b);
  const auto sum_blocks = dim3(static_cast<unsigned>(ceil_div(p.hidden_size, kSumThreads)), static_cast<unsigned>(p.branches));
  if (p.num_tokens > 0) {
    launch_blocks(plan.stats_in_ring ? short_conv_bwd_stats_kernel<kType> : short_conv_bwd_stats_plain_kernel<kType>,
                  blocks_of(p, plan.stats), plan.stats.threads, plan.stats.shared_bytes, stream, b, plan.stats, plan.saved);
    dim3 blocks = blocks_of(p, plan.grads);
    blocks.z = static_cast<unsigned>(plan.tiles);
    launch_blocks(plan.grads_in_ring ? short_conv_bwd_grads_kernel<kType> : short_conv_bwd_grads_plain_kernel<kType>, blocks,
                  plan.grads.threads, plan.grads.shared_bytes, stream, b, plan.grads, plan.saved);
  }
  launch_blocks(short_conv_bwd_weights_kernel<kType>, sum_blocks, kSumThreads, 0, stream, b, plan.saved);
}

template <class F>
auto with_type(DType dtype, const F& f) {
  if (dtype == DType::kF32) return f(std::integral_constant<DType, DType::kF32>{});
  if (dtype == DType::kBf16) return f(std::integral_constant<DType, DType::kBf16>{});
  return f(std::integral_constant<DType, DType::kF16>{});
}

}  // namespace

int64_t short_conv_bwd_cuda_scratch_bytes(const ShortConvBwdParams& p) {
  check_launch(p.forward);
  return with_type(p.forward.dtype, [&](auto type) { return make_bwd_plan<type.value>(p).scratch_bytes; });
}

void short_conv_bwd_cuda(const ShortConvBwdParams& p, void* stream) {
  check_launch(p.forward);
  EK_CHECK(p.forward.state == nullptr, "short_conv_bwd: state is given, expected none");
  with_type(p.forward.dtype, [&](auto type) { launch<type.value>(p, static_cast<cudaStream_t>(stream)); });
}

}  // namespace engram_kernels
