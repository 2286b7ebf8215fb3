// How a row is stored: names, sizes and scalar conversions of every format (docs/ops.md, Row formats), for host and device.
//
// A new format is an enumerator, a line of traits_of and a case of with_row_format and with_row_decode, all in this file.
// Every op takes it from there; row_decode.h has to know only an element or a kind of scale that no format has had.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/error.h"
#include "common/math.h"

namespace engram_kernels {

enum class RowFormat : int { kF32, kBf16, kF16, kFp8Block32, kFp8Block32Packed, kFp8Tensor, kInt8Group32 };
enum class DType : int { kF32, kBf16, kF16 };

constexpr int kScaleBlock = 32;  // elements that share a scale in the block and group formats
constexpr int kNumRowFormats = 7;

enum class RowElement : int { kF32, kBf16, kF16, kFp8E4m3, kInt8 };
// What an element is multiplied by: nothing, one fp32 for the tensor, or one ue8m0 byte or fp32 for each kScaleBlock elements.
enum class RowScale : int { kNone, kTensor, kBlockUe8m0, kGroupF32 };

struct RowFormatTraits {
  const char* name;
  RowElement element;
  RowScale scale;
  bool packed;  // the scales of a row lie behind its values, in the row array
};

// One comparison: a GPU asks it for each row. Else the traits are asked for a format that is a constant, or on the host.
EK_INLINE constexpr bool is_packed(RowFormat format) { return format == RowFormat::kFp8Block32Packed; }

EK_INLINE constexpr RowFormatTraits traits_of(RowFormat format) {
  switch (format) {
    case RowFormat::kF32:
      return {"f32", RowElement::kF32, RowScale::kNone, false};
    case RowFormat::kBf16:
      return {"bf16", RowElement::kBf16, RowScale::kNone, false};
    case RowFormat::kF16:
      return {"f16", RowElement::kF16, RowScale::kNone, false};
    case RowFormat::kFp8Block32:
      return {"fp8_e4m3_block32", RowElement::kFp8E4m3, RowScale::kBlockUe8m0, false};
    case RowFormat::kFp8Block32Packed:
      return {"fp8_e4m3_block32_packed", RowElement::kFp8E4m3, RowScale::kBlockUe8m0, is_packed(format)};
    case RowFormat::kFp8Tensor:
      return {"fp8_e4m3_tensor", RowElement::kFp8E4m3, RowScale::kTensor, false};
    case RowFormat::kInt8Group32:
      return {"int8_group32", RowElement::kInt8, RowScale::kGroupF32, false};
  }
  return {};
}

// Calls f with the row format as a compile-time constant: f(std::integral_constant<RowFormat, ..>{}).
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
EK_INLINE void with_row_format(RowFormat format, const F& f) {
  switch (format) {
    case RowFormat::kF32:
      return f(std::integral_constant<RowFormat, RowFormat::kF32>{});
    case RowFormat::kBf16:
      return f(std::integral_constant<RowFormat, RowFormat::kBf16>{});
    case RowFormat::kF16:
      return f(std::integral_constant<RowFormat, RowFormat::kF16>{});
    case RowFormat::kFp8Block32:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32>{});
    case RowFormat::kFp8Block32Packed:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32Packed>{});
    case RowFormat::kFp8Tensor:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Tensor>{});
    case RowFormat::kInt8Group32:
      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});
  }
}

// The same for code to which it does not matter where the scales lie: formats that differ in nothing else share a constant.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
EK_INLINE void with_row_decode(RowFormat format, const F& f) {
  static_assert(kNumRowFormats == 7, "a new format needs a case here");
  switch (format) {
    case RowFormat::kF32:
      return f(std::integral_constant<RowFormat, RowFormat::kF32>{});
    case RowFormat::kBf16:
      return f(std::integral_constant<RowFormat, RowFormat::kBf16>{});
    case RowFormat::kF16:
      return f(std::integral_constant<RowFormat, RowFormat::kF16>{});
    case RowFormat::kFp8Tensor:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Tensor>{});
    case RowFormat::kInt8Group32:
      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});
    default:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32>{});
  }
}

EK_INLINE constexpr int dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

EK_INLINE constexpr int element_bytes(RowFormat f) {
  const RowElement element = traits_of(f).element;
  return element == RowElement::kF32 ? 4 : element == RowElement::kBf16 || element == RowElement::kF16 ? 2 : 1;
}

EK_INLINE constexpr int scale_bytes(RowFormat f) { return traits_of(f).scale == RowScale::kBlockUe8m0 ? 1 : 4; }  // of one scale

// Whether kScaleBlock elements share a scale.
EK_INLINE constexpr bool has_blocks(RowFormat f) {
  const RowScale scale = traits_of(f).scale;
  return scale == RowScale::kBlockUe8m0 || scale == RowScale::kGroupF32;
}

// Whether the scales are in an array of their own.
EK_INLINE constexpr bool has_scales(RowFormat f) { return traits_of(f).scale != RowScale::kNone && !traits_of(f).packed; }

// Whether a row is stored as elements of this dtype, so that a copy needs no decode.
EK_INLINE constexpr bool stores(RowFormat f, DType dtype) {
  const RowElement element = dtype == DType::kF32    ? RowElement::kF32
                             : dtype == DType::kBf16 ? RowElement::kBf16
                                                     : RowElement::kF16;
  return traits_of(f).scale == RowScale::kNone && traits_of(f).element == element;
}

// Bytes that a row occupies in the row array, without padding; scales only where they are packed behind the values.
EK_INLINE constexpr int64_t row_value_bytes(RowFormat f, int64_t row_dim) {
  return row_dim * element_bytes(f) + (traits_of(f).packed ? row_dim / kScaleBlock * scale_bytes(f) : 0);
}

// Bytes of a row's scales in the scale array.
EK_INLINE constexpr int64_t row_scale_bytes(RowFormat f, int64_t row_dim) {
  return has_blocks(f) && has_scales(f) ? row_dim / kScaleBlock * scale_bytes(f) : 0;
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
    return is_packed(format) ? row(r) + row_dim : scales + r * scale_stride_bytes;
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
