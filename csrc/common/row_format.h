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

enum class RowFormat : int {
  kF32,
  kBf16,
  kF16,
  kFp8Block32,
  kFp8Block32Packed,
  kFp8Tensor,
  kInt8Group32,
  kFp8Row,
  kNvfp4,
  kMxfp4
};
enum class DType : int { kF32, kBf16, kF16 };

constexpr int kNumRowFormats = 10;

enum class RowElement : int { kF32, kBf16, kF16, kFp8E4m3, kInt8, kE2m1 };
// What an element is multiplied by: nothing, one fp32 for the tensor or for its row, or of its block a ue8m0 byte, an fp32, or an
// e4m3 byte and then RowSource::table_scale.
enum class RowScale : int { kNone, kTensor, kRowF32, kBlockUe8m0, kGroupF32, kBlockE4m3 };

struct RowFormatTraits {
  const char* name;
  RowElement element;
  RowScale scale;
  int block;            // elements that share a scale; 0: all of a row or table
  bool packed = false;  // the scales of a row lie behind its values, in the row array
};

// One comparison: a GPU asks it for each row. Else the traits are asked for a format that is a constant, or on the host.
EK_INLINE constexpr bool is_packed(RowFormat format) { return format == RowFormat::kFp8Block32Packed; }

EK_INLINE constexpr RowFormatTraits traits_of(RowFormat format) {
  switch (format) {
    case RowFormat::kF32:
      return {"f32", RowElement::kF32, RowScale::kNone, 0};
    case RowFormat::kBf16:
      return {"bf16", RowElement::kBf16, RowScale::kNone, 0};
    case RowFormat::kF16:
      return {"f16", RowElement::kF16, RowScale::kNone, 0};
    case RowFormat::kFp8Block32:
      return {"fp8_e4m3_block32", RowElement::kFp8E4m3, RowScale::kBlockUe8m0, 32};
    case RowFormat::kFp8Block32Packed:
      return {"fp8_e4m3_block32_packed", RowElement::kFp8E4m3, RowScale::kBlockUe8m0, 32, is_packed(format)};
    case RowFormat::kFp8Tensor:
      return {"fp8_e4m3_tensor", RowElement::kFp8E4m3, RowScale::kTensor, 0};
    case RowFormat::kInt8Group32:
      return {"int8_group32", RowElement::kInt8, RowScale::kGroupF32, 32};
    case RowFormat::kFp8Row:
      return {"fp8_e4m3_row", RowElement::kFp8E4m3, RowScale::kRowF32, 0};
    case RowFormat::kNvfp4:
      return {"nvfp4", RowElement::kE2m1, RowScale::kBlockE4m3, 16};
    case RowFormat::kMxfp4:
      return {"mxfp4", RowElement::kE2m1, RowScale::kBlockUe8m0, 32};
  }
  return {};
}

constexpr int kUe8m0Block = traits_of(RowFormat::kFp8Block32).block;  // elements of fp8 rows that share a ue8m0 scale
static_assert(traits_of(RowFormat::kFp8Block32Packed).block == kUe8m0Block);

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
    case RowFormat::kFp8Row:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Row>{});
    case RowFormat::kNvfp4:
      return f(std::integral_constant<RowFormat, RowFormat::kNvfp4>{});
    case RowFormat::kMxfp4:
      return f(std::integral_constant<RowFormat, RowFormat::kMxfp4>{});
  }
}

// As with_row_format, for code to which it does not matter where the scales lie: formats that differ in nothing else share a
// constant.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
EK_INLINE void with_row_decode(RowFormat format, const F& f) {
  static_assert(kNumRowFormats == 10, "a new format needs a case here");
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
    case RowFormat::kFp8Row:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Row>{});
    case RowFormat::kNvfp4:
      return f(std::integral_constant<RowFormat, RowFormat::kNvfp4>{});
    case RowFormat::kMxfp4:
      return f(std::integral_constant<RowFormat, RowFormat::kMxfp4>{});
    default:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32>{});
  }
}

EK_INLINE constexpr int dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

EK_INLINE constexpr int element_bits(RowFormat f) {
  const RowElement element = traits_of(f).element;
  return element == RowElement::kF32                                   ? 32
         : element == RowElement::kBf16 || element == RowElement::kF16 ? 16
         : element == RowElement::kE2m1                                ? 4
                                                                       : 8;
}

