#include "common/cu_seqlens.h"

#include "common/error.h"

namespace engram_kernels {

void check_cu_seqlens(const char* op, const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens) {
  EK_CHECK(cu_seqlens[0] == 0, op << ": cu_seqlens[0] is " << cu_seqlens[0] << ", expected 0");
  for (int64_t b = 0; b < num_sequences; ++b) {
    EK_CHECK(cu_seqlens[b] <= cu_seqlens[b + 1],
             op << ": cu_seqlens[" << b + 1 << "] is " << cu_seqlens[b + 1] << ", less than the one before, " << cu_seqlens[b]);
  }
  EK_CHECK(cu_seqlens[num_sequences] == num_tokens,
           op << ": cu_seqlens ends at " << cu_seqlens[num_sequences] << ", expected the number of tokens, " << num_tokens);
}

}  // namespace engram_kernels
