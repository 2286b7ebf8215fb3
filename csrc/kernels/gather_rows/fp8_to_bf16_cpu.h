// fp8 e4m3 times a scale, straight to bf16 bits in integer arithmetic: the bits that the way over float gives, in less than half
// of its instructions.
//
// An e4m3 value is (8 + f) * 2^(e - 10), or f * 2^-9 where e = 0. As long as the product with the scale is normal and finite,
// rounding it to float and that to bf16 depends on f and the scale alone, and e counts the exponent up. So 16 products tell all:
//   bits = sign | (e << 7) + addend[f] where e = 0, addend[8 + f] elsewhere
// where addend[f] is f * 2^-9 * scale, and addend[8 + f] is (8 + f) * 2^-9 * scale less one exponent. A negative scale puts its
// sign into the addends, and an addition is then the exclusive or of the two.
#pragma once

#include "common/simd.h"

namespace engram_kernels::EK_ISA {

constexpr int kTableBlock = 32;  // elements that are decoded at once

// Whether every nonzero product is normal and finite: 2^-9 * 2^(10 - 127) = 2^-126, and 448 * 2^(246 - 127) < 2^128.
EK_LANE bool fits_fp8_table(float scale) {
  const uint32_t magnitude = bits_from_float(scale) & 0x7FFFFFFF;
  return magnitude - (10U << 23) < (246U - 10) << 23;
}
// for a scale of 1
#define EK_SUBNORMAL_ADDENDS 0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60
#define EK_NORMAL_ADDENDS 0x3C00, 0x3C10, 0x3C20, 0x3C30, 0x3C40, 0x3C50, 0x3C60, 0x3C70

#if defined(__AVX2__)

constexpr bool kHasTables = true;

// Whether the tables of all these scales are right: the same for powers of two.
EK_LANE bool fit_fp8_tables(const std::byte* ue8m0_scales, int count) {
  bool ok = true;
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i scales = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ue8m0_scales + i));
    const __m128i beyond = _mm_subs_epu8(_mm_sub_epi8(scales, _mm_set1_epi8(10)), _mm_set1_epi8(static_cast<int8_t>(246 - 10)));
    ok &= _mm_cvtsi128_si64(beyond) == 0;
  }
  for (; i < count; ++i) ok &= static_cast<uint8_t>(static_cast<uint8_t>(ue8m0_scales[i]) - 10) <= 246 - 10;
  return ok;
}

// The 16 addends as bf16 bits; those for e > 0 still with their exponent.
EK_LANE void multiply_addends(float scale, Bf16* addends) {
  const float steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int i = 0; i < 16; i += kLanes) store(addends + i, mul(mul(load(steps + i), splat(0.001953125F)), splat(scale)));
}

#endif

#if defined(__AVX512BW__)

struct Fp8Table {
  __m512i subnormal, normal;  // eight words, four times
};

// of 2^(scale - 127)
EK_LANE Fp8Table fp8_table(std::byte scale) {
  const __m512i subnormal = _mm512_broadcast_i32x4(_mm_setr_epi16(EK_SUBNORMAL_ADDENDS));
  const __m512i normal = _mm512_broadcast_i32x4(_mm_setr_epi16(EK_NORMAL_ADDENDS));
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((static_cast<int>(scale) - 127) * 128));
  return {_mm512_mask_add_epi16(subnormal, 0xFEFEFEFE, subnormal, shift), _mm512_add_epi16(normal, shift)};  // 0 stays 0
}

EK_LANE Fp8Table fp8_table(float scale) {
  Bf16 addends[16];
  multiply_addends(scale, addends);
  const __m512i subnormal = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(addends)));
  const __m512i normal = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(addends + 8)));
  return {subnormal, _mm512_sub_epi16(normal, _mm512_set1_epi16(0x80))};
}

constexpr bool kBlocksWriteNan = true;
struct NanLanes {};
EK_LANE bool any(NanLanes) { return false; }

// out[0..32) = the values at `p` times the scale of the table
template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte* p, const Fp8Table& table, Bf16* out, NanLanes*) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i words = _mm512_cvtepi8_epi16(bytes);
  const __m512i value = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(static_cast<int16_t>(0x8780)));
  const __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
  const __m512i addend =
      _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(words, table.normal), small, words, table.subnormal);
  __m512i bits = _mm512_add_epi16(value, addend);
  const __m256i all = _mm256_set1_epi8(0x7F);
  bits = _mm512_mask_mov_epi16(bits, _mm256_cmpeq_epi8_mask(_mm256_and_si256(bytes, all), all), _mm512_set1_epi16(0x7FC0));
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bits);
  } else {
    _mm512_storeu_si512(out, bits);
  }
}

