// Stored rows on a GPU: copies of their 128-byte lines to shared memory. Included by .cu files only.
#pragma once

#include "common/row_decode.h"

namespace engram_kernels {

constexpr int kLineBytes = 128;

// Where a row comes from and goes to: the address of the 128-byte line in which it begins, in two words; the
// place of that line in bytes of shared memory; how far into the line the row begins, or kAbsent: nothing is read.
using StagedRow = uint4;
constexpr int kAbsent = -(1 << 30);

// Starts a copy of kBytes to shared memory where `copies`. Rows may share lines that go in less than 16 bytes: through L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const std::byte* from, bool copies) {
  if constexpr (kBytes == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(from),
                 "r"(static_cast<int>(copies))
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %3;}" ::"r"(to), "l"(from),
                 "r"(static_cast<int>(copies)), "n"(kBytes)
                 : "memory");
  }
}

// The largest power of two that divides x, at most 2^30.
inline int lowest_bit(uint64_t x) { return x == 0 ? 1 << 30 : static_cast<int>(x & (~x + 1) & 0x3FFFFFFF); }

}  // namespace engram_kernels
