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

// What is 32 bits wide here, so that products and sums with addresses are one instruction.
struct Sizes {
  uint32_t token_bytes, entry_bytes, row_bytes;  // between the numbers of an array; entries and rows are those of the history
  uint32_t index_bytes, rejected_bytes;
  int num_tokens, num_sequences, num_histories, history_width;
};

// Stores an int32 or an int64, without a branch.
__device__ __forceinline__ void store_number(const std::byte* to, int64_t number, bool is_int64) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b64 [%0], %1; @!p st.global.b32 [%0], %3;}" ::"l"(to),
               "l"(number), "r"(static_cast<int>(is_int64)), "r"(static_cast<int>(number))
               : "memory");
}

// A sequence and its row of history.
struct Sequence {
  int number;
  int row;         // below 0: skipped or refused
  int dropped;     // entries of it
  int begin, end;  // its tokens
};

// Where number i lies, `stride` bytes apart.
__device__ __forceinline__ const std::byte* number_at(const void* numbers, uint32_t i, uint32_t stride) {
  const std::byte* at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(i), "r"(stride), "l"(numbers));
  return at;
}

// The low word of a number that is small enough.
__device__ __forceinline__ uint32_t low_word(const int64_t* number) { return *reinterpret_cast<const uint32_t*>(number); }

// Loads an int32 or an int64, without a branch.
__device__ __forceinline__ int64_t load_number(const std::byte* from, bool is_int64) {
  int64_t number;
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.s64 %0, [%1]; @!p ld.global.s32 %0, [%1];}"
               : "=l"(number)
               : "l"(from), "r"(static_cast<int>(is_int64))
               : "memory");
  return number;
}

// The order of the layout: kOrder, or what the params say where that is kMaxOrder.
template <int kOrder>
__device__ __forceinline__ int order_of(const NgramHashParams& p) {
  return kOrder == kMaxOrder ? p.max_order : kOrder;
}

template <bool kPooled, int kOrder>
__device__ __forceinline__ Sequence sequence_of_block(const NgramHashParams& p, const Sizes& sizes) {
  const int b = static_cast<int>(blockIdx.x);
  Sequence of{b, b, 0, p.cu_seqlens[b], p.cu_seqlens[b + 1]};
  if constexpr (kPooled) {
    int64_t row = b, dropped = 0;
    if (p.state_indices != nullptr) row = load_number(number_at(p.state_indices, b, sizes.index_bytes), p.indices_are_int64);
    if (p.rejected != nullptr) dropped = load_number(number_at(p.rejected, b, sizes.rejected_bytes), p.rejected_are_int64);
    const int spare = sizes.history_width - (order_of<kOrder>(p) - 1);
    const bool is_row = static_cast<uint64_t>(row) < static_cast<uint32_t>(sizes.num_histories);
    const int no_row = static_cast<int>(row == kSkipped ? kSkipped : kRefused);
    of.row = is_row && static_cast<uint64_t>(dropped) <= static_cast<uint32_t>(spare) ? static_cast<int>(row) : no_row;
    of.dropped = static_cast<int>(dropped);
  }
  return of;
}

// Where the entry of the history lies that stands `back` >= 1 tokens before the chunk.
template <bool kPooled>
__device__ __forceinline__ const std::byte* entry_at(const NgramHashParams& p, const Sizes& sizes, const Sequence& of, int back) {
  const uint32_t row = kPooled ? of.row : of.number, entry = (kPooled ? of.dropped : 0) + back - 1;
  return number_at(number_at(p.history, row, sizes.row_bytes), entry, sizes.entry_bytes);
}

// The canonical id of lookback `lane` of token t, boundary_id where it is blocked. All lanes.
template <bool kPooled, int kOrder>
__device__ __forceinline__ uint32_t lookback_of_lane(const NgramHashParams& p, const Sizes& sizes, const Sequence& of, int t,
                                                     int lane, int layer) {
  const int at = t - lane, into_chunk = at - of.begin;
  const std::byte* of_chunk = number_at(p.token_ids, at, sizes.token_bytes);
  const std::byte* from = into_chunk < 0 ? entry_at<kPooled>(p, sizes, of, -into_chunk) : of_chunk;
  bool readable = lane < order_of<kOrder>(p);
  if (into_chunk < 0) readable = readable && p.history != nullptr;
  if (p.dead_mask != nullptr && readable && into_chunk >= 0) readable = p.dead_mask[at] == 0;
  bool blocked = true;
  int32_t id = 0;
  if (readable) {
    const int64_t raw = load_number(from, p.ids_are_int64);
    if (static_cast<uint64_t>(raw) < static_cast<uint64_t>(p.vocab_size)) {
      id = static_cast<int32_t>(raw);
      if (p.token_map != nullptr) id = p.token_map[static_cast<uint32_t>(id)];
      blocked = lane > 0 && id == static_cast<int32_t>(p.eos_id);
    } else if (layer == 0 && (lane == 0 || (t == of.begin && raw != kBeforeStart && raw != kDeadToken))) {
      count_error(p.error_count);  // a token once, and an entry of the history once
    }
  }
  uint32_t before;  // and this one
  asm("mov.u32 %0, %%lanemask_le;" : "=r"(before));
  return (__ballot_sync(kAllLanes, blocked) & before) == 0 ? static_cast<uint32_t>(id) : static_cast<uint32_t>(p.boundary_id);
}

