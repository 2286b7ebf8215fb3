// CUDA kernels of ngram_hash for many tokens. Contract and formula: ngram_hash.h; few tokens: ngram_hash_few_cuda.cu.
//
// A block takes a tile of tokens and up to kMaxLayers layers:
//   1. stage   the canonical ids of the tile and its lookback, and the constants of the columns, go to shared memory
//   2. mix     each thread mixes whole tokens, in every order and layer
//   3. reduce  each thread keeps kWidth columns of one layer in registers and walks over the tokens, so that warps store
//              whole stretches of the output. A remainder takes no division, six machine instructions: Column
//   4. commit  a second kernel updates the histories, which other blocks may still read
// Traffic  4 or 8 bytes per token (and 4 of the token map) read once per kMaxLayers layers, 4 bytes * columns * layers
//          written.
// Limits   the constants of a block's columns must fit in 48 KiB of shared memory: about 2,000 columns.
#include "common/cuda_check.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {
namespace {

constexpr int kMaxLayers = 2;  // layers of one block: token ids are read once for all of them
constexpr int kMaxThreads = 256;
constexpr int kMinThreads = 96;
constexpr int kTilesPerSm = 4;  // before tiles grow
constexpr int kMaxTile = 512;   // tokens; amortises the constants of the columns
constexpr int kMinTile = 32;    // tokens
constexpr int kCommitThreads = 128;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr int kNoHistory = -1, kNotHashed = -2;  // in place of a token's sequence: its lookback stays in the chunk; skipped

// ---- remainders -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void split(uint64_t x, uint32_t* low, uint32_t* high) {
  asm("mov.b64 {%0, %1}, %2;" : "=r"(*low), "=r"(*high) : "l"(x));
}

