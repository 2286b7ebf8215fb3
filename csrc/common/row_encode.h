// The way back of row_decode.h, for the formats that can_encode: floats become codes of eight bits, and scales. Host and device
// give the same bits.
//
// The largest magnitude of a block, or of a row that has one scale, gives its scale. An element is divided by it in float32 and
// rounded to a code: to the nearest, ties to even, or up in magnitude with the probability of what is cut off. That part is first
// rounded to 16 bits, which takes away what division and product of the decode were rounded by: a value that was decoded from a
// code gets it again, whatever is drawn, while its scale stays.
#pragma once

#include <cstdint>

#include "common/row_format.h"

namespace engram_kernels {

constexpr int kDrawBits = 16;
constexpr uint32_t kInfinityBits = 0x7F800000U;

// How the elements of a block are encoded.
struct BlockScale {
  uint32_t stored;  // the byte, or the bits of the float
  float by;         // what elements are divided by; where scales are powers of two: multiplied by
  float most;       // of the quotients
  uint32_t mask;    // of the codes: 0 where the block has a value that is not finite, and so a scale that is NaN
};

template <RowFormat kFormat>
constexpr bool kHasPowerScales = traits_of(kFormat).scale == RowScale::kBlockUe8m0;
template <RowFormat kFormat>
constexpr float kLargestCode = traits_of(kFormat).element == RowElement::kInt8 ? 127.0F : 448.0F;

// A power of two: the least that brings `largest` (its bits) into the range of e4m3; 1 for zeros.
EK_INLINE BlockScale power_scale(uint32_t largest) {
  const int least = static_cast<int>((largest + 0x1FFFFFU) >> 23) - 8;                       // 448 is 1.75 * 2^8
  const uint32_t byte = largest == 0 ? 127U : static_cast<uint32_t>(least < 1 ? 1 : least);  // 0 means two things
  // one step below what would be decoded as 2^128
  return {byte, float_from_bits((254U - byte) << 23), byte == 247U ? 240.0F : 448.0F, 0xFFU};
}

// A float: that of before while `largest` fits it and fills half of it; else what brings `largest` to the largest code.
EK_INLINE BlockScale float_scale(uint32_t largest_bits, float most, float before) {
  const float largest = float_from_bits(largest_bits), reach = before * most;
  float scale = before;
  if (!(before > 0.0F && largest <= reach && largest >= 0.5F * reach && bits_from_float(reach) < kInfinityBits)) {
    scale = largest / most;
    scale = scale < 0x1p-126F ? 0x1p-126F : scale;  // below it a scale itself would lose bits
    if (bits_from_float(scale * most) >= kInfinityBits) scale = float_from_bits(bits_from_float(scale) - 1);
    scale = largest_bits == 0 ? 1.0F : scale;
  }
  return {bits_from_float(scale), scale, most, 0xFFU};
}

// The scale of a block whose largest magnitude has the bits `largest`. `before` is its scale so far, where scales are floats.
template <RowFormat kFormat>
EK_INLINE BlockScale block_scale(uint32_t largest, float before) {
  static_assert(can_encode(kFormat));
  if (largest >= kInfinityBits) return {kHasPowerScales<kFormat> ? 0xFFU : 0x7FC00000U, 1.0F, 0.0F, 0U};
  return kHasPowerScales<kFormat> ? power_scale(largest) : float_scale(largest, kLargestCode<kFormat>, before);
}

// The code of an element; of `random` the upper 16 bits count, and only where kStochastic.
template <RowFormat kFormat, bool kStochastic>
EK_INLINE uint32_t encode(float x, const BlockScale& scale, uint32_t random) {
  constexpr uint32_t kBits = kStochastic ? kDrawBits : 0;
  const uint32_t bits = bits_from_float(x);
  const float magnitude = float_from_bits(bits & 0x7FFFFFFFU);
  const float quotient = kHasPowerScales<kFormat> ? magnitude * scale.by : magnitude / scale.by;
  const float held = quotient < scale.most ? quotient : scale.most;
  uint32_t exponent = 0;
  float per_step;  // how many of the last bits are in what lies between two codes
  if constexpr (traits_of(kFormat).element == RowElement::kFp8E4m3) {
    exponent = bits_from_float(held) >> 23;
    exponent = exponent < 121U ? 0U : exponent - 121U;  // 2^-6 and what is below have steps of 2^-9
    per_step = float_from_bits((127U + kBits + 9U - exponent) << 23);
  } else {
    per_step = float_from_bits((127U + kBits) << 23);
  }
  const uint32_t fixed = bits_from_float(held * per_step + 0x1p23F) - 0x4B000000U;  // to nearest even: below 2^23
  const uint32_t steps = kStochastic ? (fixed + (random >> (32 - kDrawBits))) >> kDrawBits : fixed;
  if constexpr (traits_of(kFormat).element == RowElement::kFp8E4m3) {
    return ((steps + exponent * 8U) | (bits >> 24 & 0x80U)) & scale.mask;
  } else {
    return ((bits >> 31) != 0 ? 0U - steps : steps) & scale.mask;
  }
}

}  // namespace engram_kernels
