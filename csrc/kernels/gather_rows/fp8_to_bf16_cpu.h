// fp8 e4m3 times a power of two, straight to bf16 bits in integer arithmetic: the bits that the way over float gives,
// in a third of its instructions. Exact, since an e4m3 value has 4 significant bits and bf16 has 8.
//
// A sign-extended byte, shifted left by 4 and masked, is the sign in bit 15 and m << 4, m the magnitude. What is to be
// added: 128 * (scale - 127 + 120) where m >= 8; for the subnormals m * 2^-9 it comes from a table of 8.
#pragma once

#include "common/simd.h"

namespace engram_kernels::EK_ISA {

constexpr int kShiftBlock = 32;  // elements that share a scale

// Whether every nonzero product is normal and finite: 2^-9 * 2^(10 - 127) = 2^-126, and 448 * 2^(246 - 127) < 2^128.
EK_LANE bool shifts_to_bf16(const std::byte* scales, int count) {
  bool ok = true;
  for (int i = 0; i < count; ++i) ok &= static_cast<uint8_t>(static_cast<uint8_t>(scales[i]) - 10) <= 246 - 10;
  return ok;
}

// bf16 bits of m * 2^-9, less m << 4, for m = 0..7
#define EK_SUBNORMAL_ADDENDS \
  0, 0x3B00 - 0x10, 0x3B80 - 0x20, 0x3BC0 - 0x30, 0x3C00 - 0x40, 0x3C20 - 0x50, 0x3C40 - 0x60, 0x3C60 - 0x70

#if defined(__AVX512BW__)

constexpr bool kHasFp8Shift = true;

// out[0..32) = the block at `p` times 2^(scale - 127)
template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte* p, std::byte scale, Bf16* out) {
  const __m512i table = _mm512_castsi128_si512(_mm_setr_epi16(EK_SUBNORMAL_ADDENDS));
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((static_cast<int>(scale) - 127) * 128));
  const __m512i subnormals = _mm512_mask_add_epi16(table, 0xFE, table, shift);  // 0 stays 0
  const __m512i bias = _mm512_add_epi16(shift, _mm512_set1_epi16(120 * 128));
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i words = _mm512_cvtepi8_epi16(bytes);
  const __m512i value = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(static_cast<int16_t>(0x87F0)));
  const __mmask32 small = _mm512_testn_epi16_mask(value, _mm512_set1_epi16(0x780));
  __m512i bits = _mm512_add_epi16(value, _mm512_mask_permutexvar_epi16(bias, small, words, subnormals));
  const __m256i all = _mm256_set1_epi8(0x7F);
  bits = _mm512_mask_mov_epi16(bits, _mm256_cmpeq_epi8_mask(_mm256_and_si256(bytes, all), all), _mm512_set1_epi16(0x7FC0));
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bits);
  } else {
    _mm512_storeu_si512(out, bits);
  }
}

#elif defined(__AVX2__)

constexpr bool kHasFp8Shift = true;

template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte* p, std::byte scale, Bf16* out) {
  const __m256i table = _mm256_setr_epi16(EK_SUBNORMAL_ADDENDS, EK_SUBNORMAL_ADDENDS);
  const __m256i not_zero = _mm256_setr_epi16(0, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1);
  const __m256i shift = _mm256_set1_epi16(static_cast<int16_t>((static_cast<int>(scale) - 127) * 128));
  const __m256i subnormals = _mm256_add_epi16(table, _mm256_and_si256(not_zero, shift));
  const __m256i bias = _mm256_add_epi16(shift, _mm256_set1_epi16(120 * 128));
  const __m256i largest = _mm256_set1_epi16(0x7F0);
  for (int i = 0; i < kShiftBlock; i += 16) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    const __m256i value = _mm256_and_si256(_mm256_slli_epi16(words, 4), _mm256_set1_epi16(static_cast<int16_t>(0x87F0)));
    const __m256i magnitude = _mm256_and_si256(value, largest);
    // the table entry of m is bytes 2m and 2m + 1
    const __m256i entry = _mm256_and_si256(words, _mm256_set1_epi16(7));
    const __m256i index = _mm256_add_epi16(_mm256_mullo_epi16(entry, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
    const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(0x80), magnitude);
    const __m256i addend = _mm256_blendv_epi8(bias, _mm256_shuffle_epi8(subnormals, index), small);
    const __m256i bits =
        _mm256_blendv_epi8(_mm256_add_epi16(value, addend), _mm256_set1_epi16(0x7FC0), _mm256_cmpeq_epi16(magnitude, largest));
    __m256i* to = reinterpret_cast<__m256i*>(out + i);
    if constexpr (kStream) {
      _mm256_stream_si256(to, bits);
    } else {
      _mm256_storeu_si256(to, bits);
    }
  }
}

#else

constexpr bool kHasFp8Shift = false;

template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte*, std::byte, Bf16*) {}

#endif

}  // namespace engram_kernels::EK_ISA

#undef EK_SUBNORMAL_ADDENDS