// The compiler writes a 64-bit product, and a comparison and a selection for the minimum; these are one instruction each.
__device__ __forceinline__ uint64_t mad_wide_signed(uint32_t a, int32_t b, uint64_t c) {
  asm("mad.wide.s32 %0, %1, %2, %0;" : "+l"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint64_t widen(uint32_t a) {  // volatile: once, not in every turn of the loop
  uint64_t wide;
  asm volatile("cvt.u64.u32 %0, %1;" : "=l"(wide) : "r"(a));
  return wide;
}
__device__ __forceinline__ uint32_t min_unsigned(uint32_t a, uint32_t b) {
  asm("min.u32 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// x mod m for x < 2^63, without a division: q = floor(x R / 2^64) up to one, rest = x - q m, and one unsigned minimum.
//
// With R = 2^64 / m = high 2^32 + low, rounded, and x = xh 2^32 + xl, the low 32 bits of the quotient are those of
// xh high + ((xh low + xl high) >> 32). What that leaves out is xl low / 2^64, less than 1/2 because `low` is taken
// signed in [-2^31, 2^31); rounding R moves the quotient by less than x / 2^64 < 1/2; the shift floors.
//   low >= 0, R rounded down: q in (x/m - 2, x/m],     rest in [0, 2m),  fix = -m
//   low <  0, R rounded up:   q in (x/m - 1, x/m + 1), rest in (-m, m),  fix = +m
// and min(rest, rest + fix), unsigned and modulo 2^32, is the remainder, since 2m <= 2^32.
// m = 1 takes rest = x mod 2 in {0, 1} and fix = -1.
struct Column {
  int32_t low;
  uint64_t high;  // below 2^32
  uint32_t minus_modulus;
  uint32_t fix;
  uint32_t offset;  // of the head's rows

  __device__ __forceinline__ uint32_t residue(uint64_t x, uint32_t xl, uint32_t xh) const {
    uint32_t ignored, quotient;
    split(mad_wide_signed(xh, low, x * high), &ignored, &quotient);  // the product wraps in its high half, as it should
    const uint32_t rest = quotient * minus_modulus + xl;
    return min_unsigned(rest + fix, rest);
  }
};
constexpr int kColumnWords = 5;

// Constants of one modulus.
__device__ __forceinline__ Column make_column(uint32_t modulus, uint64_t reciprocal, uint32_t offset) {
  if (modulus == 1) return {0, 1U << 31, 0U - 2U, 0U - 1U, offset};
  uint32_t low = static_cast<uint32_t>(reciprocal), high = static_cast<uint32_t>(reciprocal >> 32);
  if (low < 1U << 31) return {static_cast<int32_t>(low), high, 0U - modulus, 0U - modulus, offset};
  return {static_cast<int32_t>(low + 1), high + 1, 0U - modulus, modulus, offset};
}

// ---- token ids ------------------------------------------------------------------------------------------------------

// What the launcher derives from the params. Places are bytes into the shared memory of a block.
struct Plan {
  int tile;                // tokens of a block
  int layers;              // of a block
  int num_columns;         // of a layer
  int vectors;             // num_columns / kWidth
  uint32_t heads_inverse;  // 2^32 / heads, rounded up
  int layer_mixes;         // tile * mix_stride
  int mix_stride;          // 8-byte words per token: orders, made odd so that neighbouring tokens lie in other banks
  int window_stride;       // 4-byte words per token, per_column only
  int columns_at;          // uint32 [layers][kColumnWords][num_columns]
  int multipliers_at;      // uint64 [max_order][kMaxLayers], or [layers][max_order][num_columns] if per_column
  int mixes_at;            // uint64 [layers][tile][mix_stride]
  int windows_at;          // uint32 [tile][window_stride]: canonical ids of a token and its lookback
  int words_at;            // int32 [kMaxOrder + tile], token j at kMaxOrder + j, see Reader
  int sequences_at;        // int32 [tile]: the sequence of a token among its first max_order - 1, or kNoHistory, or kNotHashed
  int shared_bytes;
};

template <class T>
__device__ __forceinline__ T* shared_at(int bytes) {
  extern __shared__ __align__(16) unsigned char shared[];
  return reinterpret_cast<T*>(shared + bytes);
}

// Token ids as words: a canonical id; ~eos_id for EOS; `dead` for what is dead, bad or before the text. Negative words
// block a lookback.
template <bool kPooled>
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
    const int64_t raw = kPooled ? p.history_id(sequence, back) : p.own_history_id(sequence, back);
    if (static_cast<uint64_t>(raw) < static_cast<uint64_t>(p.vocab_size)) return word(raw);
    if (count_errors && raw != kBeforeStart && raw != kDeadToken) count_error(p.error_count);
    return dead;
  }
};

// The last sequence that begins at or before `t`, found by one warp with 32 probes per step.
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

// Counts what check_host_data refuses of sequence b, but for its tokens and the values of its history.
template <bool kPooled>
__device__ void count_sequence_errors(const NgramHashParams& p, int64_t b) {
  const int32_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  if (begin > end || (b == 0 && begin != 0) || (b + 1 == p.num_sequences && end != p.num_tokens)) count_error(p.error_count);
  if constexpr (kPooled) {
    const int64_t row = p.history_row(b);
    if (row == kRefused) count_error(p.error_count);
    if (row < 0) return;
    for (int64_t other = 0; p.state_indices != nullptr && other < b; ++other) {
      if (p.index(other) == row) count_error(p.error_count);
    }
  }
  if (p.history == nullptr || begin >= end) return;
  bool before_start = false;
  for (int back = 1; back < p.max_order; ++back) {
    const bool is_before_start = (kPooled ? p.history_id(b, back) : p.own_history_id(b, back)) == kBeforeStart;
    if (before_start && !is_before_start) count_error(p.error_count);
    before_start = before_start || is_before_start;
  }
}

// Marks the tokens whose lookback passes the start of their sequence, and those that are not hashed; counts what is wrong with
// sequences. One warp.
template <bool kPooled>
__device__ void mark_sequence_starts(const NgramHashParams& p, const Plan& plan, int first, int count, int lane) {
  int32_t* sequences = shared_at<int32_t>(plan.sequences_at);
  static_assert(kMinTile == 32, "one pass of 16 bytes per lane clears 128 tokens");
#pragma unroll 1
  for (int j = 4 * lane; j < plan.tile; j += 128)
    *reinterpret_cast<int4*>(sequences + j) = make_int4(kNoHistory, kNoHistory, kNoHistory, kNoHistory);
  __syncwarp();
  for (int64_t b = find_sequence(p, first, lane) + lane; b < p.num_sequences; b += 32) {
    const int64_t begin = int64_t{p.cu_seqlens[b]} - first, end = min(int64_t{p.cu_seqlens[b + 1]} - first, int64_t{count});
    if (begin >= count) break;
    const bool skipped = kPooled && p.history_row(b) < 0;
    const int stop = static_cast<int>(skipped ? end : min(end, begin + p.max_order - 1));
    for (int j = static_cast<int>(max(begin, int64_t{0})); j < stop; ++j) {
      sequences[j] = skipped ? kNotHashed : static_cast<int32_t>(b);
    }
  }
  if (blockIdx.y != 0) return;
  for (int64_t b = int64_t{blockIdx.x} * 32 + lane; b < p.num_sequences; b += int64_t{gridDim.x} * 32) {
    count_sequence_errors<kPooled>(p, b);
  }
}

// Calls use(s, c) with the canonical id c of the s-th lookback of token j, s = 0 .. max_order - 1; c is boundary_id where the
// lookback is blocked.
template <bool kPooled, class F>
__device__ __forceinline__ void for_each_lookback(const NgramHashParams& p, const Plan& plan, const Reader<kPooled>& reader,
                                                  int first, int j, const F& use) {
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

// ---- reduction ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load(const uint32_t* p, uint32_t (&v)[4]) {
  const uint4 all = *reinterpret_cast<const uint4*>(p);
  v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
}
__device__ __forceinline__ void load(const uint32_t* p, uint32_t (&v)[1]) { v[0] = *p; }
__device__ __forceinline__ void store(int32_t* out, const uint32_t (&v)[4]) {
  *reinterpret_cast<uint4*>(out) = make_uint4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store(int32_t* out, const uint32_t (&v)[1]) { *out = static_cast<int32_t>(v[0]); }

// kWidth neighbouring columns of one order.
template <int kWidth>
struct Columns {
  Column column[kWidth];

  __device__ __forceinline__ Columns(const Plan& plan, int layer, int first_column) {
    const uint32_t* words = shared_at<uint32_t>(plan.columns_at) + layer * kColumnWords * plan.num_columns + first_column;
    uint32_t part[kColumnWords][kWidth];
#pragma unroll
    for (int i = 0; i < kColumnWords; ++i) load(words + i * plan.num_columns, part[i]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      column[i] = {static_cast<int32_t>(part[0][i]), widen(part[1][i]), part[2][i], part[3][i], part[4][i]};
  }
};

// Row ids of kWidth columns from the mixes of their order, for one token.
template <int kWidth, bool kSigned>
__device__ __forceinline__ void reduce_mix(const Columns<kWidth>& columns, const uint32_t (&last_row)[kWidth], uint64_t mix,
                                           int32_t* out) {
  const uint64_t sign = kSigned ? static_cast<uint64_t>(static_cast<int64_t>(mix) >> 63) : 0;
  uint32_t xl, xh, rows[kWidth];
  split(mix ^ sign, &xl, &xh);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t residue = columns.column[i].residue(mix ^ sign, xl, xh);
    rows[i] = kSigned && sign != 0 ? last_row[i] - residue : columns.column[i].offset + residue;
  }
  store(out, rows);
}

// Row ids of the tokens j, j + step, .. below `count`; last_row is that of each head, from which a negative mix counts down.
template <int kWidth, bool kSigned>
__device__ __forceinline__ void reduce_mixes(const Columns<kWidth>& columns, const uint32_t (&last_row)[kWidth],
                                             const uint64_t* mixes, int mix_step, int32_t* out, int out_step, int j, int step,
                                             int count) {
  for (; j + 3 * step < count; j += 4 * step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reduce_mix<kWidth, kSigned>(columns, last_row, *mixes, out);
      mixes += mix_step;
      out += out_step;
    }
  }
#pragma unroll 1
  for (; j < count; j += step) {
    reduce_mix<kWidth, kSigned>(columns, last_row, *mixes, out);
    mixes += mix_step;
    out += out_step;
  }
}

template <int kWidth>
__device__ void reduce_windows(const Plan& plan, const Columns<kWidth>& columns, const uint32_t* ids, const uint64_t* multipliers,
                               int order, int32_t* out, int out_step, int j, int step, int count) {
#pragma unroll 1
  for (; j < count; j += step) {
    uint64_t sums[kWidth] = {};
    for (int s = 0; s < order; ++s) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += ids[s] * multipliers[s * plan.num_columns + i];
    }
    uint32_t rows[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      uint32_t xl, xh;
      split(sums[i], &xl, &xh);
      rows[i] = columns.column[i].offset + columns.column[i].residue(sums[i], xl, xh);
    }
    store(out, rows);
    ids += step * plan.window_stride;
    out += out_step;
  }
}

// The constants of the block's columns and multipliers, by all threads. Returns whether a product of a multiplier that
// this thread staged can pass 2^63.
template <bool kPerColumn>
__device__ __forceinline__ bool stage_constants(const NgramHashParams& p, const Plan& plan, int first_layer, int layers,
                                                int thread, int threads) {
#pragma unroll 1
  for (int layer = 0; layer < layers; ++layer) {
    const int64_t base = static_cast<int64_t>(first_layer + layer) * plan.num_columns;
    uint32_t* words = shared_at<uint32_t>(plan.columns_at) + layer * kColumnWords * plan.num_columns;
    uint64_t* multipliers = shared_at<uint64_t>(plan.multipliers_at) + layer * p.max_order * plan.num_columns;
#pragma unroll 1
    for (int c = thread; c < plan.num_columns; c += threads) {
      const Column column = make_column(static_cast<uint32_t>(p.moduli[base + c]), static_cast<uint64_t>(p.reciprocals[base + c]),
                                        static_cast<uint32_t>(p.offsets[base + c]));
      words[c] = static_cast<uint32_t>(column.low);
      words[plan.num_columns + c] = static_cast<uint32_t>(column.high);
      words[2 * plan.num_columns + c] = column.minus_modulus;
      words[3 * plan.num_columns + c] = column.fix;
      words[4 * plan.num_columns + c] = column.offset;
      for (int s = 0; kPerColumn && s < p.max_order; ++s) {
        multipliers[s * plan.num_columns + c] = static_cast<uint64_t>(p.multipliers[(base + c) * p.max_order + s]);
      }
    }
  }
  if (!kPerColumn && thread < kMaxLayers * kMaxOrder) {
    const int layer = thread % kMaxLayers, s = thread / kMaxLayers;
    const bool there = layer < layers && s < p.max_order;
    const uint64_t multiplier = there ? static_cast<uint64_t>(p.multipliers[(first_layer + layer) * p.max_order + s]) : 0;
    const uint64_t largest = static_cast<uint64_t>(p.num_ids - 1);
    shared_at<uint64_t>(plan.multipliers_at)[thread] = multiplier;
    return (__umul64hi(multiplier, largest) | (multiplier * largest) >> 63) != 0;
  }
  return false;
}

// Row ids of the block's tokens, by all threads.
template <int kWidth, bool kPerColumn>
__device__ __forceinline__ void reduce_columns(const NgramHashParams& p, const Plan& plan, int first_layer, int layers, int first,
                                               int count, bool is_signed) {
  const int layer = threadIdx.z;
  if (layer >= layers) return;
  const int slot = threadIdx.y, slots = blockDim.y, out_step = slots * plan.num_columns;
#pragma unroll 1
  for (int v = threadIdx.x; v < plan.vectors; v += blockDim.x) {
    const int column = v * kWidth;
    const Columns<kWidth> columns(plan, layer, column);
    const int order = 2 + (p.heads == 1 ? column : static_cast<int>(__umulhi(column, plan.heads_inverse)));
    int32_t* out = p.row_ids + ((first_layer + layer) * p.num_tokens + first + slot) * plan.num_columns + column;
    if constexpr (kPerColumn) {
      const uint64_t* multipliers = shared_at<uint64_t>(plan.multipliers_at) + layer * p.max_order * plan.num_columns + column;
      const uint32_t* ids = shared_at<uint32_t>(plan.windows_at) + slot * plan.window_stride;
      reduce_windows(plan, columns, ids, multipliers, order, out, out_step, slot, slots, count);
    } else {
      const uint64_t* mixes = shared_at<uint64_t>(plan.mixes_at) + layer * plan.layer_mixes + slot * plan.mix_stride + order - 2;
      uint32_t last_row[kWidth] = {};
      if (is_signed) {
        const int64_t* moduli = p.moduli + static_cast<int64_t>(first_layer + layer) * plan.num_columns + column;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) last_row[i] = columns.column[i].offset + static_cast<uint32_t>(moduli[i]) - 1;
        reduce_mixes<kWidth, true>(columns, last_row, mixes, slots * plan.mix_stride, out, out_step, slot, slots, count);
      } else {
        reduce_mixes<kWidth, false>(columns, last_row, mixes, slots * plan.mix_stride, out, out_step, slot, slots, count);
      }
    }
  }
}

