// How a row is stored. Names, sizes and the scalar decode of every format (docs/ops.md, Row formats), for host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "common/math.h"

namespace engram_kernels {

enum class RowFormat : int { kF32, kBf16, kF16, kFp8Block32, kFp8Block32Packed, kFp8Tensor, kInt8Group32 };
enum class DType : int { kF32, kBf16, kF16 };

constexpr int kScaleBlock = 32;  // elements that share a scale in the block and group formats
constexpr int kNumRowFormats = 7;
constexpr const char* kRowFormatNames[kNumRowFormats] = {
    "f32", "bf16", "f16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32"};

EK_INLINE constexpr int dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

EK_INLINE constexpr bool has_blocks(RowFormat f) {
  return f == RowFormat::kFp8Block32 || f == RowFormat::kFp8Block32Packed || f == RowFormat::kInt8Group32;
}

// Bytes that a row occupies in the row array, without padding; scales only where they are packed behind the values.
EK_INLINE constexpr int64_t row_value_bytes(RowFormat f, int64_t row_dim) {
  return f == RowFormat::kF32                            ? row_dim * 4
         : f == RowFormat::kBf16 || f == RowFormat::kF16 ? row_dim * 2
         : f == RowFormat::kFp8Block32Packed             ? row_dim + row_dim / kScaleBlock
                                                         : row_dim;
}

// Bytes of a row's scales in the scale array.
EK_INLINE constexpr int64_t row_scale_bytes(RowFormat f, int64_t row_dim) {
  return f == RowFormat::kFp8Block32 ? row_dim / kScaleBlock : f == RowFormat::kInt8Group32 ? row_dim / kScaleBlock * 4 : 0;
}

// A table as a kernel sees it: raw pointers, byte strides. Shared by every op that reads rows.
struct RowSource {
  const std::byte* rows;    // row r begins at rows + r * row_stride_bytes
  const std::byte* scales;  // ue8m0 bytes, fp32 groups, or one fp32 for the tensor; null where the format has none
  int64_t num_rows;
  int64_t row_stride_bytes;    // >= row_value_bytes
  int64_t scale_stride_bytes;  // >= row_scale_bytes; 0 for the formats without scales per row
  int row_dim;                 // D; a multiple of 32 for block formats
  RowFormat format;
  bool zero_scale_is_zero;  // scale byte 0 means 0.0 instead of 2^-127

  // 64-bit: byte offsets pass 2^31 long before row ids do
  EK_INLINE const std::byte* row(int64_t r) const { return rows + r * row_stride_bytes; }
  EK_INLINE const std::byte* row_scales(int64_t r) const {
    return format == RowFormat::kFp8Block32Packed ? row(r) + row_dim : scales + r * scale_stride_bytes;
  }
};

// Throws unless sizes, strides and pointers agree with the format. `op` names the caller.
void check_row_source(const char* op, const RowSource& source);
RowFormat row_format_from_name(const char* op, const char* name);

EK_INLINE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

EK_INLINE uint32_t bits_from_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// OCP fp8 e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, 0x7F and 0xFF are NaN. Exact.
EK_INLINE float fp8_e4m3_to_float(uint8_t byte) {
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80) << 24, magnitude = byte & 0x7F;
  if (magnitude == 0x7F) return float_from_bits(sign | 0x7FC00000);
  // the bits in place of a float's are the value times 2^-120; below 8 they are a subnormal, counted in steps of 2^-9
  const float value =
      magnitude < 8 ? static_cast<float>(magnitude) * 0.001953125F : float_from_bits((magnitude << 20) + (120U << 23));
  return float_from_bits(bits_from_float(value) | sign);
}

// OCP ue8m0: 2^(byte - 127); 0 is 2^-127 (or 0.0 by the other rule found in the wild), 255 is NaN.
EK_INLINE float ue8m0_to_float(uint8_t byte, bool zero_scale_is_zero) {
  if (byte == 0) return zero_scale_is_zero ? 0.0F : float_from_bits(0x00400000);
  return byte == 255 ? float_from_bits(0x7FC00000) : float_from_bits(static_cast<uint32_t>(byte) << 23);
}

EK_INLINE float bf16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// To nearest even; NaN becomes the quiet NaN that torch writes.
EK_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

EK_INLINE float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude > 0x7C00) return float_from_bits(sign | 0x7FC00000 | (magnitude & 0x3FF) << 13);  // quiet, as in hardware
  if (magnitude == 0x7C00) return float_from_bits(sign | 0x7F800000);
  const float value = magnitude < 0x400 ? static_cast<float>(magnitude) * 5.9604644775390625e-08F  // steps of 2^-24
                                        : float_from_bits((magnitude << 13) + (112U << 23));
  return float_from_bits(bits_from_float(value) | sign);
}

// To nearest even, subnormals included; NaN becomes quiet and keeps the upper bits of its payload, as in hardware.
EK_INLINE uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00 | ((magnitude >> 13) & 0x3FF));
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7C00);  // 65536 and above; 65520.. round up below
  if (magnitude < 0x38800000) {                                              // under 2^-14: adding 0.5 rounds to steps of 2^-24
    const float shifted = float_from_bits(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (bits_from_float(shifted) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112U << 23)) >> 13));
}

}  // namespace engram_kernels
