// Device code that the kernels of gate and gather_gate share: vectors, sums, weights, scores.
// Included by .cu files only.
//
// What is float in shared memory lies in planes of four: neighbouring
// lanes then read neighbouring 16 bytes, and no bank is asked twice.
#pragma once

#include <cstdint>

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "kernels/gate/gate.h"

namespace engram_kernels {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

template <DType kType>
constexpr int kVectorElements = kVectorBytes / dtype_bytes(kType);

// The vector of a branch row that lies `index` vectors in.
template <class T>
__device__ __forceinline__ T* vector_at(const BranchRows& rows, DType dtype, int64_t t, int branch, int index) {
  const int64_t element = t * rows.token_stride + branch * rows.branch_stride;
  return reinterpret_cast<T*>(static_cast<std::byte*>(rows.data) + element * dtype_bytes(dtype)) + index;
}

// The copies that this thread started; the others' are there after the next barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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

// kElements floats of vector `index` out of planes that are `vectors` float4 long.
template <int kElements>
__device__ __forceinline__ void load_planes(const float4* planes, int vectors, int index, float* values) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    const float4 v = planes[i * vectors + index];
    values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
  }
}

template <int kElements>
__device__ __forceinline__ void store_planes(float4* planes, int vectors, int index, const float* values) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    planes[i * vectors + index] = make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
}

__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  float value, unused;
  if (dtype == DType::kBf16) {
    unpack_pair<DType::kBf16>(bits, &value, &unused);
  } else {
    unpack_pair<DType::kF16>(bits, &value, &unused);
  }
  return value;
}

__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        static_cast<uint16_t>(dtype == DType::kBf16 ? pack_pair<DType::kBf16>(value, 0.0F) : pack_pair<DType::kF16>(value, 0.0F));
  }
}

// kElements weights from `element` on, in accesses of 16 bytes where their dtype gives as much.
template <int kElements>
__device__ __forceinline__ void load_weights(const void* data, DType dtype, int64_t element, float* values) {
  if (dtype == DType::kF32) {
    load_floats<DType::kF32, kElements>(static_cast<const float*>(data) + element, values);
  } else if (dtype == DType::kBf16) {
    load_floats<DType::kBf16, kElements>(static_cast<const uint16_t*>(data) + element, values);
  } else {
    load_floats<DType::kF16, kElements>(static_cast<const uint16_t*>(data) + element, values);
  }
}

// The first vector of this thread; the others follow kWarp apart.
template <int kVectors>
__device__ __forceinline__ int first_vector() {
  return threadIdx.x / kWarp * (kWarp * kVectors) + threadIdx.x % kWarp;
}

template <DType kWeights, int kElements, int kVectors>
__device__ __forceinline__ void stage_weights_of(const GateWeights& w, int64_t hidden_size, int first_branch, int branches,
                                                 int vectors, float4* planes) {
  const auto *of_hidden = static_cast<const std::byte*>(w.w_hidden), *of_key = static_cast<const std::byte*>(w.w_key);
#pragma unroll 4  // loads in flight
  for (int n = 0; n < branches * kVectors; ++n) {
    const int branch = n / kVectors, i = first_vector<kVectors>() + n % kVectors * kWarp;
    const int64_t at = ((first_branch + branch) * hidden_size + i * kElements) * dtype_bytes(kWeights);
    float a[kElements] = {}, b[kElements] = {};
    if (i < vectors) load_floats<kWeights, kElements>(of_hidden + at, a), load_floats<kWeights, kElements>(of_key + at, b);
#pragma unroll
    for (int e = 0; e < kElements; ++e) a[e] *= b[e];
    if (i < vectors) store_planes<kElements>(planes + branch * (kElements / 4) * vectors, vectors, i, a);
  }
}

// The products w_hidden * w_key of this thread's vectors in `branches` branches, into planes that only it reads.
template <int kElements, int kVectors>
__device__ __forceinline__ void stage_weights(const GateWeights& w, int64_t hidden_size, int first_branch, int branches,
                                              int vectors, float4* planes) {
  if (w.dtype == DType::kF32) {
    stage_weights_of<DType::kF32, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  } else if (w.dtype == DType::kBf16) {
    stage_weights_of<DType::kBf16, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  } else {
    stage_weights_of<DType::kF16, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  }
}

// Sums over a warp, in place; every lane gets them.
template <int kCount>
__device__ __forceinline__ void warp_sums(float (&v)[kCount]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(~0U, v[i], offset);
  }
}

// Sums up to four values over the branch's warps, in place and in a fixed order. `partial` holds a float4 a warp of the block;
// the lanes of each branch's first warp get the sums. The caller synchronizes before it calls this again.
template <int kCount>
__device__ __forceinline__ void branch_sums(float (&v)[kCount], float4* partial) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  warp_sums(v);
  if (lane == 0) {
    partial[threadIdx.y * warps + threadIdx.x / kWarp] = make_float4(v[0], v[1], v[2], kCount > 3 ? v[kCount - 1] : 0.0F);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const float4 sums = lane < warps ? partial[threadIdx.y * warps + lane] : make_float4(0, 0, 0, 0);
  v[0] = sums.x, v[1] = sums.y, v[2] = sums.z;
  if (kCount > 3) v[kCount - 1] = sums.w;
  warp_sums(v);
}

// A block's shape for rows of `vectors` vectors: lanes a branch, whole warps, at most `per_thread` vectors a lane.
inline int lanes_for(int64_t vectors, int per_thread) {
  return static_cast<int>(ceil_div(vectors, int64_t{per_thread} * kWarp)) * kWarp;
}

inline bool on_vectors(const BranchRows& rows, int64_t tokens, int64_t branches, int element_bytes) {
  return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
         (tokens <= 1 || rows.token_stride * element_bytes % kVectorBytes == 0) &&
         (branches <= 1 || rows.branch_stride * element_bytes % kVectorBytes == 0);
}

inline bool on_vectors(const GateWeights& w) {
  return (reinterpret_cast<uintptr_t>(w.w_hidden) | reinterpret_cast<uintptr_t>(w.w_key)) % kVectorBytes == 0;
}

}  // namespace engram_kernels