// Puts kNoRow where a token is not hashed, behind what was written there.
__device__ void clear_rows_not_hashed(const NgramHashParams& p, const Plan& plan, int first_layer, int layers, int first,
                                      int count, int thread, int threads) {
  const int32_t* sequences = shared_at<int32_t>(plan.sequences_at);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    if (sequences[j] != kNotHashed) continue;
    for (int layer = first_layer; layer < first_layer + layers; ++layer) {
      int32_t* out = p.row_ids + (layer * p.num_tokens + first + j) * plan.num_columns;
      for (int c = thread; c < plan.num_columns; c += threads) out[c] = static_cast<int32_t>(kNoRow);
    }
  }
}

// blockDim = (vectors, token slots, layers); gridDim = (tiles, groups of layers). kPooled: histories are rows of a pool, may be
// skipped, for which 64 registers are too few; a hash without pays nothing for that.
template <int kWidth, bool kPerColumn, int kLayers, bool kPooled>
__global__ void __launch_bounds__(kMaxThreads, kPooled ? 3 : 4) ngram_hash_kernel(const NgramHashParams p, const Plan plan) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int first_layer = blockIdx.y * kLayers, layers = min(kLayers, p.num_layers - first_layer);
  const int first = blockIdx.x * plan.tile, count = min(plan.tile, static_cast<int>(p.num_tokens) - first);
  const bool can_skip = kPooled && (p.state_indices != nullptr || p.rejected != nullptr);
  const Reader<kPooled> reader(p);

  if (thread < 32) {
    mark_sequence_starts<kPooled>(p, plan, first, count, thread);
  } else {
    int32_t* words = shared_at<int32_t>(plan.words_at) + kMaxOrder;
#pragma unroll 1
    for (int j = thread - 32 - (p.max_order - 1); j < count; j += threads - 32) {
      words[j] = reader.token(first + j, j >= 0 && blockIdx.y == 0 && !can_skip);
    }
  }
  const bool can_wrap = stage_constants<kPerColumn>(p, plan, first_layer, layers, thread, threads);
  const bool is_signed = __syncthreads_or(can_wrap);

