// Packed sequences: cu_seqlens[b] .. cu_seqlens[b + 1] are the tokens of sequence b.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace engram_kernels {

// Throws unless cu_seqlens (host memory) starts at 0, does not decrease and ends at num_tokens. `op` names the caller.
void check_cu_seqlens(const char* op, const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens);

// The sequence that token t is in: the last one that starts at or before t and is not empty.
EK_INLINE int64_t sequence_of(const int32_t* cu_seqlens, int64_t num_sequences, int64_t t) {
  int64_t low = 0, high = num_sequences;  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= t ? low : high) = middle;
  }
  return low;
}

}  // namespace engram_kernels
