// The plain kernel of short_conv takes the cases that the fast ones do not: unaligned rows, more than kTaps
// taps, rows that are too long for registers. It reads rows once for the norm and once more, from L1 or L2,
// for every tap. The backward kernels for the same cases (short_conv_bwd_cuda.cu) use its way of reading
// rows.
#pragma once

#include "kernels/short_conv/short_conv_cuda.h"

namespace engram_kernels {
namespace {

template <DType kType>
__device__ __forceinline__ float load_element(const void* from, int64_t i) {
  if constexpr (kType == DType::kF32) {
    return static_cast<const float*>(from)[i];
  } else {
    float value, unused;
    unpack_pair<kType>(static_cast<const uint16_t*>(from)[i], &value, &unused);
    return value;
  }
}

template <DType kType>
__device__ __forceinline__ void store_element(float value, void* to, int64_t i) {
  if constexpr (kType == DType::kF32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pack_pair<kType>(value, 0.0F));
  }
}

// Element i of a weight, or of another array of the weights' dtype.
template <DType kType>
__device__ __forceinline__ float load_weight(const ShortConvParams& p, const void* from, int64_t i) {
  return p.weight_dtype == DType::kF32 ? load_element<DType::kF32>(from, i) : load_element<kType>(from, i);
}

// The norm weight times tap j; `channel` counts over all branches.
template <DType kType>
__device__ __forceinline__ float folded_tap(const ShortConvParams& p, int64_t channel, int j) {
  return load_weight<kType>(p, p.weight, channel * p.width + j) * load_weight<kType>(p, p.norm_weight, channel);
}

// Loads kLanes elements of a row from a channel on, with zeros behind the row's end.
template <DType kType>
__device__ __forceinline__ void load_lanes(const ShortConvParams& p, const Plan& plan, const std::byte* row, int64_t channel,
                                           float* values) {
  if (plan.aligned) return load_floats<kType, kLanes<kType>>(row + channel * dtype_bytes(kType), values);
#pragma unroll
  for (int i = 0; i < kLanes<kType>; ++i) values[i] = channel + i < p.hidden_size ? load_element<kType>(row, channel + i) : 0.0F;
}

template <DType kType>
__device__ __forceinline__ void store_lanes(const ShortConvParams& p, const Plan& plan, const float* values, std::byte* row,
                                            int64_t channel) {
  if (plan.aligned) return store_floats<kType>(row + channel * dtype_bytes(kType), values);
#pragma unroll
  for (int i = 0; i < kLanes<kType>; ++i) {
    if (channel + i < p.hidden_size) store_element<kType>(values[i], row, channel + i);
  }
}

template <DType kType>
__device__ __forceinline__ void copy_lanes(const ShortConvParams& p, const Plan& plan, const std::byte* from, std::byte* to,
                                           int64_t channel) {
  using Element = std::conditional_t<kType == DType::kF32, uint32_t, uint16_t>;  // bits: a NaN keeps its payload
  for (int i = 0; i < kLanes<kType>; ++i) {
    if (channel + i < p.hidden_size) {
      reinterpret_cast<Element*>(to)[channel + i] = reinterpret_cast<const Element*>(from)[channel + i];
    }
  }
}

// Shared memory: two copies of the partial sums, and the norms of a token's rows for each warp.
struct PlainMemory {
  float partials[2][kPartials];
  float norms[kMaxThreads / kWarp][kMaxTaps];
};

// The rows that the taps of a token read. Bit j of `there` says whether tap j has a row.
template <DType kType>
struct Reached {
  const ShortConvParams& p;
  const Plan& plan;
  const Span& s;
  int branch, t;
  unsigned there;
  float* norms;

  __device__ __forceinline__ Reached(const ShortConvParams& p, const Plan& plan, const Span& s, int branch, int t,
                                     PlainMemory* memory)
      : p(p), plan(plan), s(s), branch(branch), t(t), there(0), norms(memory->norms[threadIdx.x / kWarp]) {
#pragma unroll 1
    for (int j = 0; j < p.width; ++j) {
      if (t - p.back(j) >= s.begin - s.before) there |= 1U << j;
    }
  }
  __device__ __forceinline__ bool has(int j) const { return (there >> j & 1) != 0; }
  __device__ __forceinline__ const std::byte* row(int j) const {
    return input_row<kType>(p, plan, s, branch, static_cast<int>(t - p.back(j)));
  }

