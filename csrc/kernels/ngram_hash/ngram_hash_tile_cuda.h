// What a block of ngram_hash keeps in shared memory, and how token ids, history and sequence starts get there.
#pragma once

#include "common/cuda_check.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {
namespace {

constexpr int kMinTile = 32;  // tokens
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

// What the launcher derives from the params. Places are bytes into the shared memory of a block.
struct Plan {
  int tile;                // tokens of a block
  int layers;              // of a block
  int num_columns;         // of a layer
  int vectors;             // num_columns / kWidth
  uint32_t heads_inverse;  // 2^32 / heads, rounded up
  int layer_mixes;         // tile * mix_stride
  int mix_stride;          // 8-byte words a token: orders, made odd so that neighbouring tokens lie in other banks
  int window_stride;       // 4-byte words a token, per_column only
  int columns_at;          // uint32 [layers][kColumnWords][num_columns]
  int multipliers_at;      // uint64 [max_order][kMaxLayers], or [layers][max_order][num_columns] if per_column
  int mixes_at;            // uint64 [layers][tile][mix_stride]
  int windows_at;          // uint32 [tile][window_stride]: canonical ids of a token and its lookback
  int words_at;            // int32 [kMaxOrder + tile], token j at kMaxOrder + j, see Reader
  int sequences_at;        // int32 [tile]: the sequence of a token among its first max_order - 1, else -1
  int shared_bytes;
};

template <class T>
__device__ __forceinline__ T* shared_at(int bytes) {
  extern __shared__ __align__(16) unsigned char shared[];
  return reinterpret_cast<T*>(shared + bytes);
}

// Token ids as words: a canonical id; ~eos_id for EOS; `dead` for what is dead, bad or before the text. Negative words
// block a lookback.
struct Reader {
  const NgramHashParams& p;
  int32_t dead;

  __device__ explicit Reader(const NgramHashParams& params) : p(params), dead(p.eos_id == 0 ? -2 : -1) {}

  __device__ int32_t word(int64_t raw) const {
    const int64_t id = p.canonical(raw);
    return static_cast<int32_t>(id == p.eos_id ? ~id : id);
  }

  __device__ int32_t token(int64_t t, bool count_errors) const {
    if (t < 0 || p.dead(t)) return dead;
    const int64_t raw = p.token_id(t);
    if (static_cast<uint64_t>(raw) < static_cast<uint64_t>(p.vocab_size)) return word(raw);
    if (count_errors) count_error(p.error_count);
    return dead;
  }

  __device__ int32_t before(int64_t sequence, int back, bool count_errors) const {
    if (p.history == nullptr) return dead;
    const int64_t raw = p.history_id(sequence, back);
    if (static_cast<uint64_t>(raw) < static_cast<uint64_t>(p.vocab_size)) return word(raw);
    if (count_errors && raw != kBeforeStart && raw != kDeadToken) count_error(p.error_count);
    return dead;
  }
};

// The last sequence that begins at or before `t`, by one warp: 32 probes a step.
__device__ int64_t find_sequence(const NgramHashParams& p, int64_t t, int lane) {
  int64_t begin = 0, length = p.num_sequences;
  while (length > 1) {
    const int64_t step = (length + 31) / 32, probe = lane * step;
    const bool reached = lane == 0 || (probe < length && p.cu_seqlens[begin + probe] <= t);
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(kAllLanes, reached)));
    begin += last * step;
    length = min(step, length - last * step);
  }
  return begin;
}

// Marks the tokens whose lookback passes the start of their sequence; counts what is wrong with cu_seqlens. One warp.
__device__ void mark_sequence_starts(const NgramHashParams& p, const Plan& plan, int first, int count, int lane) {
  int32_t* sequences = shared_at<int32_t>(plan.sequences_at);
  static_assert(kMinTile == 32, "one pass of 16 bytes a lane clears 128 tokens");
#pragma unroll 1
  for (int j = 4 * lane; j < plan.tile; j += 128) *reinterpret_cast<int4*>(sequences + j) = make_int4(-1, -1, -1, -1);
  __syncwarp();
  for (int64_t b = find_sequence(p, first, lane) + lane; b < p.num_sequences; b += 32) {
    const int64_t begin = int64_t{p.cu_seqlens[b]} - first, end = min(int64_t{p.cu_seqlens[b + 1]} - first, int64_t{count});
    if (begin >= count) break;
    const int stop = static_cast<int>(min(end, begin + p.max_order - 1));
    for (int j = static_cast<int>(max(begin, int64_t{0})); j < stop; ++j) sequences[j] = static_cast<int32_t>(b);
  }
  if (blockIdx.y != 0) return;
  for (int64_t b = int64_t{blockIdx.x} * 32 + lane; b < p.num_sequences; b += int64_t{gridDim.x} * 32) {
    const int32_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
    if (begin > end || (b == 0 && begin != 0) || (b + 1 == p.num_sequences && end != p.num_tokens)) count_error(p.error_count);
    if (p.history == nullptr || begin >= end) continue;
    bool before_start = false;
    for (int back = 1; back < p.max_order; ++back) {
      const bool is_before_start = p.history_id(b, back) == kBeforeStart;
      if (before_start && !is_before_start) count_error(p.error_count);
      before_start = before_start || is_before_start;
    }
  }
}

// Calls use(s, c) with the canonical id c of the s-th lookback of token j, s = 0 .. max_order - 1, boundary_id where
// blocked.
template <class F>
__device__ __forceinline__ void for_each_lookback(const NgramHashParams& p, const Plan& plan, const Reader& reader, int first,
                                                  int j, const F& use) {
  const int32_t* word = shared_at<int32_t>(plan.words_at) + j + kMaxOrder;
  const int32_t boundary = static_cast<int32_t>(p.boundary_id), sequence = shared_at<int32_t>(plan.sequences_at)[j];
  const int32_t own = word[0];
  bool open = own != reader.dead;
  use(0, open ? (own < 0 ? ~own : own) : boundary);
  if (sequence < 0) {
#pragma unroll
    for (int s = 1; s < kMaxOrder; ++s) {
      if (s == p.max_order) break;
      const int32_t id = word[-s];
      open = open && id >= 0;
      use(s, open ? id : boundary);
    }
    return;
  }
  const int position = first + j - p.cu_seqlens[sequence];  // in the sequence
  for (int s = 1; s < p.max_order; ++s) {
    const int32_t id = s <= position ? word[-s] : reader.before(sequence, s - position, position == 0);
    open = open && id >= 0;
    use(s, open ? id : boundary);
  }
}

}  // namespace
}  // namespace engram_kernels