#elif defined(__AVX2__)

struct Fp8Table {
  __m256i low, high;  // bytes of the 16 addends, twice
};

EK_LANE __m256i twice(const void* addends) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(addends)));
}

// The addends of every ue8m0 scale, 8 KiB of constants: low bytes, then high ones.
struct Ue8m0Addends {
  alignas(32) uint8_t of[256][2][16] = {};

  constexpr Ue8m0Addends() {
    const int addends[16] = {EK_SUBNORMAL_ADDENDS, EK_NORMAL_ADDENDS};
    for (int scale = 0; scale < 256; ++scale) {
      for (int i = 1; i < 16; ++i) {  // 0 stays 0
        const int bits = addends[i] + (scale - 127) * 128;
        of[scale][0][i] = static_cast<uint8_t>(bits & 0xFF);
        of[scale][1][i] = static_cast<uint8_t>(bits >> 8 & 0xFF);
      }
    }
  }
};
constexpr Ue8m0Addends kUe8m0Addends;

// of 2^(scale - 127)
EK_LANE Fp8Table fp8_table(std::byte scale) {
  const auto& addends = kUe8m0Addends.of[static_cast<int>(scale)];
  return {twice(addends[0]), twice(addends[1])};
}

EK_LANE Fp8Table fp8_table(float scale) {
  Bf16 addends[16];
  multiply_addends(scale, addends);
  const __m128i subnormal = _mm_loadu_si128(reinterpret_cast<const __m128i*>(addends));
  const __m128i normal = _mm_sub_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(addends + 8)), _mm_set1_epi16(0x80));
  const __m128i byte = _mm_set1_epi16(0xFF);
  return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(subnormal, byte), _mm_and_si128(normal, byte))),
          _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(subnormal, 8), _mm_srli_epi16(normal, 8)))};
}

constexpr bool kBlocksWriteNan = false;  // a row that has a NaN is decoded again

// The largest magnitudes of blocks.
struct NanLanes {
  __m256i largest = _mm256_setzero_si256();
};
EK_LANE bool any(const NanLanes& nans) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(nans.largest, _mm256_set1_epi8(0x7F))) != 0;
}

// out[0..32) = the values at `p` times the scale of the table
template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte* p, const Fp8Table& table, Bf16* out, NanLanes* nans) {
  // eight bytes of each half side by side: unpacking, which goes by halves, then leaves the order of memory
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xD8);
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7F));
  const __m256i fraction = _mm256_and_si256(bytes, _mm256_set1_epi8(7));
  const __m256i index = _mm256_min_epu8(magnitude, _mm256_or_si256(fraction, _mm256_set1_epi8(8)));  // f, or 8 + f where e > 0
  const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
  nans->largest = _mm256_max_epu8(nans->largest, magnitude);
  const __m256i sign_and_exponent = _mm256_set1_epi16(static_cast<int16_t>(0x8780)), zero = _mm256_setzero_si256();
  const __m256i sixteenth = _mm256_set1_epi16(1 << 12);  // a product takes another unit than the shuffles; a shift takes theirs
  const __m256i first = _mm256_and_si256(_mm256_mulhi_epi16(_mm256_unpacklo_epi8(zero, bytes), sixteenth), sign_and_exponent);
  const __m256i second = _mm256_and_si256(_mm256_mulhi_epi16(_mm256_unpackhi_epi8(zero, bytes), sixteenth), sign_and_exponent);
  const __m256i bits[2] = {_mm256_add_epi16(first, _mm256_unpacklo_epi8(low, high)),
                           _mm256_add_epi16(second, _mm256_unpackhi_epi8(low, high))};
  for (int half = 0; half < 2; ++half) {
    __m256i* to = reinterpret_cast<__m256i*>(out + 16 * half);
    if constexpr (kStream) {
      _mm256_stream_si256(to, bits[half]);
    } else {
      _mm256_storeu_si256(to, bits[half]);
    }
  }
}

#else

constexpr bool kHasTables = false;

struct Fp8Table {};
template <class Scale>
EK_LANE Fp8Table fp8_table(Scale) {
  return {};
}
constexpr bool kBlocksWriteNan = false;
struct NanLanes {};
EK_LANE bool any(NanLanes) { return false; }
EK_LANE bool fit_fp8_tables(const std::byte*, int) { return false; }
template <bool kStream>
EK_LANE void fp8_block_to_bf16(const std::byte*, const Fp8Table&, Bf16*, NanLanes*) {}

#endif

}  // namespace engram_kernels::EK_ISA

#undef EK_SUBNORMAL_ADDENDS
#undef EK_NORMAL_ADDENDS
