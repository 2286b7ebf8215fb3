// The kernel of short_conv for what the others do not take: rows off 16-byte boundaries, more than kTaps taps, long rows.
#pragma once

#include "kernels/short_conv/short_conv_rows_cuda.h"

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

// A weight, or anything else of the weights' dtype.
template <DType kType>
__device__ __forceinline__ float load_weight(const ShortConvParams& p, const void* from, int64_t i) {
  return p.weight_dtype == DType::kF32 ? load_element<DType::kF32>(from, i) : load_element<kType>(from, i);
}

// The norm weight times tap j of a channel of all branches.
template <DType kType>
__device__ __forceinline__ float folded_tap(const ShortConvParams& p, int64_t channel, int j) {
  return load_weight<kType>(p, p.weight, channel * p.width + j) * load_weight<kType>(p, p.norm_weight, channel);
}

// kLanes elements of a row from a channel on; zeros behind its end.
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

// The rows that the taps of a token read, null where there is none, and their inverse root mean squares.
struct Reached {
  const std::byte* rows[kMaxTaps];
  float norms[kMaxTaps];
};

template <DType kType>
__device__ __forceinline__ Reached reach(const ShortConvParams& p, const Plan& plan, const Span& s, int branch, int t) {
  Reached r;
#pragma unroll
  for (int j = 0; j < kMaxTaps; ++j) {
    const int64_t from = t - p.back(j);
    r.rows[j] = j < p.width && from >= s.begin - s.before ? input_row<kType>(p, plan, s, branch, from) : nullptr;
  }
  return r;
}

// Sums over the block; `parity` says which of the two arrays of partial sums is free.
template <DType kType>
__device__ __forceinline__ void norm_reached(const ShortConvParams& p, const Plan& plan, float (*partials)[kPartials],
                                             int* parity, Reached* r) {
#pragma unroll
  for (int half = 0; half < kMaxTaps / kGroup; ++half) {
    if (half * kGroup >= p.width) break;
    float sums[kGroup] = {}, x[kLanes<kType>];
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const std::byte* row = r->rows[half * kGroup + i];
        if (row == nullptr) continue;
        load_lanes<kType>(p, plan, row, int64_t{vector} * kLanes<kType>, x);
        sums[i] = add_squares<kLanes<kType>>(x, sums[i]);
      }
    }
    const float norm = inverse_rms(block_sums(sums, partials[*parity]), p, plan);
    *parity ^= 1;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) r->norms[half * kGroup + i] = __shfl_sync(~0U, norm, 8 * i);
  }
}

// z of kLanes channels.
template <DType kType>
__device__ __forceinline__ void convolve_lanes(const ShortConvParams& p, const Plan& plan, const Reached& r, int branch,
                                               int64_t channel, float* z) {
#pragma unroll
  for (int i = 0; i < kLanes<kType>; ++i) z[i] = 0.0F;
#pragma unroll
  for (int j = 0; j < kMaxTaps; ++j) {
    if (r.rows[j] == nullptr) continue;  // not a zero: the weight may be Inf
    float x[kLanes<kType>], taps[kLanes<kType>];
    load_lanes<kType>(p, plan, r.rows[j], channel, x);
#pragma unroll
    for (int i = 0; i < kLanes<kType>; ++i) {
      taps[i] = channel + i < p.hidden_size ? folded_tap<kType>(p, branch * p.hidden_size + channel + i, j) : 0.0F;
    }
    add_tap<kLanes<kType>>(taps, x, r.norms[j], z);
  }
}

template <DType kType>
__global__ void __launch_bounds__(kMaxThreads<kType>) short_conv_any_kernel(const ShortConvParams p, const Plan plan) {
  __shared__ float partials[2][kPartials];
  count_bad_data(p);
  const int branch = blockIdx.y;
  BlockTokens tokens(p, plan);
  int parity = 0;
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    const bool mine = tokens.begins_in(p, s), owns = tokens.owns(p, s);
    const int end = mine ? tokens.end_in(p, s) : max(tokens.next, s.end);
#pragma unroll 1
    for (int t = mine ? tokens.next : end; t < end; ++t) {
      Reached r = reach<kType>(p, plan, s, branch, t);
      norm_reached<kType>(p, plan, partials, &parity, &r);
      const std::byte* own = input_row<kType>(p, plan, s, branch, t);
      std::byte* state = owns && writes_state(p, s, t) ? state_row<kType>(p, plan, s, branch, t) : nullptr;
#pragma unroll 1
      for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) {
        const int64_t channel = int64_t{vector} * kLanes<kType>;
        float x[kLanes<kType>], z[kLanes<kType>];
        convolve_lanes<kType>(p, plan, r, branch, channel, z);
        load_lanes<kType>(p, plan, own, channel, x);
        finish<kType, kLanes<kType>>(x, z);
        store_lanes<kType>(p, plan, z, output_row<kType>(p, p.out, branch, t), channel);
        if (state != nullptr) copy_lanes<kType>(p, plan, own, state, channel);
      }
    }
    if (mine && owns) {
      for (int64_t after = max(s.begin + p.reach(), s.end - p.reach()); after < s.end; ++after) {
        const int t = static_cast<int>(after);
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