#pragma unroll 1
  for (int j = thread; j < count; j += threads) {
    if (can_skip && blockIdx.y == 0 && shared_at<int32_t>(plan.sequences_at)[j] != kNotHashed) reader.token(first + j, true);
    if constexpr (kPerColumn) {
      uint32_t* window = shared_at<uint32_t>(plan.windows_at) + j * plan.window_stride;
      for_each_lookback(p, plan, reader, first, j, [&](int s, int32_t id) { window[s] = static_cast<uint32_t>(id); });
    } else {
      const uint64_t* multipliers = shared_at<uint64_t>(plan.multipliers_at);
      uint64_t* to = shared_at<uint64_t>(plan.mixes_at) + j * plan.mix_stride;
      uint64_t mix[kLayers] = {};
      for_each_lookback(p, plan, reader, first, j, [&](int s, int32_t id) {
        const ulonglong2 both = *reinterpret_cast<const ulonglong2*>(multipliers + s * kMaxLayers);
#pragma unroll
        for (int layer = 0; layer < kLayers; ++layer) {
          mix[layer] ^= static_cast<uint32_t>(id) * static_cast<uint64_t>(layer == 0 ? both.x : both.y);
          if (s > 0) to[layer * plan.layer_mixes + (s - 1)] = mix[layer];  // nobody looks at a layer that is not there
        }
      });
    }
  }
  __syncthreads();

  reduce_columns<kWidth, kPerColumn>(p, plan, first_layer, layers, first, count, is_signed);
  if (!can_skip) return;
  __syncthreads();
  clear_rows_not_hashed(p, plan, first_layer, layers, first, count, thread, threads);
}

