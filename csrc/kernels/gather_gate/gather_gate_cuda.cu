// CUDA kernels of gather_gate. Contract: gather_gate.h, gate.h; layout of a block: gather_gate_block_cuda.h.
//
// Mapping  a block takes a token after the other. Hidden stays in registers between the sums and the output, where the
//          next token's takes its place; what a thread needs of the memory vector, decoded once for all branches, too. The
//          products of the weights stay in shared memory for the life of the block where they fit. Few tokens are bound by
//          latency: as long as there are multiprocessors enough, each of their branches has a block. The second kernel,
//          element by element, takes what is not aligned or too wide, and reads its inputs twice (then out of the cache).
// Traffic  rows, ids and hidden once, output once; the weights once a block (else once a token, out of the cache).
// Limits   the first kernel: rows on 16 bytes, row_dim a multiple of a vector's elements, 1,536 vectors in a branch.
#include <algorithm>

#include "kernels/gather_gate/gather_gate_block_cuda.h"

namespace engram_kernels {
namespace {

template <bool kWhole, int kGroup>
constexpr int kMaxThreads = kGroup == 1 ? 768
                            : kWhole    ? 640
                                        : 512;  // of an SM too, by registers
constexpr int kRowThreads = 128;

template <int kGroup>
struct Sums {                                  // of a group, by warp
  float of_branch[2 * kGroup][kMaxWarps + 1];  // dot, hidden^2
  float key[kMaxWarps];                        // key^2
  float gates[kGroup];
};

// Sums of the vectors of this warp, for the branches of the group. kWhole: every thread has all its vectors.
template <DType kType, bool kStaged, bool kWhole, int kGroup>
__device__ __forceinline__ void sum_group(const GatherGateParams& p, const Tile& tile, int branch, int count,
                                          const Place (&places)[kVectors], const uint4 (&held)[kGroup][kVectors],
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
      for (int quad = 0; quad < kElements / 4; ++quad) {  // four elements a time, for the registers' sake
        float h[4], w[4];
        products.load(j, quad, w);
        unpack_quad<kType>(held[m][j], quad, h);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          v[2 * m] = fmaf(h[n], e[j][4 * quad + n] * w[n], v[2 * m]);
          v[2 * m + 1] = fmaf(h[n], h[n], v[2 * m + 1]);
        }
      }
    }
  }
  spread_sums<2 * kGroup>(v);
  if (lane % (kWarp / (2 * kGroup)) == 0) sums.of_branch[lane / (kWarp / (2 * kGroup))][warp] = v[0];
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

// The gates of the group: a warp a branch.
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
__device__ __forceinline__ void write_group(const GatherGateParams& p, int count, const Place (&places)[kVectors],
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
          unpack_quad<kType>(held[m][j], quad, h);
#pragma unroll
          for (int n = 0; n < 4; ++n) h[n] = kResidual ? fmaf(gate, e[j][4 * quad + n], h[n]) : gate * e[j][4 * quad + n];
          pack_quad<kType>(h, words + 2 * quad);
        }
        store_words(to + j * kWarp * kVectorBytes, words);
      }
    }
    if (m < next.count) load_vectors<kWhole>(next.from, places, held[m]);
    to += p.out.branch_stride * dtype_bytes(kType), next.from += p.hidden.branch_stride * dtype_bytes(kType);
  }
}

