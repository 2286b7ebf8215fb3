// Rows of short_conv in shared memory, their norms, and what is computed of them. Included by .cu files only.
#pragma once

#include "kernels/short_conv/short_conv_rows_cuda.h"

namespace engram_kernels {
namespace {

inline int ring_bytes(int rows_held, int row_bytes, int threads) {
  return rows_held * (row_bytes + threads / kWarp * 4) + 2 * kPartials * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ void copy_async(void* to, const std::byte* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but those since the last end_copies.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// plan.rows_held slots, the first plan.ring_rows of them a ring. A thread reads only vectors that it copied there itself, and
// a warp has norms of its own, so that nothing but the sums of squares waits for a barrier.
template <DType kType>
struct Ring {
  const ShortConvParams& p;
  const Plan& plan;

  __device__ __forceinline__ int wrapped(int slot) const { return slot >= plan.ring_rows ? slot - plan.ring_rows : slot; }
  __device__ __forceinline__ uint4* vector_of(int slot, int v) const {
    return reinterpret_cast<uint4*>(shared + slot * plan.row_bytes) + threadIdx.x + v * plan.threads;
  }
  __device__ __forceinline__ bool has(int v) const { return static_cast<int>(threadIdx.x) + v * plan.threads < plan.vectors; }
  __device__ __forceinline__ float* norms() const {
    return reinterpret_cast<float*>(shared + plan.rows_held * plan.row_bytes) + threadIdx.x / kWarp * plan.rows_held;
  }
  __device__ __forceinline__ float* partials(int parity) const {
    float* behind = reinterpret_cast<float*>(shared + plan.rows_held * plan.row_bytes) + plan.threads / kWarp * plan.rows_held;
    return behind + parity * kPartials;
  }

  __device__ __forceinline__ void fetch(int slot, const std::byte* row) const {
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (has(v)) copy_async(vector_of(slot, v), row + (threadIdx.x + v * plan.threads) * 16);
    }
  }

  __device__ __forceinline__ void load(int slot, float (&x)[kChannels]) const {
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (has(v)) load_floats<kType, kLanes<kType>>(vector_of(slot, v), x + v * kLanes<kType>);
    }
  }

  // Norms of the rows in slots first .. first + 3 whose bit in `there` is set. For the whole block; parity alternates.
  __device__ __forceinline__ void norm_group(int first, unsigned there, int parity) const {
    float sums[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float x[kChannels] = {};
      if ((there >> i & 1) != 0) load(wrapped(first + i), x);
      sums[i] = add_squares<kChannels>(x, 0.0F);
    }
    const float norm = inverse_rms(block_sums(sums, partials(parity)), p, plan);
    const int lane = threadIdx.x % kWarp;
    if (lane % 8 == 0 && (there >> lane / 8 & 1) != 0) norms()[wrapped(first + lane / 8)] = norm;
    __syncwarp();
  }

  __device__ __forceinline__ void add_row(int slot, const float* tap, float (&x)[kChannels], float (&z)[kChannels]) const {
    load(slot, x);
    add_tap<kChannels>(tap, x, norms()[slot], z);
  }

  // Of token t, whose row is x and lies in `slot`.
  __device__ __forceinline__ void write(const Span& s, int branch, int t, int slot, bool owns, const float (&x)[kChannels],
                                        float (&z)[kChannels]) const {
    finish<kType, kChannels>(x, z);
    std::byte* out = output_row<kType>(p, p.out, branch, t);
    std::byte* state = owns && writes_state(p, s, t) ? state_row<kType>(p, plan, s, branch, t) : nullptr;
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (!has(v)) continue;
      const int at = (threadIdx.x + v * plan.threads) * 16;
      store_floats<kType>(out + at, z + v * kLanes<kType>);
      if (state != nullptr) *reinterpret_cast<uint4*>(state + at) = *vector_of(slot, v);
    }
  }
};

// Inputs [first, end) of a sequence into their slots.
template <DType kType>
__device__ __forceinline__ void copy_to_state(const ShortConvParams& p, const Plan& plan, const Span& s, int branch, int first) {
  for (int t = first; t < s.end; ++t) {
    const auto* from = reinterpret_cast<const uint4*>(input_row<kType>(p, plan, s, branch, t));
    auto* to = reinterpret_cast<uint4*>(state_row<kType>(p, plan, s, branch, t));
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) to[vector] = from[vector];
  }
}

}  // namespace
}  // namespace engram_kernels
