// CUDA kernels of gather_gate. Contract: gather_gate.h, gate.h; layout of a block: gather_gate_block_cuda.h.
//
// A persistent block walks over tokens, kGroup branches at a time:
//   1. decode  the token's rows, which were copied to shared memory while the token before was worked on, once for all
//              branches
//   2. sums    dot, |h|^2 and |e|^2, per thread, then by warp
//   3. scores  one warp per branch turns them into the gate; the copies of the next token's rows start
//   4. output  h + gate * e goes out, and the hidden of what follows takes its place in the registers
// The products of the weights stay in shared memory for the life of the block where they fit. Few tokens are bound by
// latency: as long as there are enough multiprocessors, each of their branches has a block, which keeps all in registers and
// stages nothing (one token).
// Traffic  rows, ids and hidden once, output once; the weights once per block (else once per token, out of the cache).
// Limits   16-byte aligned rows of at most 1,536 vectors per branch, row_dim a multiple of a vector's elements. Other rows go to
//          gate_plain_cuda.h.
#include <algorithm>

#include "kernels/gather_gate/gather_gate_block_cuda.h"

namespace engram_kernels {
namespace {

template <bool kWhole, int kGroup>
constexpr int kMaxThreads = kGroup == 1 ? 768
                            : kWhole    ? 640
                                        : 512;  // of a multiprocessor too, by registers

template <int kGroup>
struct Sums {                                  // of a group, by warp
  float of_branch[2 * kGroup][kMaxWarps + 1];  // dot, hidden^2
  float key[kMaxWarps];                        // key^2
  float gates[kGroup];
};

// Sums of the vectors of this warp, for the branches of the group. kWhole: every thread has all its vectors.
template <DType kType, bool kStaged, bool kWhole, int kGroup>
__device__ __forceinline__ void sum_group(const GatherGateParams& p, const Tile& tile, int branch, int count,
                                          const VectorPlace (&places)[kVectors], const uint4 (&held)[kGroup][kVectors],
                                          const float (&e)[kVectors][kVectorElements<kType>], Sums<kGroup>& sums) {
  constexpr int kElements = kVectorElements<kType>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float v[2 * kGroup] = {};
  Products<kElements, kStaged, kWhole> products(p, tile, branch, places);
#pragma unroll
  for (int m = 0; m < kGroup; ++m, products.next_branch()) {
    if (m >= count) break;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int quad = 0; quad < kElements / 4; ++quad) {  // four elements at a time, for the registers' sake
        float h[4], w[4];
        products.load(j, quad, w);
        unpack_four<kType>(held[m][j], quad, h);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          v[2 * m] = fmaf(h[n], e[j][4 * quad + n] * w[n], v[2 * m]);
          v[2 * m + 1] = fmaf(h[n], h[n], v[2 * m + 1]);
        }
      }
    }
  }
  constexpr int kLanes = kWarp / (2 * kGroup);
  const float sum = spread_sums<kLanes>(v);
  if (lane % kLanes == 0) sums.of_branch[lane / kLanes][warp] = sum;
  if (branch > 0) return;
  float key[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int n = 0; n < kElements; ++n) key[0] = fmaf(e[j][n], e[j][n], key[0]);
  }
  warp_sums(key);
  if (lane == 0) sums.key[warp] = key[0];
}

// The gates of the group: a warp per branch.
template <int kGroup>
__device__ __forceinline__ void score_group(const GatherGateParams& p, int count, Sums<kGroup>& sums) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int m = threadIdx.x / kWarp; m < count; m += warps) {
    float v[3] = {0, 0, 0};
    if (lane < warps) v[0] = sums.of_branch[2 * m][lane], v[1] = sums.of_branch[2 * m + 1][lane], v[2] = sums.key[lane];
    warp_sums(v);
    if (lane == 0) sums.gates[m] = gate_score(p.options, p.hidden_size, v[0], v[1], v[2]).gate;
  }
}

// What takes the place of a group's vectors when it is written: those of the next group, or of the next token.
struct Following {
  const std::byte* from;  // of the first branch
  int count;              // branches; 0: there is nothing to come
};

