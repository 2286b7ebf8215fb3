// short_conv: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, short_conv.
//
// Per branch and channel, with W taps, tap j looking back(j) = (W - 1 - j) * dilation tokens back in its own
// sequence:
//   n[t] = x[t] * rsqrt(mean(x[t]^2) + eps) * norm_weight     in float, over the H channels of the branch
//   z[t] = sum over j of weight[j] * n[t - back(j)]           nothing before the sequence start
//   out[t] = x[t] + z[t] * sigmoid(z[t])                      rounded once
// Decoding keeps raw inputs, so that any chunking gives the bits of the whole: state[b] is a ring of the last
// S = (W - 1) * dilation inputs of sequence b, the input at absolute position q in slot q mod S. positions[b]
// is how many inputs came before this chunk; slots of positions that never were (q < 0) are not read, so a
// new sequence needs no zeroing.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/row_format.h"

namespace engram_kernels {

constexpr int kMaxTaps = 8;

struct ShortConvParams {
  const void* x;              // [num_tokens, branches, hidden_size] of dtype, last dimension dense
  const void* weight;         // [branches, hidden_size, width] of weight_dtype
  const void* norm_weight;    // [branches, hidden_size] of weight_dtype
  const int32_t* cu_seqlens;  // [num_sequences + 1], first 0, last num_tokens, non-decreasing
  const void* positions;      // [num_sequences] int32, or int64 where positions_are_64; >= 0; null without state
  void* state;                // [num_sequences, S, branches, hidden_size] of dtype, the last three dense; or null
  void* out;                  // [num_tokens, branches, hidden_size] of dtype, dense
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t x_token_stride;  // elements
  int64_t x_branch_stride;
  int64_t state_sequence_stride;
  int64_t branches;
  int64_t hidden_size;
  int width;
  int dilation;
  float eps;
  DType dtype;
  DType weight_dtype;  // dtype, or float
  bool positions_are_64;
  // CUDA only
  uint32_t* error_count = nullptr;  // device memory, counts what check_host_data refuses; such values are clamped; or null

  EK_INLINE int64_t position(int64_t b) const {
    return positions_are_64 ? static_cast<const int64_t*>(positions)[b] : static_cast<const int32_t*>(positions)[b];
  }
  EK_INLINE int64_t reach() const { return int64_t{width - 1} * dilation; }
  EK_INLINE int64_t back(int tap) const { return int64_t{width - 1 - tap} * dilation; }
};

struct ShortConvBwdParams {
  ShortConvParams forward;  // no state; out is not used
  const void* grad_out;     // [num_tokens, branches, hidden_size] of dtype, last dimension dense
  int64_t grad_token_stride;
  int64_t grad_branch_stride;
  void* grad_x;            // [num_tokens, branches, hidden_size] of dtype, dense
  void* grad_weight;       // [branches, hidden_size, width] of weight_dtype
  void* grad_norm_weight;  // [branches, hidden_size] of weight_dtype
  // CUDA only
  void* scratch = nullptr;  // device memory of short_conv_bwd_cuda_scratch_bytes, on 16 bytes
};

// Throws unless sizes are in range.
void check_params(const ShortConvParams& p);
// Throws unless cu_seqlens and positions (host memory) hold what the fields above promise.
void check_host_data(const ShortConvParams& p);

void short_conv_cpu(const ShortConvParams& p, const Parallel& parallel);
void short_conv_bwd_cpu(const ShortConvBwdParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// All pointers lead to device memory; cu_seqlens and positions are not looked at by the host.
void short_conv_cuda(const ShortConvParams& p, void* stream);
int64_t short_conv_bwd_cuda_scratch_bytes(const ShortConvBwdParams& p);  // of the current device
void short_conv_bwd_cuda(const ShortConvBwdParams& p, void* stream);
#endif

}  // namespace engram_kernels