// The same for a masked token: hidden as it is, or zeros.
template <int kGroup>
__device__ __forceinline__ void pass_group(bool residual, int64_t stride, int count, const Place (&places)[kVectors],
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
__global__ void __launch_bounds__(kMaxThreads<kWhole, kGroup>) gather_gate_tokens(const GatherGateParams p, const Tile tile) {
  constexpr int kElements = kVectorElements<kType>;
  __shared__ Sums<kGroup> sums;
  const int first = kGroup == 1 ? blockIdx.y * tile.branches : 0;
  Place places[kVectors];
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

// Any size and alignment: a block a row.
template <DType kType>
__global__ void __launch_bounds__(kRowThreads, 8) gather_gate_rows(const GatherGateParams p) {
  __shared__ float4 partial[kRowThreads / kWarp];
  __shared__ float score;
  const int size = static_cast<int>(p.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const bool masked = p.masked(t);
    const void* hidden = vector_at<std::byte>(p.hidden, kType, t, m, 0);
    void* out = vector_at<std::byte>(p.out, kType, t, m, 0);
    float sums[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < size && !masked; i += kRowThreads) {
      const float h = load_element(hidden, kType, i), e = memory_element(p, t, i, m == 0);
      const float w = load_element(p.weights.w_hidden, p.weights.dtype, int64_t{m} * size + i) *
                      load_element(p.weights.w_key, p.weights.dtype, int64_t{m} * size + i);
      sums[0] = fmaf(h, e * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(e, e, sums[2]);
    }
    branch_sums(sums, partial);
    if (threadIdx.x == 0) score = gate_score(p.options, size, sums[0], sums[1], sums[2]).gate;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kRowThreads) {
      if (masked) {  // bits, not values: a NaN keeps its payload
        for (int b = 0; b < dtype_bytes(kType); ++b) {
          const int64_t at = int64_t{i} * dtype_bytes(kType) + b;
          const auto* from = static_cast<const std::byte*>(hidden) + at;
          static_cast<std::byte*>(out)[at] = p.options.add_residual ? *from : std::byte{0};
        }
        continue;
      }
      const float e = memory_element(p, t, i);
      store_element(out, kType, i, p.options.add_residual ? fmaf(score, e, load_element(hidden, kType, i)) : score * e);
    }
    __syncthreads();  // score and partial are free again
  }
}

// Whether it was launched: the block is not too wide, and what it holds of `branches` branches fits.
template <DType kType, bool kStaged, int kGroup, bool kWhole = false>
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
  const auto kernel = gather_gate_tokens<kType, kStaged, kWhole, kGroup>;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.shared_bytes));
  const int64_t by_shared = std::max(1, max_shared_bytes() / (tile.shared_bytes + kStaticBytes));
  const int64_t resident = num_multiprocessors() * std::min<int64_t>(by_shared, kMaxThreads<kWhole, kGroup> / threads);
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, resident)), static_cast<unsigned>(p.branches / branches));
  kernel<<<grid, threads, tile.shared_bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

// Whether the kernel of a block a token took it.
template <DType kType>
bool launch_tokens(const GatherGateParams& p, cudaStream_t stream) {
  constexpr int kBytes = dtype_bytes(kType);
  if (p.num_tokens > INT32_MAX / 2 || p.hidden_size % kVectorElements<kType> != 0 || !on_vectors(p.weights) ||
      !on_vectors(p.hidden, p.num_tokens, p.branches, kBytes) || !on_vectors(p.out, p.num_tokens, p.branches, kBytes)) {
    return false;
  }
  const int64_t all = p.branches;
  if (all > 1 && p.num_tokens * all <= num_multiprocessors() && launch_tokens<kType, true, 1>(p, 1, stream)) return true;
  return launch_tokens<kType, true, 4, true>(p, all, stream) || launch_tokens<kType, true, 4>(p, all, stream) ||
         launch_tokens<kType, false, 4>(p, all, stream) || launch_tokens<kType, true, 1>(p, all, stream) ||
         launch_tokens<kType, false, 1>(p, all, stream);
}

template <DType kType>
void launch(const GatherGateParams& p, cudaStream_t stream) {
  if (launch_tokens<kType>(p, stream)) return;
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, int64_t{num_multiprocessors()} * 16)),
                  static_cast<unsigned>(p.branches));
  gather_gate_rows<kType><<<grid, kRowThreads, 0, stream>>>(p);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void gather_gate_cuda(const GatherGateParams& p, void* stream) {
  check_params(p);
  if (p.num_tokens == 0) return;
  EK_CHECK(p.branches <= kMaxGridY, "gather_gate: " << p.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= INT32_MAX, "gather_gate: hidden_size is " << p.hidden_size << ", expected less than 2^31");
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.dtype, [&](auto type) { launch<type.value>(p, on); });
}

}  // namespace engram_kernels