__global__ void ngram_hash_commit_kernel(const NgramHashParams p) {
  const int64_t b = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (b < p.num_sequences) p.commit(b);
}

// Lays out the shared memory: 16-byte things first.
void lay_out_shared(const NgramHashParams& p, Plan* plan) {
  int64_t bytes = 0;
  const auto next = [&bytes](int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, 16) * 16;
    return static_cast<int>(at < kMaxSharedBytes ? at : kMaxSharedBytes);
  };
  const int64_t columns = int64_t{plan->layers} * plan->num_columns;
  plan->layer_mixes = plan->tile * plan->mix_stride;
  plan->columns_at = next(columns * kColumnWords * 4);
  plan->multipliers_at = next((p.per_column ? columns * p.max_order : kMaxLayers * kMaxOrder) * 8);
  plan->mixes_at = next(int64_t{plan->layers} * plan->layer_mixes * 8);
  plan->windows_at = next(int64_t{plan->tile} * plan->window_stride * 4);
  plan->words_at = next(int64_t{plan->tile + kMaxOrder} * 4);
  plan->sequences_at = next(int64_t{plan->tile} * 4);
  plan->shared_bytes = static_cast<int>(bytes < INT32_MAX ? bytes : INT32_MAX);
}

Plan make_plan(const NgramHashParams& p, int width) {
  Plan plan{};
  const int sms = num_multiprocessors();
  plan.tile = kMaxTile;
  while (plan.tile > kMinTile && ceil_div(p.num_tokens, plan.tile) < int64_t{kTilesPerSm} * sms) plan.tile /= 2;
  plan.layers = p.num_layers < kMaxLayers ? p.num_layers : kMaxLayers;
  plan.num_columns = p.columns();
  plan.vectors = p.columns() / width;
  plan.heads_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + p.heads - 1) / p.heads);  // exact below 2^16 columns
  plan.mix_stride = p.per_column ? 0 : (p.max_order - 1) | 1;
  plan.window_stride = p.per_column ? p.max_order | 1 : 0;
  lay_out_shared(p, &plan);
  while (plan.shared_bytes > kMaxSharedBytes && (plan.layers > 1 || plan.tile > kMinTile)) {
    plan.tile > kMinTile ? plan.tile /= 2 : plan.layers = 1;
    lay_out_shared(p, &plan);
  }
  EK_CHECK(plan.shared_bytes <= kMaxSharedBytes, "ngram_hash: " << p.columns() << " columns of order " << p.max_order << " need "
                                                                << plan.shared_bytes << " bytes of shared memory, a block has "
                                                                << kMaxSharedBytes);
  return plan;
}

