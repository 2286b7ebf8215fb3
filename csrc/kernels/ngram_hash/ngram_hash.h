// ngram_hash: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, ngram_hash.
//
// All hash families are one computation. With c[s] the id `s` tokens back (s = 0 is the token itself):
//   mix = XOR over s < order of c[s] * multipliers[layer][s]                      multipliers are [L, N]
//   mix = sum over s < order of c[s] * multipliers[layer][column][s]              multipliers are [L, C, N]
//   row_ids[layer][t][column] = offsets[layer][column] + (mix mod moduli[layer][column], never negative)
// A position is blocked when it lies before the sequence start, is dead, or is a lookback equal to eos_id; so is every
// older one. Blocked positions contribute boundary_id (the pad class, EOS, or 0, which ends the sum).
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/math.h"
#include "common/parallel.h"

namespace engram_kernels {

constexpr int kMaxOrder = 8;
constexpr int64_t kBeforeStart = -1;  // history values
constexpr int64_t kDeadToken = -2;

struct NgramHashParams {
  const void* token_ids;       // [num_tokens], int32 or int64
  const void* history;         // [num_sequences, max_order - 1] of the same type, column 0 the nearest; or null.
                               // Once kBeforeStart, every older entry is kBeforeStart
  const uint8_t* dead_mask;    // [num_tokens], nonzero = dead, its id is not looked at; or null
  const int32_t* cu_seqlens;   // [num_sequences + 1], first 0, last num_tokens, non-decreasing
  const int32_t* token_map;    // [vocab_size], token id -> canonical id (caller's duty: < num_ids); null: already canonical
  const int64_t* multipliers;  // [num_layers, max_order], or [num_layers, columns, max_order] if per_column
  const int64_t* moduli;       // [num_layers, columns], 1 <= m < 2^31
  const int64_t* offsets;      // [num_layers, columns], offset + modulus <= 2^31
  int32_t* row_ids;            // out [num_layers, num_tokens, columns]
  int64_t num_tokens;
  int64_t token_stride;  // elements between consecutive token ids
  int64_t num_sequences;
  int64_t vocab_size;   // ids that token_ids may hold: [0, vocab_size)
  int64_t num_ids;      // canonical ids: [0, num_ids)
  int64_t boundary_id;  // >= 0
  int64_t eos_id;       // canonical; -1: no id ends the lookback
  int num_layers;
  int max_order;  // N: orders are 2..N, columns = (N - 1) * heads
  int heads;
  bool ids_are_int64;
  bool per_column;
  uint32_t* error_count;  // CUDA: device memory, counts bad ids (they hash as dead) and bad cu_seqlens; or null

  EK_INLINE int columns() const { return (max_order - 1) * heads; }
  EK_INLINE int64_t token_id(int64_t t) const { return load_id(token_ids, t * token_stride); }
  EK_INLINE int64_t history_id(int64_t sequence, int back) const {  // back >= 1
    return load_id(history, sequence * (max_order - 1) + back - 1);
  }
  EK_INLINE bool dead(int64_t t) const { return dead_mask != nullptr && dead_mask[t] != 0; }
  EK_INLINE int64_t canonical(int64_t id) const { return token_map != nullptr ? token_map[id] : id; }

 private:
  EK_INLINE int64_t load_id(const void* ids, int64_t i) const {
    return ids_are_int64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  }
};

// Throws unless the sizes are in range. Looks at no array.
void check_sizes(const NgramHashParams& p);
// The same, and the constants (host memory; columns * layers steps). Token data is not inspected.
void check_params(const NgramHashParams& p);
// Throws unless cu_seqlens, token_ids and history (host memory) hold what the fields above promise.
void check_host_data(const NgramHashParams& p);

void ngram_hash_cpu(const NgramHashParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// Every pointer is device memory. Moduli, offsets and multipliers are trusted: check_params, once, is the caller's duty.
void ngram_hash_cuda(const NgramHashParams& p, void* stream);
#endif

}  // namespace engram_kernels