// Writes the group and asks for the next one.
template <DType kType, bool kResidual, bool kWhole, int kGroup>
__device__ __forceinline__ void write_group(const GatherGateParams& p, int count, const VectorPlace (&places)[kVectors],
                                            const float* gates, const float (&e)[kVectors][kVectorElements<kType>], std::byte* to,
                                            Following next, uint4 (&held)[kGroup][kVectors]) {
  constexpr int kElements = kVectorElements<kType>;
#pragma unroll
  for (int m = 0; m < kGroup; ++m) {
    if (m < count) {
      const float gate = gates[m];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!kWhole && !places[j].is_there()) continue;
        uint32_t words[4];
#pragma unroll
        for (int quad = 0; quad < kElements / 4; ++quad) {
          float h[4];
          unpack_four<kType>(held[m][j], quad, h);
#pragma unroll
          for (int n = 0; n < 4; ++n) h[n] = kResidual ? fmaf(gate, e[j][4 * quad + n], h[n]) : gate * e[j][4 * quad + n];
          pack_four<kType>(h, words + 2 * quad);
        }
        store_words(to + j * kWarp * kVectorBytes, words);
      }
    }
    if (m < next.count) load_vectors<kWhole>(next.from, places, held[m]);
    to += p.out.branch_stride * dtype_bytes(kType), next.from += p.hidden.branch_stride * dtype_bytes(kType);
  }
}

// Writes the branches of a masked token: hidden as it is, or zeros.
template <int kGroup>
__device__ __forceinline__ void pass_group(bool residual, int64_t stride, int count, const VectorPlace (&places)[kVectors],
                                           std::byte* to, const uint4 (&held)[kGroup][kVectors]) {
#pragma unroll
  for (int m = 0; m < kGroup; ++m, to += stride) {
    if (m >= count) break;
    uint4 written[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) written[j] = residual ? held[m][j] : make_uint4(0, 0, 0, 0);
    store_vectors(to, places, written);
  }
}

template <DType kType, bool kStaged, bool kWhole, int kGroup>
__global__ void __launch_bounds__(kMaxThreads<kWhole, kGroup>) gather_gate_kernel(const GatherGateParams p, const Tile tile) {
  constexpr int kElements = kVectorElements<kType>;
  __shared__ Sums<kGroup> sums;
  const int first = kGroup == 1 ? blockIdx.y * tile.branches : 0;
  VectorPlace places[kVectors];
  find_places<kElements>(p, tile, places);
  Coming next = look_ahead(p, tile, blockIdx.x);
  describe_rows(p, tile, next);
  if (kStaged) stage_weights<kElements, kVectors>(p.weights, p.hidden_size, first, tile.branches, tile.vectors, shared);
  uint4 held[kGroup][kVectors] = {};
  load_group<kType>(p.hidden, first_vector_at<kType>(p.hidden, blockIdx.x, first), min(kGroup, tile.branches), places, held);
  __syncthreads();
  stage_rows(p, tile);
#pragma unroll 1
  for (int t = blockIdx.x; t < tile.tokens; t += gridDim.x) {
    const bool masked = next.masked;
    next = look_ahead(p, tile, t + gridDim.x);
    wait_for_copies();
    __syncthreads();
    float e[kVectors][kElements];
    if (!masked) decode_memory<kWhole>(p, tile, places, e);
#pragma unroll 1
    for (int branch = 0; branch < tile.branches; branch += kGroup) {
      const int count = min(kGroup, tile.branches - branch), left = tile.branches - branch - count;
      if (!masked) sum_group<kType, kStaged, kWhole>(p, tile, branch, count, places, held, e, sums);
      __syncthreads();  // also: the rows are decoded, and where they were is free
      if (branch == 0) describe_rows(p, tile, next);
      if (!masked) score_group(p, count, sums);
      __syncthreads();
      const bool ends = t + static_cast<int>(gridDim.x) >= tile.tokens;
      if (branch == 0 && !ends) stage_rows(p, tile);
      std::byte* to = first_vector_at<kType>(p.out, t, first + branch);
      const int from_token = left > 0 ? t : t + static_cast<int>(gridDim.x),
                from_branch = first + (left > 0 ? branch + kGroup : 0);
      const Following following{first_vector_at<kType>(p.hidden, from_token, from_branch), left > 0 ? min(kGroup, left)
                                                                                           : ends   ? 0
                                                                                                    : min(kGroup, tile.branches)};
      if (masked) {
        pass_group(p.options.add_residual, p.out.branch_stride * dtype_bytes(kType), count, places, to, held);
        load_group<kType>(p.hidden, following.from, following.count, places, held);
      } else if (p.options.add_residual) {
        write_group<kType, true, kWhole>(p, count, places, sums.gates, e, to, following, held);
      } else {
        write_group<kType, false, kWhole>(p, count, places, sums.gates, e, to, following, held);
      }
    }
  }
}

// ---- one token -------------------------------------------------------------------------------------------------------

