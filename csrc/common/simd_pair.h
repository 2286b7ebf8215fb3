// Two registers of floats at a time, in the order that suits the element type.
//
// A 32-bit word of bf16 memory holds two elements: one shift gives the even ones, one mask the odd ones, and putting
// them back needs no shuffle either. So a pair of registers holds 2 * kLanes elements of bf16 as (even, odd), of every
// other type as (first half, second half). This is the pair order of the type. Sums do not care; a float array that is
// combined with bf16 rows is brought into their order once (in_pair_order). Without vector instructions (kHasPairs
// false) the order is that of memory, and nothing is streamed.
#pragma once

#include <cstring>
#include <new>
#include <type_traits>

#include "common/simd.h"

namespace engram_kernels::EK_ISA {

constexpr int kPair = 2 * kLanes;  // elements in a pair of registers

struct Pair {
  F32 a, b;
};

EK_LANE Pair zero_pair() { return {zeros(), zeros()}; }
EK_LANE Pair mul(Pair x, Pair y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
EK_LANE Pair mul(Pair x, F32 y) { return {mul(x.a, y), mul(x.b, y)}; }
EK_LANE Pair sub(Pair x, Pair y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
EK_LANE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
EK_LANE Pair fma(Pair x, F32 y, Pair z) { return {fma(x.a, y, z.a), fma(x.b, y, z.b)}; }
EK_LANE float sum(Pair x) { return sum(add(x.a, x.b)); }

template <class T>
EK_LANE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
EK_LANE void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + kLanes, x.b);
}

#if defined(__AVX512F__)

EK_LANE Pair load_pair(const Bf16* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
// To nearest even, 16 bits at a time: the upper halves of all words, one more where the lower half says so. NaN becomes
// the quiet NaN that torch writes; a NaN that arithmetic gives is quiet, so its upper half shows it.
EK_LANE __m512i bf16_words(Pair x) {
  const __m512i a = _mm512_castps_si512(x.a), b = _mm512_castps_si512(x.b);
  const __m512i upper = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b);
  const __m512i lower = _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
  // up where the lower half is above 0x8000, or equal to it and the upper half is odd
  const __m512i sum = _mm512_adds_epu16(lower, _mm512_and_si512(upper, _mm512_set1_epi16(1)));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(sum, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  const __m512i rounded = _mm512_mask_add_epi16(upper, up, upper, _mm512_set1_epi16(1));
  const __m512i magnitude = _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF));
  const __mmask32 nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7F80));
  return _mm512_mask_mov_epi16(rounded, nan, _mm512_set1_epi16(0x7FC0));
}
EK_LANE void store_pair(Bf16* p, Pair x) { _mm512_storeu_si512(p, bf16_words(x)); }

EK_LANE void stream_pair(Bf16* p, Pair x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bf16_words(x)); }
EK_LANE void stream_pair(F16* p, Pair x) {
  const __m256i low = _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i high = _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
EK_LANE void stream_pair(float* p, Pair x) {
  _mm512_stream_ps(p, x.a);
  _mm512_stream_ps(p + kLanes, x.b);
}
EK_LANE void finish_streams() { _mm_sfence(); }

EK_LANE Pair even_odd(Pair x) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(x.a, even, x.b), _mm512_permutex2var_ps(x.a, _mm512_or_si512(even, _mm512_set1_epi32(1)), x.b)};
}
constexpr bool kHasPairs = true;

#elif defined(__AVX2__)

EK_LANE Pair load_pair(const Bf16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
EK_LANE __m256i round_to_bf16(F32 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan);
}
EK_LANE __m256i bf16_words(Pair x) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_to_bf16(x.a), 16), round_to_bf16(x.b), 0xAA);
}
EK_LANE void store_pair(Bf16* p, Pair x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_words(x)); }

EK_LANE void stream_pair(Bf16* p, Pair x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_words(x)); }
EK_LANE void stream_pair(F16* p, Pair x) {
  const __m128i low = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(high, low));
}
EK_LANE void stream_pair(float* p, Pair x) {
  _mm256_stream_ps(p, x.a);
  _mm256_stream_ps(p + kLanes, x.b);
}
EK_LANE void finish_streams() { _mm_sfence(); }

EK_LANE Pair even_odd(Pair x) {  // shuffle_ps takes 0 2 8 10 | 4 6 12 14
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(x.a, x.b, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(x.a, x.b, 0xDD));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xD8)), _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xD8))};
}
constexpr bool kHasPairs = true;

#else

EK_LANE void finish_streams() {}
EK_LANE Pair even_odd(Pair x) { return x; }
constexpr bool kHasPairs = false;

#endif

template <class T>
constexpr bool kIsEvenOdd = kHasPairs && std::is_same_v<T, Bf16>;

// kPair consecutive elements, (first half, second half), in the pair order of T
template <class T>
EK_LANE Pair in_pair_order(Pair x) {
  if constexpr (kIsEvenOdd<T>) return even_odd(x);
  return x;
}

// kPair elements at p, of any type, in the pair order of T
template <class T, class U>
EK_LANE Pair load_in_order(const U* p) {
  if constexpr (std::is_same_v<T, U>) return load_pair(p);
  return in_pair_order<T>({load(p), load(p + kLanes)});
}

// Where element i of a pair-ordered array of `count` elements lies. What does not fill a pair stays in its place.
template <class T>
EK_LANE int64_t pair_ordered_index(int64_t i, int64_t count) {
  if (!kIsEvenOdd<T> || i >= count / kPair * kPair) return i;
  const int64_t in_pair = i % kPair;
  return i - in_pair + in_pair / 2 + (in_pair % 2) * kLanes;
}

// up to kLanes elements
template <class T>
EK_LANE F32 load_upto(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_first(p, static_cast<int>(count));
}
template <class T>
EK_LANE void store_upto(T* p, F32 x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  store_first(p, x, static_cast<int>(count));
}

EK_LANE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Zeroed floats of the caller's own, aligned for any instruction set.
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<float*>(::operator new(bytes(count), std::align_val_t{64}))) {
    std::memset(data_, 0, bytes(count));
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static size_t bytes(int64_t count) { return static_cast<size_t>(count > 0 ? count : 1) * sizeof(float); }
  float* data_;
};

}  // namespace engram_kernels::EK_ISA