// Whole warps, and whole 128-byte lines of a layer, if there is a way.
dim3 make_block(const Plan& plan, int width) {
  const int x = plan.vectors < 64 ? plan.vectors : 64, plane = x * plan.layers;
  const int least = static_cast<int>(ceil_div(kMinThreads, plane));
  for (int slots = least; slots * plane <= kMaxThreads; ++slots) {
    if (slots * x * width % 32 == 0 && slots * plane % 32 == 0) return dim3(x, slots, plan.layers);
  }
  return dim3(x, least, plan.layers);
}

void launch_commit(const NgramHashParams& p, cudaStream_t stream) {
  if (p.num_sequences == 0) return;
  const int64_t blocks = ceil_div(p.num_sequences, kCommitThreads);
  EK_CHECK(blocks <= kMaxGridX, "ngram_hash: num_sequences is " << p.num_sequences);
  ngram_hash_commit_kernel<<<static_cast<unsigned>(blocks), kCommitThreads, 0, stream>>>(p);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <int kWidth, bool kPerColumn, int kLayers, bool kPooled>
void launch(const NgramHashParams& p, const Plan& plan, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.num_tokens, plan.tile), groups = ceil_div(p.num_layers, plan.layers);
  EK_CHECK(groups <= kMaxGridY, "ngram_hash: " << p.num_layers << " layers are too many for one launch");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(groups));
  ngram_hash_kernel<kWidth, kPerColumn, kLayers, kPooled><<<grid, make_block(plan, kWidth), plan.shared_bytes, stream>>>(p, plan);
  EK_CUDA_CHECK(cudaGetLastError());
  if (p.committed != nullptr) launch_commit(p, stream);
}