// A block per token and branch. Each thread decodes its part of the rows out of memory, so that nothing waits for a barrier
// before the sums; what it reads besides is asked for first, and all of it stays in registers.
template <DType kType, DType kWeights, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads<false, 1>) gather_gate_one_token_kernel(const GatherGateParams p, const Tile tile) {
  static_assert(kTokenVectors == kVectors);
  constexpr int kElements = kVectorElements<kType>, kWords = dtype_bytes(kWeights) / dtype_bytes(kType);
  __shared__ Sums<1> sums;
  const int t = blockIdx.x, branch = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  wait_for_predecessor();
  const bool masked = p.masked(t);
  VectorPlace places[kVectors];
  find_places<kElements>(p, tile, places);
  const bool there[kVectors] = {kWhole || places[0].is_there(), kWhole || places[1].is_there()};
  int64_t ids[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) ids[j] = there[j] && !masked ? p.row_id(t, places[j].row()) : kNoRow;
  uint4 held[1][kVectors], hidden[kVectors][1], of_hidden[kVectors][kWords], of_key[kVectors][kWords];
  const uint32_t weights_at = (branch * static_cast<uint32_t>(tile.vectors) + first_vector<kVectors>()) * (kVectorBytes * kWords);
  load_row<kWhole>(static_cast<const std::byte*>(p.weights.w_hidden) + weights_at, there, of_hidden);
  load_row<kWhole>(static_cast<const std::byte*>(p.weights.w_key) + weights_at, there, of_key);
  load_row<kWhole>(first_vector_at<kType>(p.hidden, t, branch), there, hidden);
  std::byte* out = first_vector_at<kType>(p.out, t, branch);
  if (masked) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) held[0][j] = hidden[j][0];
    return pass_group(p.options.add_residual, 0, 1, places, out, held);
  }
  float e[kVectors][kElements] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (static_cast<uint64_t>(ids[j]) >= static_cast<uint64_t>(p.table.num_rows)) {
      if (ids[j] != kNoRow && branch == 0 && places[j].element() == 0) count_error(p.error_count);
      continue;
    }
    const auto *row = reinterpret_cast<const unsigned char*>(p.table.row(ids[j])),
               *scales = reinterpret_cast<const unsigned char*>(p.table.row_scales(ids[j]));
    with_row_decode(p.table.format, [&](auto format) {
      constexpr RowFormat kFormat = decltype(format)::value;
      decode<kFormat, kElements>(p.table, row, scales, places[j].element(), tensor_scale_of<kFormat>(p.table), e[j]);
    });
  }
  float h[kVectors][kElements], v[2] = {0, 0}, key[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    float w[kElements];
    unpack_once<kType>(hidden[j][0], h[j]);
    multiply_weights<kWeights>(of_hidden[j], of_key[j], w);
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      v[0] = fmaf(h[j][n], e[j][n] * w[n], v[0]);
      v[1] = fmaf(h[j][n], h[j][n], v[1]);
      key[0] = fmaf(e[j][n], e[j][n], key[0]);
    }
  }
  const float sum = spread_sums<kWarp / 2>(v);
  warp_sums(key);
  if (lane % (kWarp / 2) == 0) sums.of_branch[lane / (kWarp / 2)][warp] = sum;
  if (lane == 0) sums.key[warp] = key[0];
  __syncthreads();
  score_group(p, 1, sums);
  __syncthreads();
  const float gate = sums.gates[0];
  const auto write = [&](bool residual) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int n = 0; n < kElements; ++n) h[j][n] = residual ? fmaf(gate, e[j][n], h[j][n]) : gate * e[j][n];
      if (kWhole || there[j]) store_floats<kType>(out + j * kWarp * kVectorBytes, h[j]);
    }
  };
  p.options.add_residual ? write(true) : write(false);
}

