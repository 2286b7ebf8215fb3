// ngram_hash: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, ngram_hash.
//
// All hash families are one computation. With c[s] the id `s` tokens back (s = 0 is the token itself):
//   mix = XOR over s < order of c[s] * multipliers[layer][s]                      multipliers are [L, N]
//   mix = sum over s < order of c[s] * multipliers[layer][column][s]              multipliers are [L, C, N]
//   row_ids[layer][t][column] = offsets[layer][column] + (mix mod moduli[layer][column], never negative)
// A position is blocked when it lies before the sequence start, is dead, or is a lookback equal to eos_id; so is every
// older one. Blocked positions contribute boundary_id (the pad class, EOS, or 0, which ends the sum).
//
// A call that commits leaves each sequence's history as its next chunk needs it, in the rows of a pool:
//   1. the `rejected` nearest entries are dropped, before the chunk is hashed
//   2. the ids of the chunk come in front (kDeadToken for a dead one), the others move back, the oldest fall off
//   3. entries that nobody can know after that are kForgotten, or kBeforeStart where the row ended in it
// With max_order - 1 + K columns, up to K tokens of a chunk may be rejected by the next call: max_order - 1 remain.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/row_ids.h"
#include "common/state_index.h"

namespace engram_kernels {

constexpr int kMaxOrder = 8;
constexpr int64_t kBeforeStart = -1;  // history values
constexpr int64_t kDeadToken = -2;
constexpr int64_t kForgotten = -3;  // no id and no history value: a hash that needs it is refused

struct NgramHashParams {
  const void* token_ids;       // [num_tokens], int32 or int64
  const void* history;         // [num_histories, history_width] of the same type, column 0 the nearest; or null.
                               // Once kBeforeStart, every older entry is kBeforeStart
  void* committed;             // `history`, to be updated in place; or null
  const void* state_indices;   // [num_sequences] a row of history or kSkipped; null: sequence b has row b
  const void* rejected;        // [num_sequences] entries of history to drop first, at most spare(); null: none
  const uint8_t* dead_mask;    // [num_tokens], nonzero = dead, its id is not looked at; or null
  const int32_t* cu_seqlens;   // [num_sequences + 1], first 0, last num_tokens, non-decreasing
  const int32_t* token_map;    // [vocab_size], token id -> canonical id (caller's duty: < num_ids); null: already canonical
  const int64_t* multipliers;  // [num_layers, max_order], or [num_layers, columns, max_order] if per_column
  const int64_t* moduli;       // [num_layers, columns], 1 <= m < 2^31
  const int64_t* offsets;      // [num_layers, columns], offset + modulus <= 2^31
  const int64_t* reciprocals;  // [num_layers, columns], floor((2^64 - 1) / modulus), the bits of an unsigned number
  int32_t* row_ids;            // out [num_layers, num_tokens, columns]; kNoRow for tokens of skipped sequences
  int64_t num_tokens;
  int64_t token_stride;  // elements between consecutive token ids
  int64_t num_sequences;
  int64_t num_histories;   // rows of history
  int64_t history_width;   // columns of history, at least max_order - 1
  int64_t history_stride;  // elements between its rows
  int64_t index_stride;    // of state_indices
  int64_t rejected_stride;
  int64_t vocab_size;   // ids that token_ids may hold: [0, vocab_size)
  int64_t num_ids;      // canonical ids: [0, num_ids)
  int64_t boundary_id;  // >= 0
  int64_t eos_id;       // canonical; -1: no id ends the lookback
  int num_layers;
  int max_order;  // N: orders are 2..N, columns = (N - 1) * heads
  int heads;
  bool ids_are_int64;
  bool per_column;
  bool indices_are_int64;
  bool rejected_are_int64;
  uint32_t* error_count;  // CUDA: device memory, counts bad ids (they hash as dead) and bad cu_seqlens; or null