template <int kWidth, bool kPooled>
void launch_of_width(const NgramHashParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p, kWidth);
  if (p.per_column) {
    plan.layers == 1 ? launch<kWidth, true, 1, kPooled>(p, plan, stream) : launch<kWidth, true, 2, kPooled>(p, plan, stream);
  } else {
    plan.layers == 1 ? launch<kWidth, false, 1, kPooled>(p, plan, stream) : launch<kWidth, false, 2, kPooled>(p, plan, stream);
  }
}

template <bool kPooled>
void launch_pooled(const NgramHashParams& p, cudaStream_t stream) {
  // four columns of a 16-byte store must share an order and lie on a 16-byte boundary
  if (p.heads % 4 == 0 && reinterpret_cast<uintptr_t>(p.row_ids) % 16 == 0) {
    launch_of_width<4, kPooled>(p, stream);
  } else {
    launch_of_width<1, kPooled>(p, stream);
  }
}

}  // namespace

void ngram_hash_cuda(const NgramHashParams& p, void* stream) {
  check_sizes(p);
  if (p.num_tokens == 0) {  // an empty grid is a launch error, an empty batch is not
    if (p.committed != nullptr) launch_commit(p, static_cast<cudaStream_t>(stream));
    return;
  }
  EK_CHECK(p.num_tokens <= INT32_MAX && p.num_sequences >= 1,
           "ngram_hash: " << p.num_tokens << " tokens in " << p.num_sequences << " sequences");
  if (ngram_hash_few_cuda(p, stream)) return;
  const bool pooled = p.committed != nullptr || p.state_indices != nullptr || p.rejected != nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  pooled ? launch_pooled<true>(p, on) : launch_pooled<false>(p, on);
}

}  // namespace engram_kernels
