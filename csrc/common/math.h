// Integer arithmetic shared by host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EK_HOST_DEVICE __host__ __device__
#else
#define EK_HOST_DEVICE
#endif

// Always inlined: kernels are compiled once per instruction set, and an out-of-line copy that they share would be linked
// from any of them.
#define EK_INLINE EK_HOST_DEVICE inline __attribute__((always_inline))

namespace engram_kernels {

EK_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

EK_INLINE uint64_t mul_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// x mod modulus by one multiply-high, exact for x < 2^63 and 1 <= modulus < 2^31.
// With r = floor((2^64 - 1) / m), x * r / 2^64 > x/m - x * (m + 1) / (m * 2^64) >= x/m - 1: the quotient is at most one too
// low, and the rest below 2 m < 2^32.
struct ExactModulus {
  uint32_t modulus;
  uint64_t reciprocal;  // floor((2^64 - 1) / modulus)

  EK_INLINE static ExactModulus of(uint64_t modulus) { return {static_cast<uint32_t>(modulus), ~uint64_t{0} / modulus}; }

  EK_INLINE uint32_t operator()(uint64_t x) const {
    const uint32_t rest = static_cast<uint32_t>(x) - static_cast<uint32_t>(mul_high(x, reciprocal)) * modulus;
    const uint32_t less = rest - modulus;  // huge where rest is the smaller one
    return rest < less ? rest : less;
  }

  // The remainder of any x, never negative. Where x is below 0 it is that of its ones' complement, turned around.
  EK_INLINE uint32_t of_signed(int64_t x) const {
    const int64_t sign = x >> 63;
    const uint32_t flip = static_cast<uint32_t>(sign);
    return ((*this)(static_cast<uint64_t>(x ^ sign)) ^ flip) + (modulus & flip);
  }
};

}  // namespace engram_kernels
