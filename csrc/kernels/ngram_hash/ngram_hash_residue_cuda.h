// The remainder of ngram_hash on a GPU: constants of a column, and six machine instructions an id.
#pragma once

#include <cstdint>

namespace engram_kernels {
namespace {

__device__ __forceinline__ void split(uint64_t x, uint32_t* low, uint32_t* high) {
  asm("mov.b64 {%0, %1}, %2;" : "=r"(*low), "=r"(*high) : "l"(x));
}

// The compiler writes a 64-bit product, and a comparison and a selection for the minimum; these are one instruction
// each.
__device__ __forceinline__ uint64_t mad_wide_signed(uint32_t a, int32_t b, uint64_t c) {
  asm("mad.wide.s32 %0, %1, %2, %0;" : "+l"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint64_t widen(uint32_t a) {  // volatile: once, not in every turn of the loop
  uint64_t wide;
  asm volatile("cvt.u64.u32 %0, %1;" : "=l"(wide) : "r"(a));
  return wide;
}
__device__ __forceinline__ uint32_t min_unsigned(uint32_t a, uint32_t b) {
  asm("min.u32 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// x mod m for x < 2^63, without a division: q = floor(x R / 2^64) up to one, rest = x - q m, and one unsigned minimum.
//
// With R = 2^64 / m = high 2^32 + low, rounded, and x = xh 2^32 + xl, the low 32 bits of the quotient are those of
// xh high + ((xh low + xl high) >> 32). What that leaves out is xl low / 2^64, less than 1/2 because `low` is taken
// signed in [-2^31, 2^31); rounding R moves the quotient by less than x / 2^64 < 1/2; the shift floors.
//   low >= 0, R rounded down: q in (x/m - 2, x/m],     rest in [0, 2m),  fix = -m
//   low <  0, R rounded up:   q in (x/m - 1, x/m + 1), rest in (-m, m),  fix = +m
// and min(rest, rest + fix), unsigned and modulo 2^32, is the remainder, since 2m <= 2^32.
// m = 1 takes rest = x mod 2 in {0, 1} and fix = -1.
struct Column {
  int32_t low;
  uint64_t high;  // below 2^32
  uint32_t minus_modulus;
  uint32_t fix;
  uint32_t offset;  // of the head's rows

  __device__ __forceinline__ uint32_t residue(uint64_t x, uint32_t xl, uint32_t xh) const {
    uint32_t ignored, quotient;
    split(mad_wide_signed(xh, low, x * high), &ignored,
          &quotient);  // the product wraps in its high half, which is wanted
    const uint32_t rest = quotient * minus_modulus + xl;
    return min_unsigned(rest + fix, rest);
  }
};
constexpr int kColumnWords = 5;

// Constants of one modulus. Division by underestimates: each step multiplies what is left of 2^64 by less than 2^-19.
__device__ Column make_column(uint32_t modulus, uint32_t offset) {
  if (modulus == 1) return {0, 1U << 31, 0U - 2U, 0U - 1U, offset};
  // a little less than 1 / modulus: all roundings here and below come to 2^-21 at most, what is taken off is twice that
  const float inverse = __fdividef(1.0F, static_cast<float>(modulus)) * 0.999999F;
  uint64_t left = ~uint64_t{0}, reciprocal = 0;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t part = static_cast<uint64_t>(static_cast<float>(left) * inverse);
    reciprocal += part;
    left -= part * modulus;
  }
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const bool more = left >= modulus;
    reciprocal += more;
    left -= more ? modulus : 0;
  }
  uint32_t low = static_cast<uint32_t>(reciprocal), high = static_cast<uint32_t>(reciprocal >> 32);
  if (low < 1U << 31) return {static_cast<int32_t>(low), high, 0U - modulus, 0U - modulus, offset};
  return {static_cast<int32_t>(low + 1), high + 1, 0U - modulus, modulus, offset};
}

}  // namespace
}  // namespace engram_kernels
