// kLanes floats at a time, for the instruction set that this file is compiled for. Everything is inlined: no symbol
// of one instruction set can be linked into another. Elements are stored as float, Bf16 or F16; arithmetic is float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/row_format.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace engram_kernels {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace engram_kernels

#define EK_LANE static inline __attribute__((always_inline))

namespace engram_kernels::EK_ISA {

EK_LANE float to_float(float x) { return x; }
EK_LANE float to_float(Bf16 x) { return bf16_to_float(x.bits); }
EK_LANE float to_float(F16 x) { return f16_to_float(x.bits); }
EK_LANE void from_float(float x, float* out) { *out = x; }
EK_LANE void from_float(float x, Bf16* out) { out->bits = float_to_bf16(x); }
EK_LANE void from_float(float x, F16* out) { out->bits = float_to_f16(x); }

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using F32 = __m512;

EK_LANE F32 zeros() { return _mm512_setzero_ps(); }
EK_LANE F32 splat(float x) { return _mm512_set1_ps(x); }
EK_LANE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
EK_LANE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
EK_LANE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
EK_LANE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
EK_LANE F32 divide(F32 a, F32 b) { return _mm512_div_ps(a, b); }
EK_LANE F32 clamp(F32 x, float low, float high) {  // NaN stays
  return _mm512_min_ps(splat(high), _mm512_max_ps(splat(low), x));
}
EK_LANE F32 round_to_int(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
EK_LANE F32 times_power_of_two(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
EK_LANE float sum(F32 a) { return _mm512_reduce_add_ps(a); }
EK_LANE F32 load(const float* p) { return _mm512_loadu_ps(p); }
EK_LANE F32 load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
EK_LANE F32 load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
EK_LANE void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
EK_LANE void store(Bf16* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
EK_LANE void store(F16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// kLanes fp8 e4m3 values, NaN kept: moved into a half's place, where they are 2^-8 of themselves
EK_LANE F32 load_fp8_e4m3(const std::byte* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F));
  const __m256i half = _mm256_xor_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign),
                                        _mm256_and_si256(nan, _mm256_set1_epi16(0x4180)));  // 0x3F80 -> 0x7E00
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0F));
}
EK_LANE F32 load_int8(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// kLanes e2m1 values of kLanes / 2 bytes, the low half of a byte first
EK_LANE F32 load_e2m1(const std::byte* p) {
  int words[2];
  std::memcpy(words, p, sizeof(words));
  const __m512i each = _mm512_mask_blend_epi32(0xFF00, _mm512_set1_epi32(words[0]), _mm512_set1_epi32(words[1]));
  const __m512i nibbles = _mm512_srlv_epi32(each, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  const __m512 values =
      _mm512_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F, -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F);
  return _mm512_permutexvar_ps(nibbles, values);  // by the low 4 bits
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using F32 = __m256;

EK_LANE F32 zeros() { return _mm256_setzero_ps(); }
EK_LANE F32 splat(float x) { return _mm256_set1_ps(x); }
EK_LANE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
EK_LANE F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
EK_LANE F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
EK_LANE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
EK_LANE F32 divide(F32 a, F32 b) { return _mm256_div_ps(a, b); }
EK_LANE F32 clamp(F32 x, float low, float high) {  // NaN stays
  return _mm256_min_ps(splat(high), _mm256_max_ps(splat(low), x));
}
EK_LANE F32 round_to_int(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
EK_LANE F32 times_power_of_two(F32 x, F32 n) {  // n in [-126, 128], 128 gives Inf
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
EK_LANE float sum(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
EK_LANE F32 load(const float* p) { return _mm256_loadu_ps(p); }
EK_LANE F32 load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
EK_LANE F32 load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
EK_LANE void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
EK_LANE void store(Bf16* p, F32 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
EK_LANE void store(F16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EK_LANE F32 load_fp8_e4m3(const std::byte* p) {
  const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(bytes, _mm_set1_epi16(0x7F));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
  const __m128i half = _mm_xor_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign),
                                     _mm_and_si128(nan, _mm_set1_epi16(0x4180)));  // 0x3F80 -> 0x7E00
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0F));
}
EK_LANE F32 load_int8(const std::byte* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
EK_LANE F32 load_e2m1(const std::byte* p) {
  int word;
  std::memcpy(&word, p, sizeof(word));
  const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F), nibbles);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(nibbles, 28), _mm256_set1_epi32(static_cast<int>(0x80000000)));
  return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
}

#else

constexpr int kLanes = 8;
struct F32 {
  float lane[kLanes];
};

template <class Op>
EK_LANE F32 each_lane(const Op& op) {
  F32 result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = op(i);
  return result;
}
EK_LANE F32 splat(float x) {
  return each_lane([&](int) { return x; });
}
EK_LANE F32 zeros() { return splat(0.0F); }
EK_LANE F32 add(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
EK_LANE F32 sub(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
EK_LANE F32 mul(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
EK_LANE F32 fma(F32 a, F32 b, F32 c) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
EK_LANE F32 divide(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
EK_LANE F32 clamp(F32 x, float low, float high) {  // NaN stays
  return each_lane([&](int i) { return x.lane[i] < low ? low : x.lane[i] > high ? high : x.lane[i]; });
}
EK_LANE F32 round_to_int(F32 x) {
  return each_lane([&](int i) { return __builtin_rintf(x.lane[i]); });
}
EK_LANE F32 times_power_of_two(F32 x, F32 n) {
  return each_lane(
      [&](int i) { return __builtin_ldexpf(x.lane[i], static_cast<int>(n.lane[i] == n.lane[i] ? n.lane[i] : 0.0F)); });
}
EK_LANE float sum(F32 a) {
  const float even = (a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6]);
  return even + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
}
template <class T>
EK_LANE F32 load(const T* p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
template <class T>
EK_LANE void store(T* p, F32 x) {
  for (int i = 0; i < kLanes; ++i) from_float(x.lane[i], p + i);
}
EK_LANE F32 load_fp8_e4m3(const std::byte* p) {
  return each_lane([&](int i) { return fp8_e4m3_to_float(static_cast<uint8_t>(p[i])); });
}
EK_LANE F32 load_int8(const std::byte* p) {
  return each_lane([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
EK_LANE F32 load_e2m1(const std::byte* p) {
  return each_lane([&](int i) { return e2m1_to_float(static_cast<uint32_t>(p[i / 2]) >> i % 2 * 4); });
}

#endif

// e^x, within two units in the last place where the result is a normal float; Inf from 88.7 on, held below -87. NaN stays.
EK_LANE F32 exp(F32 x) {
  const F32 held = clamp(x, -87.0F, 89.0F);
  const F32 n = round_to_int(mul(held, splat(1.44269504F)));
  // x - n ln 2, with ln 2 in two parts so that the product is exact
  const F32 r = fma(n, splat(2.12194440e-4F), fma(n, splat(-0.693359375F), held));
  F32 series = splat(1.98412698e-4F);  // Taylor to r^7, |r| <= 0.35: the rest is below 2^-27
  for (const float term : {1.38888889e-3F, 8.33333333e-3F, 4.16666667e-2F, 1.66666667e-1F, 0.5F, 1.0F, 1.0F}) {
    series = fma(series, r, splat(term));
  }
  return times_power_of_two(series, n);
}

EK_LANE F32 sigmoid(F32 x) {
  const F32 one = splat(1.0F);
  return divide(one, add(one, exp(sub(zeros(), x))));
}

// The first `count` lanes, the rest zero; nothing behind them is read or written.
template <class T>
EK_LANE F32 load_first(const T* p, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}
template <class T>
EK_LANE void store_first(T* p, F32 x, int count) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace engram_kernels::EK_ISA