  EK_INLINE int columns() const { return (max_order - 1) * heads; }
  EK_INLINE int64_t token_id(int64_t t) const { return load(token_ids, t * token_stride, ids_are_int64); }
  EK_INLINE int64_t history_id(int64_t sequence, int back) const {  // back >= 1
    return history_entry(history_row(sequence), num_rejected(sequence) + back - 1);
  }
  EK_INLINE int64_t history_entry(int64_t row, int64_t column) const {
    return load(history, row * history_stride + column, ids_are_int64);
  }
  // history_id where sequence b has row b of max_order - 1 columns and nothing is rejected.
  EK_INLINE int64_t own_history_id(int64_t sequence, int back) const {
    return load(history, sequence * (max_order - 1) + back - 1, ids_are_int64);
  }
  // Entries that may be rejected and leave a history that is long enough.
  EK_INLINE int64_t spare() const { return history_width - (max_order - 1); }
  EK_INLINE int64_t num_rejected(int64_t b) const {
    return rejected == nullptr ? 0 : load(rejected, b * rejected_stride, rejected_are_int64);
  }
  EK_INLINE int64_t index(int64_t b) const {
    return state_indices == nullptr ? b : load(state_indices, b * index_stride, indices_are_int64);
  }
  // The row of history that sequence b has; or kSkipped, or kRefused.
  EK_INLINE int64_t history_row(int64_t b) const {
    if (state_indices == nullptr && rejected == nullptr) return b;
    const int64_t row = index(b);
    if (row == kSkipped && state_indices != nullptr) return kSkipped;
    const int64_t dropped = num_rejected(b);
    return row < 0 || row >= num_histories || dropped < 0 || dropped > spare() ? kRefused : row;
  }
  EK_INLINE bool dead(int64_t t) const { return dead_mask != nullptr && dead_mask[t] != 0; }
  EK_INLINE int64_t canonical(int64_t id) const { return token_map != nullptr ? token_map[id] : id; }

  // Makes the history of sequence b that of its next chunk. Every reader of the row must be done.
  EK_INLINE void commit(int64_t b) const {
    const int64_t row = history_row(b), begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    if (row < 0 || begin < 0 || begin > end || end > num_tokens) return;
    const int64_t dropped = num_rejected(b);
    const bool to_front = end - begin < dropped;  // then an entry is read before another takes its place
    for (int64_t n = 0; n < history_width; ++n) {
      const int64_t j = to_front ? n : history_width - 1 - n;
      commit_entry(row, j, next_entry(row, dropped, begin, end, j));
    }
  }
  // Entry j of a row of history after a chunk of the tokens from `begin` to `end`.
  EK_INLINE int64_t next_entry(int64_t row, int64_t dropped, int64_t begin, int64_t end, int64_t j) const {
    if (j < end - begin) return committed_id(end - 1 - j);
    const int64_t from = j - (end - begin) + dropped;
    if (from < history_width) return history_entry(row, from);
    return history_entry(row, history_width - 1) == kBeforeStart ? kBeforeStart : kForgotten;
  }
  EK_INLINE void commit_entry(int64_t row, int64_t column, int64_t id) const {
    const int64_t i = row * history_stride + column;
    ids_are_int64 ? static_cast<int64_t*>(committed)[i] = id : static_cast<int32_t*>(committed)[i] = static_cast<int32_t>(id);
  }

 private:
  EK_INLINE static int64_t load(const void* from, int64_t i, bool are_int64) {
    return are_int64 ? static_cast<const int64_t*>(from)[i] : static_cast<const int32_t*>(from)[i];
  }
  EK_INLINE int64_t committed_id(int64_t t) const {
    const int64_t id = dead(t) ? kDeadToken : token_id(t);
    return id < 0 || id >= vocab_size ? kDeadToken : id;  // a bad one, on a GPU, has been counted
  }
};

// Throws unless the sizes are in range. Looks at no array.
void check_sizes(const NgramHashParams& p);
// check_sizes, and the constants (host memory; columns * layers steps). Token data is not inspected.
void check_params(const NgramHashParams& p);
// Throws unless cu_seqlens, token_ids, history, state_indices and rejected (host memory) hold what the fields above promise.
void check_host_data(const NgramHashParams& p);

void ngram_hash_cpu(const NgramHashParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// Every pointer is device memory. Moduli, reciprocals, offsets and multipliers are trusted: check_params, once, is the caller's
// duty.
void ngram_hash_cuda(const NgramHashParams& p, void* stream);
// ngram_hash_cuda for few tokens, whose sizes have been checked. Returns whether it took them.
bool ngram_hash_few_cuda(const NgramHashParams& p, void* stream);
#endif

}  // namespace engram_kernels