// Row ids of every step-th token of a sequence, from `first` on, in one layer. A lane takes a column.
template <bool kPooled, bool kPerColumn, int kOrder>
__device__ __forceinline__ void hash_tokens(const NgramHashParams& p, const Sizes& sizes, const Sequence& of, int first, int end,
                                            int step, int layer, int lane) {
  const int columns = (order_of<kOrder>(p) - 1) * p.heads;
  const uint32_t at = layer * columns + min(lane, columns - 1);
  const ExactModulus modulus{low_word(p.moduli + at), static_cast<uint64_t>(p.reciprocals[at])};
  const uint32_t offset = low_word(p.offsets + at);
  const int64_t* of_column = p.multipliers + (kPerColumn ? at : layer) * static_cast<uint32_t>(order_of<kOrder>(p));
  uint64_t multipliers[kOrder];  // 0 past the column's order
#pragma unroll
  for (int s = 0; s < kOrder; ++s) {
    if (s == order_of<kOrder>(p)) break;
    const auto multiplier = static_cast<uint64_t>(of_column[s]);  // loaded first: a choice, not a branch
    multipliers[s] = s < 2 || lane >= (s - 1) * p.heads ? multiplier : 0;
  }
#pragma unroll 1
  for (int t = first; t < end; t += step) {
    int32_t* out = p.row_ids + ((layer * sizes.num_tokens + t) * columns + lane);
    if (kPooled && of.row < 0) {
      if (lane < columns) *out = static_cast<int32_t>(kNoRow);
      continue;
    }
    const uint32_t id = lookback_of_lane<kPooled, kOrder>(p, sizes, of, t, lane, layer);
    uint64_t mix = 0;
#pragma unroll
    for (int s = 0; s < kOrder; ++s) {
      if (s == order_of<kOrder>(p)) break;
      const uint64_t product = __shfl_sync(kAllLanes, id, s) * multipliers[s];
      mix = kPerColumn ? mix + product : mix ^ product;
    }
    const uint32_t residue = kPerColumn ? modulus(mix) : modulus.of_signed(static_cast<int64_t>(mix));
    if (lane < columns) *out = static_cast<int32_t>(offset + residue);
  }
}

// Counts what check_host_data refuses of a sequence, but for its tokens and the values of its history. A warp.
template <bool kPooled, int kOrder>
__device__ __forceinline__ void count_errors(const NgramHashParams& p, const Sizes& sizes, const Sequence& of, int lane) {
  const int b = of.number;
  const bool wrong =
      of.begin > of.end || (b == 0 && of.begin != 0) || (b + 1 == sizes.num_sequences && of.end != sizes.num_tokens);
  if (wrong && lane == 0) count_error(p.error_count);
  if (kPooled && of.row < 0) {
    if (of.row == kRefused && lane == 0) count_error(p.error_count);
    return;
  }
  if (kPooled && p.state_indices != nullptr) {
#pragma unroll 1
    for (int other = lane; other < b; other += kLanes) {
      const std::byte* at = number_at(p.state_indices, other, sizes.index_bytes);
      if (load_number(at, p.indices_are_int64) == of.row) count_error(p.error_count);
    }
  }
  if (p.history == nullptr || of.begin >= of.end) return;
  bool is_before_start = true;
  if (lane > 0 && lane < order_of<kOrder>(p)) {
    is_before_start = load_number(entry_at<kPooled>(p, sizes, of, lane), p.ids_are_int64) == kBeforeStart;
  }
  const uint32_t known = __ballot_sync(kAllLanes, !is_before_start);
  const uint32_t in_front = (1U << lane) - 2;  // lanes 1 to lane - 1: an entry behind a kBeforeStart is wrong
  if (!is_before_start && (known & in_front) != in_front) count_error(p.error_count);
}

// Entry `column` of the sequence's row of history after its tokens: NgramHashParams::next_entry.
__device__ __forceinline__ int64_t next_entry(const NgramHashParams& p, const Sizes& sizes, const Sequence& of, int column) {
  const int tokens = of.end - of.begin, entry = column - tokens + of.dropped;
  const std::byte* from =
      number_at(number_at(p.history, of.row, sizes.row_bytes), min(entry, sizes.history_width - 1), sizes.entry_bytes);
  if (column < tokens) {
    const int t = of.end - 1 - column;
    if (p.dead(t)) return kDeadToken;
    from = number_at(p.token_ids, t, sizes.token_bytes);
  }
  const int64_t number = load_number(from, p.ids_are_int64);
  if (column < tokens) return static_cast<uint64_t>(number) < static_cast<uint64_t>(p.vocab_size) ? number : kDeadToken;
  return entry < sizes.history_width || number == kBeforeStart ? number : kForgotten;
}

