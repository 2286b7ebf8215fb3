// short_conv: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, short_conv.
//
// Per branch and channel, with W taps, tap j looking back(j) = (W - 1 - j) * dilation tokens back in its own
// sequence:
//   n[t] = x[t] * rsqrt(mean(x[t]^2) + eps) * norm_weight     in float, over the H channels of the branch
//   z[t] = sum over j of weight[j] * n[t - back(j)]           nothing before the sequence start
//   out[t] = x[t] + z[t] * sigmoid(z[t])                      rounded once
// Decoding keeps raw inputs, so that any chunking gives the bits of the whole:
//   1. A ring has S + K slots, S = (W - 1) * dilation. The input at absolute position q lies in slot
//      q mod (S + K). positions[b] is how many inputs came before this chunk. Slots of positions that never
//      were (q < 0) are not read, so a new sequence needs no zeroing.
//   2. K is how many inputs may be rejected: positions may go back by at most K from the furthest input that
//      the ring has had. What is older has been overwritten. state_ends keeps what tells.
//   3. state_indices gives the ring of each sequence; kSkipped leaves a sequence out: its outputs are zeros
//      and no ring changes.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/row_format.h"
#include "common/state_index.h"

namespace engram_kernels {

constexpr int kMaxTaps = 8;

struct ShortConvParams {
  const void* x;              // [num_tokens, branches, hidden_size] of dtype, last dimension dense
  const void* weight;         // [branches, hidden_size, width] of weight_dtype
  const void* norm_weight;    // [branches, hidden_size] of weight_dtype
  const int32_t* cu_seqlens;  // [num_sequences + 1], first 0, last num_tokens, non-decreasing
  const void* positions;      // [num_sequences] int32, or int64 where positions_are_64; >= 0; null without state
  const void* state_indices;  // [num_sequences] of the type of positions: a ring, or kSkipped; null: sequence b has ring b
  void* state;                // [num_rings, slots, branches, hidden_size] of dtype, the last three dense; null if empty
  int64_t* state_ends;        // [num_rings, 2]: inputs of the ring's sequence, the most that there were; or null
  void* out;                  // [num_tokens, branches, hidden_size] of dtype, dense
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t x_token_stride;  // elements
  int64_t x_branch_stride;
  int64_t position_stride;
  int64_t index_stride;  // of state_indices
  int64_t state_ring_stride;
  int64_t num_rings;
  int64_t slots;  // of a ring, at least the reach
  int64_t branches;
  int64_t hidden_size;
  int width;
  int dilation;
  float eps;
  DType dtype;
  DType weight_dtype;  // dtype, or float
  bool positions_are_64;
  // CUDA only
  uint32_t* error_count = nullptr;  // device memory, counts what check_host_data refuses; or null

  EK_INLINE bool has_state() const { return positions != nullptr; }
  EK_INLINE int64_t position(int64_t b) const { return load(positions, b * position_stride); }
  EK_INLINE int64_t index(int64_t b) const { return state_indices == nullptr ? b : load(state_indices, b * index_stride); }
  EK_INLINE int64_t reach() const { return int64_t{width - 1} * dilation; }
  EK_INLINE int64_t back(int tap) const { return int64_t{width - 1 - tap} * dilation; }

  // The ring of sequence b, whose chunk has so many tokens; or kSkipped, or kRefused.
  EK_INLINE int64_t ring_of(int64_t b, int64_t tokens) const {
    const int64_t ring = index(b);
    if (ring == kSkipped && state_indices != nullptr) return kSkipped;
    if (ring < 0 || ring >= num_rings || !position_fits(position(b), tokens)) return kRefused;
    return tokens > 0 && !can_resume(ring, position(b)) ? kRefused : ring;
  }
  EK_INLINE static bool position_fits(int64_t position, int64_t tokens) {
    return position >= 0 && position <= INT64_MAX - tokens;
  }
  // Whether the inputs before `position` lie in the ring. Position 0 begins a new sequence.
  EK_INLINE bool can_resume(int64_t ring, int64_t position) const {
    if (state_ends == nullptr || position == 0) return true;
    const int64_t end = state_ends[2 * ring], furthest = state_ends[2 * ring + 1];
    return position <= end && end <= furthest && furthest - position <= slots - reach();
  }
  // Notes that the ring has taken inputs [position, position + tokens). Every reader of state_ends must be
  // done.
  EK_INLINE void advance(int64_t ring, int64_t position, int64_t tokens) const {
    const int64_t end = position + tokens, before = position == 0 ? 0 : state_ends[2 * ring + 1];
    state_ends[2 * ring] = end;
    state_ends[2 * ring + 1] = before > end ? before : end;
  }

 private:
  EK_INLINE int64_t load(const void* from, int64_t i) const {
    return positions_are_64 ? static_cast<const int64_t*>(from)[i] : static_cast<const int32_t*>(from)[i];
  }
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
  void* scratch = nullptr;  // device memory of short_conv_bwd_cuda_scratch_bytes, 16-byte aligned
};

// Throws unless sizes are in range.
void check_params(const ShortConvParams& p);
// Throws unless cu_seqlens, positions, state_indices and state_ends (host memory) hold what the fields above
// promise.
void check_host_data(const ShortConvParams& p);

void short_conv_cpu(const ShortConvParams& p, const Parallel& parallel);
void short_conv_bwd_cpu(const ShortConvBwdParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// All pointers lead to device memory, which the host does not look at. A sequence that check_host_data
// refuses is counted and treated as a skipped one.
void short_conv_cuda(const ShortConvParams& p, void* stream);
int64_t short_conv_bwd_cuda_scratch_bytes(const ShortConvBwdParams& p);  // of the current device
void short_conv_bwd_cuda(const ShortConvBwdParams& p, void* stream);
#endif

}  // namespace engram_kernels
