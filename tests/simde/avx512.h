// AVX-512 for a machine that has none: forced into the CPU kernels by the CMake option EK_SIMDE, and used by nothing else.
//
// SIMDe gives every intrinsic a definition in AVX2, under the intrinsic's own name. Debian's SIMDe (0.7.4) lacks some that
// the kernels use; they are below, with what Intel's manual says of each. The kernels themselves are compiled unchanged:
// they look for __AVX512F__ and __AVX512BW__, which are defined last, when SIMDe has chosen its definitions.
#pragma once

#if defined(__AVX512F__)
#error "EK_SIMDE compiles without -mavx512f: with it, SIMDe takes the machine's own instructions"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

#define EK_EMULATED static inline __attribute__((always_inline))

namespace engram_kernels::simde {

EK_EMULATED __m512 join(__m256 low, __m256 high) {
  simde__m512_private r;
  r.m256[0] = low;
  r.m256[1] = high;
  return simde__m512_from_private(r);
}
EK_EMULATED __m512i join(__m256i low, __m256i high) {
  simde__m512i_private r;
  r.m256i[0] = low;
  r.m256i[1] = high;
  return simde__m512i_from_private(r);
}
EK_EMULATED __m256 half(__m512 x, int i) { return simde__m512_to_private(x).m256[i]; }
EK_EMULATED __m256i half(__m512i x, int i) { return simde__m512i_to_private(x).m256i[i]; }

EK_EMULATED __m512i cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
EK_EMULATED __m512i cvtepi8_epi32(__m128i a) { return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))); }
EK_EMULATED __m512 cvtepi32_ps(__m512i a) { return join(_mm256_cvtepi32_ps(half(a, 0)), _mm256_cvtepi32_ps(half(a, 1))); }
EK_EMULATED __m256i cvtepi32_epi16(__m512i a) {  // truncates
  int32_t from[16];
  int16_t to[16];
  std::memcpy(from, &a, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int16_t>(from[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}
EK_EMULATED __m512 cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int kRounding>
EK_EMULATED __m256i cvtps_ph(__m512 a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half(a, 1), kRounding), _mm256_cvtps_ph(half(a, 0), kRounding));
}
EK_EMULATED float reduce_add_ps(__m512 a) {  // upper half to lower half, four times
  const __m256 eight = _mm256_add_ps(half(a, 1), half(a, 0));
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
EK_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {  // a * 2^floor(b), rounded once; SIMDe's own flushes subnormals
  float x[16], n[16];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(n, &b, sizeof(n));
  for (int i = 0; i < 16; ++i) {
    x[i] = n[i] == n[i] ? __builtin_ldexpf(x[i], static_cast<int>(__builtin_floorf(n[i]))) : x[i] + n[i];
  }
  std::memcpy(&a, x, sizeof(x));
  return a;
}
EK_EMULATED void stream_ps(float* p, __m512 a) {
  _mm256_stream_ps(p, half(a, 0));
  _mm256_stream_ps(p + 8, half(a, 1));
}
EK_EMULATED void stream_si512(__m512i* p, __m512i a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half(a, 0));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, half(a, 1));
}

// a bit for each 16-bit element of `a` and `b` for which `holds`
template <class T, class Compare>
EK_EMULATED __mmask32 each_16_bits(__m512i a, __m512i b, const Compare& holds) {
  T x[32], y[32];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(y, &b, sizeof(y));
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(holds(x[i], y[i])) << i;
  return mask;
}
EK_EMULATED __mmask32 cmpgt_epi16_mask(__m512i a, __m512i b) {
  return each_16_bits<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y; });
}
EK_EMULATED __mmask32 cmpgt_epu16_mask(__m512i a, __m512i b) {
  return each_16_bits<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y; });
}
EK_EMULATED __mmask32 testn_epi16_mask(__m512i a, __m512i b) {
  return each_16_bits<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return (x & y) == 0; });
}
EK_EMULATED __mmask32 cmpeq_epi8_mask(__m256i a, __m256i b) {
  return static_cast<__mmask32>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b)));
}

}  // namespace engram_kernels::simde

#undef EK_EMULATED
#undef _mm512_scalef_ps
#define _mm512_scalef_ps(a, b) engram_kernels::simde::scalef_ps(a, b)
#define _mm512_cvtepu16_epi32(a) engram_kernels::simde::cvtepu16_epi32(a)
#define _mm512_cvtepi8_epi32(a) engram_kernels::simde::cvtepi8_epi32(a)
#define _mm512_cvtepi32_ps(a) engram_kernels::simde::cvtepi32_ps(a)
#define _mm512_cvtepi32_epi16(a) engram_kernels::simde::cvtepi32_epi16(a)
#define _mm512_cvtph_ps(a) engram_kernels::simde::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) engram_kernels::simde::cvtps_ph<rounding>(a)
#define _mm512_reduce_add_ps(a) engram_kernels::simde::reduce_add_ps(a)
#define _mm512_stream_ps(p, a) engram_kernels::simde::stream_ps(p, a)
#define _mm512_stream_si512(p, a) engram_kernels::simde::stream_si512(p, a)
#define _mm512_cmpgt_epi16_mask(a, b) engram_kernels::simde::cmpgt_epi16_mask(a, b)
#define _mm512_cmpgt_epu16_mask(a, b) engram_kernels::simde::cmpgt_epu16_mask(a, b)
#define _mm512_testn_epi16_mask(a, b) engram_kernels::simde::testn_epi16_mask(a, b)
#define _mm256_cmpeq_epi8_mask(a, b) engram_kernels::simde::cmpeq_epi8_mask(a, b)

#define __AVX512F__ 1
#define __AVX512BW__ 1
