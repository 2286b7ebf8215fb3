// CUDA kernel of ngram_hash for few tokens: a decode step. Contract and formula: ngram_hash.h.
//
// A block takes a sequence. Each of its warps takes a layer of a token: lane s finds the token's s-th lookback, then lane c
// mixes and reduces column c. Nothing is staged and nobody waits, but for the last warp: it counts what is wrong with the
// sequence, and updates its history when the others have read it.
// Traffic  the constants of the columns once per warp, out of the cache; else the least
// Limits   kMaxTokens tokens, a lane per column and per entry of a history that is updated, a warp per layer
#include <algorithm>

#include "common/cuda_check.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {
namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr int kMaxTokens = 128;
constexpr int kTokensPerSequence = 16;  // on average: a decode step and its drafts
constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;

// A sequence and its row of history.
struct Sequence {
  int64_t number;
  int64_t row;      // below 0: skipped or refused
  int64_t dropped;  // entries of it
  int begin, end;   // its tokens
};

// The order of the layout: kOrder, or what the params say where that is kMaxOrder.
template <int kOrder>
__device__ __forceinline__ int order_of(const NgramHashParams& p) {
  return kOrder == kMaxOrder ? p.max_order : kOrder;
}

template <bool kPooled, int kOrder>
__device__ __forceinline__ Sequence sequence_of_block(const NgramHashParams& p) {
  const int b = blockIdx.x;
  Sequence of{b, b, 0, p.cu_seqlens[b], p.cu_seqlens[b + 1]};
  if constexpr (kPooled) {
    if (p.state_indices != nullptr) {
      of.row = p.index(b);
      if (static_cast<uint64_t>(of.row) >= static_cast<uint64_t>(p.num_histories) && of.row != kSkipped) of.row = kRefused;
    }
    if (p.rejected != nullptr) {
      of.dropped = p.num_rejected(b);
      const int64_t spare = p.history_width - (order_of<kOrder>(p) - 1);
      if (static_cast<uint64_t>(of.dropped) > static_cast<uint64_t>(spare) && of.row >= 0) of.row = kRefused;
    }
  }
  return of;
}

// Where in `history` the entry lies that stands `back` >= 1 tokens before the chunk.
template <bool kPooled, int kOrder>
__device__ __forceinline__ int64_t entry_at(const NgramHashParams& p, const Sequence& of, int back) {
  return (kPooled ? of.row * p.history_stride + of.dropped : of.number * (order_of<kOrder>(p) - 1)) + (back - 1);
}

// The canonical id of lookback `lane` of token t, boundary_id where it is blocked. All lanes.
template <bool kPooled, int kOrder>
__device__ __forceinline__ uint32_t lookback_of_lane(const NgramHashParams& p, const Sequence& of, int t, int lane, int layer) {
  const int into_chunk = t - lane - of.begin;
  const void* from = p.token_ids;
  int64_t at = (t - lane) * p.token_stride;
  if (into_chunk < 0) from = p.history, at = entry_at<kPooled, kOrder>(p, of, -into_chunk);
  bool readable = lane < order_of<kOrder>(p) && from != nullptr;
  if (p.dead_mask != nullptr && readable && into_chunk >= 0) readable = p.dead_mask[t - lane] == 0;
  bool blocked = true;
  int32_t id = 0;
  if (readable) {
    const int64_t raw = p.load_id(from, at);
    if (static_cast<uint64_t>(raw) < static_cast<uint64_t>(p.vocab_size)) {
      id = static_cast<int32_t>(p.canonical(raw));
      blocked = lane > 0 && id == static_cast<int32_t>(p.eos_id);
    } else if (layer == 0 && (lane == 0 || (t == of.begin && raw != kBeforeStart && raw != kDeadToken))) {
      count_error(p.error_count);  // a token once, and an entry of the history once
    }
  }
  const uint32_t before = (2U << lane) - 1;  // and this one
  return (__ballot_sync(kAllLanes, blocked) & before) == 0 ? static_cast<uint32_t>(id) : static_cast<uint32_t>(p.boundary_id);
}

// Row ids of every step-th token of a sequence, from `first` on, in one layer. A lane takes a column.
template <bool kPooled, bool kPerColumn, int kOrder>
__device__ __forceinline__ void hash_tokens(const NgramHashParams& p, const Sequence& of, int first, int end, int step, int layer,
                                            int lane) {
  const int columns = (order_of<kOrder>(p) - 1) * p.heads;
  const uint32_t at = layer * columns + min(lane, columns - 1);
  const ExactModulus modulus{static_cast<uint32_t>(p.moduli[at]), static_cast<uint64_t>(p.reciprocals[at])};
  const auto offset = static_cast<uint32_t>(p.offsets[at]);
  const int64_t* of_column = p.multipliers + (kPerColumn ? at : layer) * static_cast<uint32_t>(order_of<kOrder>(p));
  uint64_t multipliers[kOrder];  // 0 past the column's order
#pragma unroll
  for (int s = 0; s < kOrder; ++s) {
    if (s == order_of<kOrder>(p)) break;
    multipliers[s] = s < 2 || lane >= (s - 1) * p.heads ? static_cast<uint64_t>(of_column[s]) : 0;
  }
#pragma unroll 1
  for (int t = first; t < end; t += step) {
    int32_t* out = p.row_ids + ((layer * static_cast<int>(p.num_tokens) + t) * columns + lane);
    if (kPooled && of.row < 0) {
      if (lane < columns) *out = static_cast<int32_t>(kNoRow);
      continue;
    }
    const uint32_t id = lookback_of_lane<kPooled, kOrder>(p, of, t, lane, layer);
    uint64_t mix = 0;
#pragma unroll
    for (int s = 0; s < kOrder; ++s) {
      if (s == order_of<kOrder>(p)) break;
      const uint64_t product = __shfl_sync(kAllLanes, id, s) * multipliers[s];
      mix = kPerColumn ? mix + product : mix ^ product;
    }
    const bool is_negative = !kPerColumn && static_cast<int64_t>(mix) < 0;
    const uint32_t residue = modulus(is_negative ? ~mix : mix);
    if (lane < columns) *out = static_cast<int32_t>(offset + (is_negative ? modulus.modulus - 1 - residue : residue));
  }
}