// Bytes of so many elements, whole bytes of them; 32-bit where their number is.
template <class Int>
EK_INLINE constexpr Int value_bytes(RowFormat f, Int elements) {
  const int bits = element_bits(f);
  return bits >= 8 ? elements * (bits / 8) : elements / (8 / bits);
}

EK_INLINE constexpr int scale_bytes(RowFormat f) {  // of one scale
  const RowScale scale = traits_of(f).scale;
  return scale == RowScale::kBlockUe8m0 || scale == RowScale::kBlockE4m3 ? 1 : 4;
}

// Whether so many elements share a scale that a row has several.
EK_INLINE constexpr bool has_blocks(RowFormat f) { return traits_of(f).block > 0; }

// Whether each row has scales of its own, one or more.
EK_INLINE constexpr bool has_row_scales(RowFormat f) { return has_blocks(f) || traits_of(f).scale == RowScale::kRowF32; }

// Whether a row is floats without a scale.
EK_INLINE constexpr bool is_plain(RowFormat f) { return traits_of(f).scale == RowScale::kNone; }

// Whether a row can be encoded again by itself, by row_encode.h: it has values of eight bits, and scales of its own.
EK_INLINE constexpr bool can_encode(RowFormat f) { return element_bits(f) == 8 && has_row_scales(f); }

// Whether values are multiplied by RowSource::table_scale last.
EK_INLINE constexpr bool has_table_scale(RowFormat f) { return traits_of(f).scale == RowScale::kBlockE4m3; }

// Which of a row's scales is that of an element.
EK_INLINE constexpr int scale_index(RowFormat f, int element) { return has_blocks(f) ? element / traits_of(f).block : 0; }

// Scales of a row.
EK_INLINE constexpr int64_t scales_per_row(RowFormat f, int64_t row_dim) {
  return has_blocks(f) ? row_dim / traits_of(f).block : has_row_scales(f) ? 1 : 0;
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

// The dtype of a row that is floats without a scale.
template <RowFormat kFormat>
constexpr DType kPlainDType = stores(kFormat, DType::kF32)    ? DType::kF32
                              : stores(kFormat, DType::kBf16) ? DType::kBf16
                                                              : DType::kF16;

// Bytes that a row occupies in the row array, without padding; scales only where they are packed behind the values.
EK_INLINE constexpr int64_t row_value_bytes(RowFormat f, int64_t row_dim) {
  return value_bytes(f, row_dim) + (traits_of(f).packed ? scales_per_row(f, row_dim) * scale_bytes(f) : 0);
}

// Bytes of a row's scales in the scale array.
EK_INLINE constexpr int64_t row_scale_bytes(RowFormat f, int64_t row_dim) {
  return has_scales(f) ? scales_per_row(f, row_dim) * scale_bytes(f) : 0;
}

// A table as a kernel sees it: raw pointers, byte strides. Shared by every op that reads rows.
struct RowSource {
  const std::byte* rows;    // row r begins at rows + r * row_stride_bytes
  const std::byte* scales;  // ue8m0 or e4m3 bytes, or fp32 for each group, row or the tensor; null where the format has none
  int64_t num_rows;
  int64_t row_stride_bytes;    // >= row_value_bytes
  int64_t scale_stride_bytes;  // >= row_scale_bytes; 0 for the formats without scales per row
  int row_dim;                 // D; a multiple of traits_of(format).block
  RowFormat format;
  bool zero_scale_is_zero;   // scale byte 0 means 0.0 instead of 2^-127
  float table_scale = 1.0F;  // where has_table_scale: of every value

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

// OCP e2m1: 1 sign, 2 exponent (bias 1), 1 mantissa bit, the low 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Exact.
EK_INLINE float e2m1_to_float(uint32_t nibble) {
  const uint32_t sign = (nibble & 8) << 28, magnitude = nibble & 7;
  // the bits in place of a float's are the value times 2^-126; the one subnormal is 0.5
  const uint32_t bits = magnitude < 2 ? magnitude * 0x3F000000U : (magnitude << 22) + (126U << 23);
  return float_from_bits(bits | sign);
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
