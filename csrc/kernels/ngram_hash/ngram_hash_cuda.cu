// CUDA kernel of ngram_hash. Contract and formula: ngram_hash.h.
//
// Mapping  a block takes a tile of tokens and up to kMaxLayers layers. The canonical ids of the tile and its lookback
// go
//          to shared memory; then each thread mixes whole tokens, every order and layer; then each thread keeps kWidth
//          columns of one layer in registers and walks the tokens, so that warps store whole stretches of the output.
// Modulus  no division, six machine instructions: ngram_hash_residue_cuda.h.
// Traffic  reads 4 or 8 B a token (and 4 B of token map) once per kMaxLayers layers, writes 4 B * columns * layers.
// Limits   the constants of a block's columns must fit in 48 KiB of shared memory: about 2,000 columns.
#include "common/cuda_check.h"
#include "kernels/ngram_hash/ngram_hash.h"
#include "kernels/ngram_hash/ngram_hash_residue_cuda.h"
#include "kernels/ngram_hash/ngram_hash_tile_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxLayers = 2;  // layers of one block: token ids are read once for all of them
constexpr int kMaxThreads = 256;
constexpr int kMinThreads = 96;
constexpr int kTilesPerSm = 4;  // before tiles grow
constexpr int kMaxTile = 512;   // tokens; amortises the constants of the columns

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

// Row ids of kWidth columns from the mixes of their order, one token a call.
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

// The same for the tokens j, j + step, .. below `count`; `last_row`: of each head, from which a negative mix counts
// down.
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
      const Column column = make_column(static_cast<uint32_t>(p.moduli[base + c]), static_cast<uint32_t>(p.offsets[base + c]));
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

// blockDim = (vectors, token slots, layers); gridDim = (tiles, groups of layers)
template <int kWidth, bool kPerColumn, int kLayers>
__global__ void __launch_bounds__(kMaxThreads, 4) ngram_hash_kernel(const NgramHashParams p, const Plan plan) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int first_layer = blockIdx.y * kLayers, layers = min(kLayers, p.num_layers - first_layer);
  const int first = blockIdx.x * plan.tile, count = min(plan.tile, static_cast<int>(p.num_tokens) - first);
  const Reader reader(p);

  if (thread < 32) {
    mark_sequence_starts(p, plan, first, count, thread);
  } else {
    int32_t* words = shared_at<int32_t>(plan.words_at) + kMaxOrder;
#pragma unroll 1
    for (int j = thread - 32 - (p.max_order - 1); j < count; j += threads - 32) {
      words[j] = reader.token(first + j, j >= 0 && blockIdx.y == 0);
    }
  }
  const bool can_wrap = stage_constants<kPerColumn>(p, plan, first_layer, layers, thread, threads);
  const bool is_signed = __syncthreads_or(can_wrap);

#pragma unroll 1
  for (int j = thread; j < count; j += threads) {
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

// Lays out the shared memory: 16-byte things first.
void place(const NgramHashParams& p, Plan* plan) {
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
  place(p, &plan);
  while (plan.shared_bytes > kMaxSharedBytes && (plan.layers > 1 || plan.tile > kMinTile)) {
    plan.tile > kMinTile ? plan.tile /= 2 : plan.layers = 1;
    place(p, &plan);
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

template <int kWidth, bool kPerColumn, int kLayers>
void launch(const NgramHashParams& p, const Plan& plan, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.num_tokens, plan.tile), groups = ceil_div(p.num_layers, plan.layers);
  EK_CHECK(groups <= kMaxGridY, "ngram_hash: " << p.num_layers << " layers are too many for one launch");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(groups));
  ngram_hash_kernel<kWidth, kPerColumn, kLayers><<<grid, make_block(plan, kWidth), plan.shared_bytes, stream>>>(p, plan);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <int kWidth>
void launch_of_width(const NgramHashParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p, kWidth);
  if (p.per_column) {
    plan.layers == 1 ? launch<kWidth, true, 1>(p, plan, stream) : launch<kWidth, true, 2>(p, plan, stream);
  } else {
    plan.layers == 1 ? launch<kWidth, false, 1>(p, plan, stream) : launch<kWidth, false, 2>(p, plan, stream);
  }
}

}  // namespace

void ngram_hash_cuda(const NgramHashParams& p, void* stream) {
  check_sizes(p);
  if (p.num_tokens == 0) return;  // an empty grid is a launch error, an empty batch is not
  EK_CHECK(p.num_tokens <= INT32_MAX && p.num_sequences >= 1,
           "ngram_hash: " << p.num_tokens << " tokens in " << p.num_sequences << " sequences");
  // four columns of a 16-byte store must share an order and lie on a 16-byte boundary
  if (p.heads % 4 == 0 && reinterpret_cast<uintptr_t>(p.row_ids) % 16 == 0) {
    launch_of_width<4>(p, static_cast<cudaStream_t>(stream));
  } else {
    launch_of_width<1>(p, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace engram_kernels