// blockDim = (lanes, layers + 1, token slots), gridDim = sequences.
template <bool kPooled, bool kPerColumn, int kOrder>
__global__ void __launch_bounds__(kMaxWarps* kLanes) ngram_hash_few_kernel(const NgramHashParams p, const Sizes sizes) {
  const int lane = threadIdx.x, layer = threadIdx.y;
  wait_for_predecessor();
  const Sequence of = sequence_of_block<kPooled, kOrder>(p, sizes);
  const bool is_inside = of.begin >= 0 && of.end <= sizes.num_tokens;
  if (layer < p.num_layers) {
    if (is_inside)
      hash_tokens<kPooled, kPerColumn, kOrder>(p, sizes, of, of.begin + threadIdx.z, of.end, blockDim.z, layer, lane);
    if constexpr (kPooled) __syncthreads();
    return;
  }
  int64_t next = 0;
  const bool commits = kPooled && p.committed != nullptr && threadIdx.z == 0 && of.row >= 0 && is_inside && of.begin <= of.end &&
                       lane < sizes.history_width;
  if (threadIdx.z == 0) count_errors<kPooled, kOrder>(p, sizes, of, lane);
  if constexpr (kPooled) {
    if (commits) next = next_entry(p, sizes, of, lane);
    __syncthreads();  // every reader of the history is done
    if (commits)
      store_number(number_at(number_at(p.committed, of.row, sizes.row_bytes), lane, sizes.entry_bytes), next, p.ids_are_int64);
  }
}

bool is_pooled(const NgramHashParams& p) { return p.committed != nullptr || p.state_indices != nullptr || p.rejected != nullptr; }

template <bool kPooled, bool kPerColumn>
auto kernel_of(int max_order) {
  return max_order == 3   ? ngram_hash_few_kernel<kPooled, kPerColumn, 3>
         : max_order == 4 ? ngram_hash_few_kernel<kPooled, kPerColumn, 4>
                          : ngram_hash_few_kernel<kPooled, kPerColumn, kMaxOrder>;
}

Sizes sizes_of(const NgramHashParams& p) {
  const auto bytes = [](int64_t stride, bool is_int64) { return static_cast<uint32_t>(stride * (is_int64 ? 8 : 4)); };
  const bool pooled = is_pooled(p);
  return {bytes(p.token_stride, p.ids_are_int64),
          bytes(1, p.ids_are_int64),
          bytes(pooled ? p.history_stride : p.max_order - 1, p.ids_are_int64),
          bytes(p.index_stride, p.indices_are_int64),
          bytes(p.rejected_stride, p.rejected_are_int64),
          static_cast<int>(p.num_tokens),
          static_cast<int>(p.num_sequences),
          static_cast<int>(p.num_histories),
          static_cast<int>(p.history_width)};
}

bool is_few(const NgramHashParams& p) {
  const int64_t widest = std::max({p.token_stride, p.history_stride, p.index_stride, p.rejected_stride});
  if (widest > UINT32_MAX / 8 || std::max({p.num_histories, p.num_sequences, p.history_width}) > INT32_MAX) return false;
  return p.num_tokens <= kMaxTokens && p.num_tokens <= kTokensPerSequence * p.num_sequences && p.num_layers < kMaxWarps &&
         p.columns() <= kLanes && (p.committed == nullptr || p.history_width <= kLanes);
}

}  // namespace

bool ngram_hash_few_cuda(const NgramHashParams& p, void* stream) {
  if (!is_few(p)) return false;
  const int slots = static_cast<int>(std::min(ceil_div(p.num_tokens, p.num_sequences), int64_t{kMaxWarps / (p.num_layers + 1)}));
  const auto kernel = is_pooled(p) ? (p.per_column ? kernel_of<true, true>(p.max_order) : kernel_of<true, false>(p.max_order))
                                   : (p.per_column ? kernel_of<false, true>(p.max_order) : kernel_of<false, false>(p.max_order));
  EK_CHECK(p.num_sequences <= kMaxGridX, "ngram_hash: num_sequences is " << p.num_sequences);
  const dim3 block(kLanes, static_cast<unsigned>(p.num_layers + 1), static_cast<unsigned>(slots));
  launch_overlapping(kernel, static_cast<unsigned>(p.num_sequences), block, static_cast<cudaStream_t>(stream), p, sizes_of(p));
  return true;
}

}  // namespace engram_kernels