  // Fills `norms`; `parity` says which partial sums are free.
  __device__ __forceinline__ void norm(PlainMemory* memory, int* parity) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int first = 0; first < p.width; first += kGroup) {
      float sums[kGroup] = {}, x[kLanes<kType>];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (!has(first + i)) continue;
        const std::byte* from = row(first + i);
#pragma unroll 1
        for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
          load_lanes<kType>(p, plan, from, int64_t{vector} * kLanes<kType>, x);
          sums[i] = add_squares<kLanes<kType>>(x, sums[i]);
        }
      }
      const float norm = inverse_rms(block_sums(sums, memory->partials[*parity]), p, plan);
      *parity ^= 1;
      if (lane % 8 == 0) norms[first + lane / 8] = norm;
      __syncwarp();
    }
  }

  // Computes z of kLanes channels.
  __device__ __forceinline__ void convolve(int64_t channel, float* z) const {
#pragma unroll
    for (int i = 0; i < kLanes<kType>; ++i) z[i] = 0.0F;
#pragma unroll 1
    for (int j = 0; j < p.width; ++j) {
      if (!has(j)) continue;  // not a zero: the weight may be Inf
      float x[kLanes<kType>], taps[kLanes<kType>];
      load_lanes<kType>(p, plan, row(j), channel, x);
      load_taps_of(j, channel, taps);
      add_tap<kLanes<kType>>(taps, x, norms[j], z);
    }
  }
  __device__ __forceinline__ void load_taps_of(int j, int64_t channel, float* taps) const {
#pragma unroll
    for (int i = 0; i < kLanes<kType>; ++i) {
      taps[i] = channel + i < p.hidden_size ? folded_tap<kType>(p, branch * p.hidden_size + channel + i, j) : 0.0F;
    }
  }
};

// Like `skip`, for rows that need not be aligned.
template <DType kType>
__device__ __forceinline__ int skip_lanes(const ShortConvParams& p, const Plan& plan, int branch, int first, int last) {
  const float zeros[kLanes<kType>] = {};
#pragma unroll 1
  for (int t = first; t < last; ++t) {
#pragma unroll 1
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
      store_lanes<kType>(p, plan, zeros, output_row<kType>(p, p.out, branch, t), int64_t{vector} * kLanes<kType>);
    }
  }
  return last;
}

template <DType kType>
__global__ void __launch_bounds__(kMaxThreads, 1) short_conv_plain_kernel(const ShortConvParams p, const Plan plan) {
  __shared__ PlainMemory memory;
  count_bad_data(p);
  const int branch = blockIdx.y;
  BlockTokens tokens(p, plan);
  int parity = 0;
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    if (s.ring < 0) {
      tokens.next = skip_lanes<kType>(p, plan, branch, tokens.next, min(s.end, tokens.last));
      continue;
    }
    const bool mine = tokens.begins_in(p, s), owns = tokens.owns(p, s);
    const int end = mine ? tokens.end_in(p, s) : max(tokens.next, s.end);
#pragma unroll 1
    for (int t = mine ? tokens.next : end; t < end; ++t) {
      const Reached<kType> reached(p, plan, s, branch, t, &memory);
      reached.norm(&memory, &parity);
      const std::byte* own = input_row<kType>(p, plan, s, branch, t);
      std::byte* state = owns && writes_state(p, s, t) ? state_row<kType>(p, plan, s, branch, t) : nullptr;
#pragma unroll 1
      for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
        const int64_t channel = int64_t{vector} * kLanes<kType>;
        float x[kLanes<kType>], z[kLanes<kType>];
        reached.convolve(channel, z);
        load_lanes<kType>(p, plan, own, channel, x);
        finish<kType, kLanes<kType>>(x, z);
        store_lanes<kType>(p, plan, z, output_row<kType>(p, p.out, branch, t), channel);
        if (state != nullptr) copy_lanes<kType>(p, plan, own, state, channel);
      }
    }
    if (mine && owns) {
#pragma unroll 1
      for (int t = first_copied(p, s, end); t < s.end; ++t) {
#pragma unroll 1
        for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
          copy_lanes<kType>(p, plan, input_row<kType>(p, plan, s, branch, t), state_row<kType>(p, plan, s, branch, t),
                            int64_t{vector} * kLanes<kType>);
        }
      }
    }
    tokens.next = end;
  }
}

}  // namespace
}  // namespace engram_kernels
