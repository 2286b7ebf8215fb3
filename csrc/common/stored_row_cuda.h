// Stored rows on a GPU: copies of their 128-byte lines to shared memory, and their decode. Included by .cu files only.
#pragma once

#include "common/convert_cuda.h"

namespace engram_kernels {

constexpr int kLineBytes = 128;

// Where a row comes from and goes to: the address of the 128-byte line in which it begins, in two words; the
// place of that line in bytes of shared memory; how far into the line the row begins, or kAbsent: nothing is read.
using StagedRow = uint4;
constexpr int kAbsent = -(1 << 30);

// Starts a copy of kBytes to shared memory where `copies`. Lines of 8-byte slots may be shared by rows: through L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const std::byte* from, bool copies) {
  if constexpr (kBytes == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(from),
                 "r"(static_cast<int>(copies))
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %3;}" ::"r"(to), "l"(from),
                 "r"(static_cast<int>(copies)), "n"(kBytes)
                 : "memory");
  }
}

// kCount elements from `element` on of a row in shared or global memory, decoded to float.
template <RowFormat kFormat, int kCount>
__device__ __forceinline__ void decode(const RowSource& s, const unsigned char* row, const unsigned char* scales, int element,
                                       float tensor_scale, float* values) {
  if constexpr (kFormat == RowFormat::kF32) {
    load_floats<DType::kF32, kCount>(row + 4 * element, values);
  } else if constexpr (kFormat == RowFormat::kBf16) {
    load_floats<DType::kBf16, kCount>(row + 2 * element, values);
  } else if constexpr (kFormat == RowFormat::kF16) {
    load_floats<DType::kF16, kCount>(row + 2 * element, values);
  } else {
    uint32_t words[kCount / 4];
    load_words<kCount / 4>(row + element, words);
    float scale = tensor_scale;
    if constexpr (kFormat == RowFormat::kInt8Group32) scale = reinterpret_cast<const float*>(scales)[element / kScaleBlock];
    if constexpr (kFormat == RowFormat::kFp8Block32 || kFormat == RowFormat::kFp8Block32Packed) {
      scale = unpack_ue8m0(scales[element / kScaleBlock], s.zero_scale_is_zero);
    }
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      kFormat == RowFormat::kInt8Group32 ? unpack_int8(words[i], values + 4 * i) : unpack_fp8(words[i], values + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= scale;
  }
}

template <class T>
__device__ __forceinline__ T load_bytes(const std::byte* from) {  // of any alignment
  T value;
  auto* to = reinterpret_cast<std::byte*>(&value);
#pragma unroll
  for (size_t i = 0; i < sizeof(T); ++i) to[i] = from[i];
  return value;
}

__device__ inline float decode_element(const RowSource& s, int64_t id, int element) {
  const std::byte *row = s.row(id), *scales = s.row_scales(id);
  const auto byte = [&](const std::byte* from) { return static_cast<uint8_t>(*from); };
  switch (s.format) {
    case RowFormat::kF32:
      return load_bytes<float>(row + 4 * element);
    case RowFormat::kBf16:
      return bf16_to_float(load_bytes<uint16_t>(row + 2 * element));
    case RowFormat::kF16:
      return f16_to_float(load_bytes<uint16_t>(row + 2 * element));
    case RowFormat::kFp8Tensor:
      return fp8_e4m3_to_float(byte(row + element)) * load_bytes<float>(s.scales);
    case RowFormat::kInt8Group32:
      return static_cast<float>(static_cast<int8_t>(byte(row + element))) * load_bytes<float>(scales + element / kScaleBlock * 4);
    default:
      break;
  }
  return fp8_e4m3_to_float(byte(row + element)) * ue8m0_to_float(byte(scales + element / kScaleBlock), s.zero_scale_is_zero);
}

inline int lowest_bit(uint64_t x) { return x == 0 ? 1 << 30 : static_cast<int>(x & (~x + 1) & 0x3FFFFFFF); }

}  // namespace engram_kernels
