// 16-byte vectors and warps on a GPU: conversion, predicated accesses, sums. Included by .cu files only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert_cuda.h"

namespace engram_kernels {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

template <DType kType>
constexpr int kVectorElements = kVectorBytes / dtype_bytes(kType);

template <DType kType>
__device__ __forceinline__ void unpack_vector(const uint4& v, float* values) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == DType::kF32) {
      values[i] = __uint_as_float(words[i]);
    } else {
      unpack_pair<kType>(words[i], values + 2 * i, values + 2 * i + 1);
    }
  }
}

// Four elements of a vector: all that a float vector has, else its lower or upper half.
template <DType kType>
__device__ __forceinline__ void unpack_four(const uint4& v, int half, float* values) {
  if constexpr (kType == DType::kF32) {
    unpack_vector<kType>(v, values);
  } else {
    unpack_pair<kType>(half ? v.z : v.x, values, values + 1);
    unpack_pair<kType>(half ? v.w : v.y, values + 2, values + 3);
  }
}

// The copies that this thread started have arrived; those of other threads are there after the next barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads 16 bytes where `there`, without a branch; else `to` stays as it is.
__device__ __forceinline__ void load_if(bool there, const std::byte* from, uint4* to) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(to->x), "+r"(to->y), "+r"(to->z), "+r"(to->w)
               : "l"(from), "r"(static_cast<int>(there)));
}

// Stores 16 bytes where `there`, without a branch.
__device__ __forceinline__ void store_if(bool there, std::byte* to, const uint32_t (&w)[4]) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%4], {%0, %1, %2, %3};}" ::"r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3]), "l"(to), "r"(static_cast<int>(there))
               : "memory");
}

// Starts a copy of 16 bytes to shared memory where `there`; this thread may read it after wait_for_copies.
__device__ __forceinline__ void copy_if(bool there, const std::byte* from, float4* to) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(static_cast<int>(there))
               : "memory");
}

// Sums each value over a warp, in place; every lane gets the sums.
template <int kCount>
__device__ __forceinline__ void warp_sums(float (&v)[kCount]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(~0U, v[i], offset);
  }
}

// Sums kCount values (a power of two) over a warp; lane l gets the sum of value l / kLanes % kCount.
// In each of the first steps half of the lanes go on with half of the values; kLeft values are left.
template <int kLanes, int kCount, int kLeft = kCount>
__device__ __forceinline__ float spread_sums(float (&v)[kCount]) {
  if constexpr (kLeft > 1) {
    constexpr int kHalf = kLeft / 2, kOffset = kHalf * kLanes;
    const bool upper = (threadIdx.x & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? v[i + kHalf] : v[i], given = upper ? v[i] : v[i + kHalf];
      v[i] = kept + __shfl_xor_sync(~0U, given, kOffset);
    }
    return spread_sums<kLanes, kCount, kHalf>(v);
  } else {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(~0U, v[0], offset);
#pragma unroll
    for (int offset = kLanes * kCount; offset < kWarp; offset *= 2) v[0] += __shfl_xor_sync(~0U, v[0], offset);
    return v[0];
  }
}

}  // namespace engram_kernels