// Counts what check_host_data refuses of a sequence, but for its tokens and the values of its history. A warp.
template <bool kPooled, int kOrder>
__device__ __forceinline__ void count_errors(const NgramHashParams& p, const Sequence& of, int lane) {
  const int64_t b = of.number;
  const bool wrong =
      of.begin > of.end || (b == 0 && of.begin != 0) || (b + 1 == p.num_sequences && of.end != static_cast<int>(p.num_tokens));
  if (wrong && lane == 0) count_error(p.error_count);
  if (kPooled && of.row < 0) {
    if (of.row == kRefused && lane == 0) count_error(p.error_count);
    return;
  }
  if (kPooled && p.state_indices != nullptr) {
#pragma unroll 1
    for (int other = lane; other < b; other += kLanes) {
      if (p.index(other) == of.row) count_error(p.error_count);
    }
  }
  if (p.history == nullptr || of.begin >= of.end) return;
  bool is_before_start = true;
  if (lane > 0 && lane < order_of<kOrder>(p)) {
    is_before_start = p.load_id(p.history, entry_at<kPooled, kOrder>(p, of, lane)) == kBeforeStart;
  }
  const uint32_t known = __ballot_sync(kAllLanes, !is_before_start);
  const uint32_t in_front = (1U << lane) - 2;  // lanes 1 to lane - 1: an entry behind a kBeforeStart is wrong
  if (!is_before_start && (known & in_front) != in_front) count_error(p.error_count);
}

// blockDim = (lanes, layers + 1, token slots), gridDim = sequences.
template <bool kPooled, bool kPerColumn, int kOrder>
__global__ void __launch_bounds__(kMaxWarps* kLanes) ngram_hash_few_kernel(const NgramHashParams p) {
  const int lane = threadIdx.x, layer = threadIdx.y;
  const Sequence of = sequence_of_block<kPooled, kOrder>(p);
  const bool is_inside = of.begin >= 0 && of.end <= static_cast<int>(p.num_tokens);
  if (layer < p.num_layers) {
    if (is_inside) hash_tokens<kPooled, kPerColumn, kOrder>(p, of, of.begin + threadIdx.z, of.end, blockDim.z, layer, lane);
    if constexpr (kPooled) __syncthreads();
    return;
  }
  int64_t next = 0;
  const bool commits = kPooled && p.committed != nullptr && threadIdx.z == 0 && of.row >= 0 && is_inside && of.begin <= of.end &&
                       lane < static_cast<int>(p.history_width);
  if (threadIdx.z == 0) count_errors<kPooled, kOrder>(p, of, lane);
  if constexpr (kPooled) {
    if (commits) next = p.next_entry(of.row, of.dropped, of.begin, of.end, lane);
    __syncthreads();  // every reader of the history is done
    if (commits) p.commit_entry(of.row, lane, next);
  }
}

template <bool kPooled, bool kPerColumn>
auto kernel_of(int max_order) {
  return max_order == 3   ? ngram_hash_few_kernel<kPooled, kPerColumn, 3>
         : max_order == 4 ? ngram_hash_few_kernel<kPooled, kPerColumn, 4>
                          : ngram_hash_few_kernel<kPooled, kPerColumn, kMaxOrder>;
}

bool is_few(const NgramHashParams& p) {
  return p.num_tokens <= kMaxTokens && p.num_tokens <= kTokensPerSequence * p.num_sequences && p.num_layers < kMaxWarps &&
         p.columns() <= kLanes && (p.committed == nullptr || p.history_width <= kLanes);
}

}  // namespace

bool ngram_hash_few_cuda(const NgramHashParams& p, void* stream) {
  if (!is_few(p)) return false;
  const bool pooled = p.committed != nullptr || p.state_indices != nullptr || p.rejected != nullptr;
  const int slots = static_cast<int>(std::min(ceil_div(p.num_tokens, p.num_sequences), int64_t{kMaxWarps / (p.num_layers + 1)}));
  const auto kernel = pooled ? (p.per_column ? kernel_of<true, true>(p.max_order) : kernel_of<true, false>(p.max_order))
                             : (p.per_column ? kernel_of<false, true>(p.max_order) : kernel_of<false, false>(p.max_order));
  EK_CHECK(p.num_sequences <= kMaxGridX, "ngram_hash: num_sequences is " << p.num_sequences);
  kernel<<<static_cast<unsigned>(p.num_sequences), dim3(kLanes, p.num_layers + 1, slots), 0, static_cast<cudaStream_t>(stream)>>>(
      p);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

}  // namespace engram_kernels
