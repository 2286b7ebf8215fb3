// Conversions of stored values on a GPU, several at a time. Included by .cu files only.
#pragma once

#include <cstdint>

#include "common/row_format.h"

namespace engram_kernels {

// Two floats to the nearest even; `low` comes first in memory.
template <DType kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kType == DType::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <DType kType>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float* low, float* high) {
  if constexpr (kType == DType::kBf16) {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xFFFF0000);
  } else {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(*low), "=f"(*high) : "r"(pair));
  }
}

// Four fp8 e4m3 values of one word. Exact; NaN stays NaN.
__device__ __forceinline__ void unpack_fp8(uint32_t word, float* values) {
#if __CUDA_ARCH__ >= 890
  uint32_t low, high;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(word));
  unpack_pair<DType::kF16>(low, values, values + 1);
  unpack_pair<DType::kF16>(high, values + 2, values + 3);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = fp8_e4m3_to_float(static_cast<uint8_t>(word >> 8 * i));
#endif
}

// ue8m0_to_float without a branch.
__device__ __forceinline__ float unpack_ue8m0(uint32_t byte, bool zero_scale_is_zero) {
  const uint32_t bits = max(byte << 23, zero_scale_is_zero ? 0U : 0x00400000U);
  return __uint_as_float(byte == 255 ? 0x7FC00000 : bits);
}

__device__ __forceinline__ void unpack_int8(uint32_t word, float* values) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = static_cast<float>(static_cast<int8_t>(word >> 8 * i));
}

// kCount e2m1 values, the one in the low bits first: 2^126 mends the bias, the one subnormal included, and keeps the sign.
template <int kCount>
__device__ __forceinline__ void unpack_e2m1(uint32_t word, float* values) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t nibble = word >> 4 * i;
    values[i] = __uint_as_float((nibble & 7) << 22 | (nibble & 8) << 28) * 0x1p126F;
  }
}

// kWords neighbouring words of memory, in accesses of up to 16 bytes.
template <int kWords, class Pointer>
__device__ __forceinline__ void load_words(Pointer from, uint32_t* words) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 1) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i / 4];
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }
}

__device__ __forceinline__ void store_words(void* to, const uint32_t (&w)[4]) {
  *static_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
}

// kCount elements of kType as floats; kCount * size is a multiple of 4 bytes.
template <DType kType, int kCount, class Pointer>
__device__ __forceinline__ void load_floats(Pointer from, float* values) {
  if constexpr (kType == DType::kF32) {
    uint32_t words[kCount];
    load_words<kCount>(from, words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(words[i]);
  } else {
    uint32_t words[kCount / 2];
    load_words<kCount / 2>(from, words);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) unpack_pair<kType>(words[i], values + 2 * i, values + 2 * i + 1);
  }
}

// Four floats as kType: two words, or four of float.
template <DType kType>
__device__ __forceinline__ void pack_four(const float* values, uint32_t* words) {
  if constexpr (kType == DType::kF32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(values[i]);
  } else {
    words[0] = pack_pair<kType>(values[0], values[1]);
    words[1] = pack_pair<kType>(values[2], values[3]);
  }
}

// 16 bytes of kType from floats.
template <DType kType>
__device__ __forceinline__ void pack_vector(const float* values, uint32_t (&words)[4]) {
  pack_four<kType>(values, words);
  if constexpr (kType != DType::kF32) pack_four<kType>(values + 4, words + 2);
}

template <DType kType>
__device__ __forceinline__ void store_floats(void* to, const float* values) {
  uint32_t words[4];
  pack_vector<kType>(values, words);
  store_words(to, words);
}

// One element of an array whose dtype is known at run time only.
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

}  // namespace engram_kernels