// Whether it was launched: what a thread decodes at once is aligned in memory, and the block is not too wide.
template <DType kType>
bool launch_one_token(const GatherGateParams& p, int64_t /*branches*/, cudaStream_t stream) {
  const RowSource& s = p.table;
  const int64_t elements = kVectorElements<kType>, vectors = p.hidden_size / elements;
  const uint64_t load_bytes = static_cast<uint64_t>(std::min<int64_t>(value_bytes(s.format, elements), kVectorBytes));
  const bool words = !has_row_scales(s.format) || scale_bytes(s.format) == 1 ||
                     (reinterpret_cast<uintptr_t>(s.scales) | static_cast<uint64_t>(s.scale_stride_bytes)) % 4 == 0;
  if ((reinterpret_cast<uintptr_t>(s.rows) | static_cast<uint64_t>(s.row_stride_bytes)) % load_bytes != 0 || !words) return false;
  if (vectors > kVectors * kMaxThreads<false, 1> || s.row_dim % elements != 0 || s.row_dim > kMaxRowDim) return false;
  Tile tile{};
  tile.vectors = static_cast<int>(vectors);
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(p.branches));
  const int threads = lanes_for(vectors, kVectors);
  const bool floats = p.weights.dtype == DType::kF32, whole = vectors == int64_t{kVectors} * threads;
  const auto kernel =
      floats ? (whole ? gather_gate_one_token_kernel<kType, DType::kF32, true>
                      : gather_gate_one_token_kernel<kType, DType::kF32, false>)
             : (whole ? gather_gate_one_token_kernel<kType, kType, true> : gather_gate_one_token_kernel<kType, kType, false>);
  launch_overlapping(kernel, grid, static_cast<unsigned>(threads), stream, p, tile);
  return true;
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Whether it was launched: the block is not too wide, and what it holds of `branches` branches fits. kStaged: the products of
// the weights stay in shared memory; kWhole: every thread has all its vectors; kGroup: branches at a time.
template <DType kType, bool kStaged, bool kWhole, int kGroup>
bool launch_tokens(const GatherGateParams& p, int64_t branches, cudaStream_t stream) {
  constexpr int kElements = kVectorElements<kType>;
  const int64_t vectors = p.hidden_size / kElements, weights = branches * p.hidden_size * int64_t{sizeof(float)};
  if (vectors > kVectors * kMaxThreads<kWhole, kGroup> || (kStaged && weights > max_shared_bytes())) return false;
  const int threads = lanes_for(vectors, kVectors);
  Tile tile{};
  tile.vectors = static_cast<int>(vectors);
  tile.branches = static_cast<int>(branches);
  tile.tokens = static_cast<int>(p.num_tokens);
  if (kWhole && vectors != int64_t{kVectors} * threads) return false;
  if (p.columns > threads || !lay_out(p, kElements, kStaged ? static_cast<int>(weights) : 0, &tile)) return false;
  const auto kernel = gather_gate_kernel<kType, kStaged, kWhole, kGroup>;
  allow_max_shared_bytes(reinterpret_cast<const void*>(kernel));
  const int64_t by_shared = std::max(1, max_shared_bytes() / (tile.shared_bytes + kStaticBytes));
  const int64_t resident = num_multiprocessors() * std::min<int64_t>(by_shared, kMaxThreads<kWhole, kGroup> / threads);
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, resident)), static_cast<unsigned>(p.branches / branches));
  kernel<<<grid, threads, tile.shared_bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

// One compiled shape of the kernel, and what it is tried for.
struct Shape {
  bool (*launch)(const GatherGateParams& p, int64_t branches, cudaStream_t stream);
  bool one_branch_per_block;  // else all of them
  bool only_for_few_tokens;
};

// In the order in which they are tried: the products of the weights in shared memory before those that are read anew for each
// token, four branches at a time before one.
template <DType kType>
constexpr Shape kShapes[] = {
    {.launch = launch_one_token<kType>, .one_branch_per_block = true, .only_for_few_tokens = true},
    {.launch = launch_tokens<kType, true, false, 1>, .one_branch_per_block = true, .only_for_few_tokens = true},
    {.launch = launch_tokens<kType, true, true, 4>, .one_branch_per_block = false, .only_for_few_tokens = false},
    {.launch = launch_tokens<kType, true, false, 4>, .one_branch_per_block = false, .only_for_few_tokens = false},
    {.launch = launch_tokens<kType, false, false, 4>, .one_branch_per_block = false, .only_for_few_tokens = false},
    {.launch = launch_tokens<kType, true, false, 1>, .one_branch_per_block = false, .only_for_few_tokens = false},
    {.launch = launch_tokens<kType, false, false, 1>, .one_branch_per_block = false, .only_for_few_tokens = false},
};

// Whether one of the shapes took it.
template <DType kType>
bool launch_tokens(const GatherGateParams& p, cudaStream_t stream) {
  constexpr int kBytes = dtype_bytes(kType);
  if (p.num_tokens > INT32_MAX / 2 || p.hidden_size % kVectorElements<kType> != 0 || !on_vectors(p.weights) ||
      !on_vectors(p.hidden, p.num_tokens, p.branches, kBytes) || !on_vectors(p.out, p.num_tokens, p.branches, kBytes)) {
    return false;
  }
  const bool few = p.num_tokens * p.branches <= num_multiprocessors();
  for (const Shape& shape : kShapes<kType>) {
    if (shape.only_for_few_tokens && !few) continue;
    if (shape.launch(p, shape.one_branch_per_block ? 1 : p.branches, stream)) return true;
  }
  return false;
}

}  // namespace

void gather_gate_cuda(const GatherGateParams& p, void* stream) {
  check_params(p);
  if (p.num_tokens == 0) return;
  EK_CHECK(p.branches <= kMaxGridY, "gather_gate: " << p.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= INT32_MAX, "gather_gate: hidden_size is " << p.hidden_size << ", expected less than 2^31");
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.dtype, [&](auto type) {
    if (!launch_tokens<type.value>(p, on)) launch_plain<type.value>(p, on);
  });
}

}  // namespace engram_kernels
