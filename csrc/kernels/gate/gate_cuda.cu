// CUDA kernels of gate. Contract: gate.h; layout of a block: gate_row_cuda.h.
//
// Mapping  a block takes a token after the other, all its branches at once. Hidden and key stay in registers between the
//          sums and the output; the products of the weights stay in shared memory for the life of the block; the value
//          is read once and shared by the branches. The second kernel, element by element, takes what is not aligned or
//          too wide, and reads hidden twice (the second time out of the cache).
// Traffic  hidden, key and value once, output once; the weights once a block.
// Limits   the first kernel: rows on 16 bytes, and at most kMaxThreads * kVectors vectors in a token's branches.
#include <algorithm>

#include "kernels/gate/gate_row_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 640;
constexpr int kThreadsPerSm = 640;  // by registers
constexpr int kRowThreads = 128;
constexpr int kStaticBytes = 1024;  // of shared memory, at most

extern __shared__ float4 shared[];

struct Tile {
  int vectors;   // of a row
  int branches;  // of a block
  // float4 of dynamic shared memory: the products of the weights, in `planes` a row, then two values as they are stored
  __host__ __device__ int value_at(int planes) const { return branches * planes * vectors; }
  __host__ __device__ int size(int planes) const { return value_at(planes) + 2 * vectors; }
};

// A masked token: hidden as it is, or zeros.
template <DType kType>
__device__ __forceinline__ void pass_row(const GateParams& p, int64_t t, int branch, int vectors) {
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 v = p.options.add_residual ? *vector_at<const uint4>(p.hidden, kType, t, branch, i) : make_uint4(0, 0, 0, 0);
    *vector_at<uint4>(p.out, kType, t, branch, i) = v;
  }
}

template <DType kType>
__device__ __forceinline__ void stage_value(const GateParams& p, int64_t t, int vectors, float4* values) {
  const auto* row =
      reinterpret_cast<const uint4*>(static_cast<const std::byte*>(p.value) + t * p.value_stride * dtype_bytes(kType));
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < vectors; i += blockDim.x * blockDim.y) copy_async(values + i, row + i);
}

template <DType kType, int kVectors, bool kWhole, bool kResidual>
__device__ __forceinline__ void write_out(const uint4 (&h)[kVectors], const uint4* value, int vectors, float gate, uint4* out) {
  constexpr int kElements = kVectorElements<kType>;
  const int first = first_vector<kVectors>();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    if (!kWhole && i >= vectors) break;
    float hs[kElements], vs[kElements];
    unpack_vector<kType>(value[i], vs);
    unpack_vector<kType>(h[j], hs);
#pragma unroll
    for (int e = 0; e < kElements; ++e) hs[e] = kResidual ? fmaf(gate, vs[e], hs[e]) : gate * vs[e];
    store_floats<kType>(out + i, hs);
  }
}

template <DType kType, int kVectors, bool kWhole>
__device__ __forceinline__ void gate_token(const GateParams& p, const Tile& tile, int64_t t, int branch, int buffer) {
  constexpr int kElements = kVectorElements<kType>, kPlanes = kElements / 4;
  __shared__ float4 partial[kMaxThreads / kWarp];
  __shared__ float gates[kMaxThreads / kWarp];
  const int vectors = tile.vectors;
  const float4* weights = shared + threadIdx.y * kPlanes * vectors;
  float4* value = shared + tile.value_at(kPlanes) + buffer * vectors;
  const int first = first_vector<kVectors>();
  const auto* hidden = vector_at<const uint4>(p.hidden, kType, t, branch, 0);
  const auto* key = vector_at<const uint4>(p.key, kType, t, branch, 0);
  uint4 h[kVectors], k[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    if (!kWhole && i >= vectors) break;
    h[j] = hidden[i];
    k[j] = key[i];
  }
  stage_value<kType>(p, t, vectors, value);
  float sums[3] = {0, 0, 0};  // dot, hidden^2, key^2
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    if (!kWhole && i >= vectors) break;
    float hs[kElements], ks[kElements], ws[kElements];
    unpack_vector<kType>(h[j], hs);
    unpack_vector<kType>(k[j], ks);
    load_planes<kElements>(weights, vectors, i, ws);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      sums[0] = fmaf(hs[e], ks[e] * ws[e], sums[0]);
      sums[1] = fmaf(hs[e], hs[e], sums[1]);
      sums[2] = fmaf(ks[e], ks[e], sums[2]);
    }
  }
  wait_for_copies();
  branch_sums(sums, partial);
  if (threadIdx.x == 0) gates[threadIdx.y] = gate_score(p.options, p.hidden_size, sums[0], sums[1], sums[2]).gate;
  __syncthreads();
  const float gate = gates[threadIdx.y];
  const auto* stored = reinterpret_cast<const uint4*>(value);
  auto* out = vector_at<uint4>(p.out, kType, t, branch, 0);
  p.options.add_residual ? write_out<kType, kVectors, kWhole, true>(h, stored, vectors, gate, out)
                         : write_out<kType, kVectors, kWhole, false>(h, stored, vectors, gate, out);
}

// kWhole: every thread has all its vectors, so nothing is guarded.
template <DType kType, int kVectors, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) gate_tokens(const GateParams p, const Tile tile) {
  const int branch = blockIdx.y * tile.branches + threadIdx.y;
  constexpr int kElements = kVectorElements<kType>;
  stage_weights<kElements, kVectors>(p.weights, p.hidden_size, branch, tile.vectors,
                                     shared + threadIdx.y * (kElements / 4) * tile.vectors);
  int buffer = 0;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    if (p.masked(t)) {
      pass_row<kType>(p, t, branch, tile.vectors);
    } else {
      gate_token<kType, kVectors, kWhole>(p, tile, t, branch, buffer);
      buffer ^= 1;  // the value of this token may still be read when the next one's is written
    }
  }
}

// Any size and alignment: a block a row.
template <DType kType>
__global__ void __launch_bounds__(kRowThreads, 8) gate_rows(const GateParams p) {
  __shared__ float4 partial[kRowThreads / kWarp];
  __shared__ float score;
  const int size = static_cast<int>(p.hidden_size);
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const int m = blockIdx.y;
    const bool masked = p.masked(t);
    const void* hidden = vector_at<std::byte>(p.hidden, kType, t, m, 0);
    const void* key = vector_at<std::byte>(p.key, kType, t, m, 0);
    void* out = vector_at<std::byte>(p.out, kType, t, m, 0);
    float sums[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < size && !masked; i += kRowThreads) {
      const float h = load_element(hidden, kType, i), k = load_element(key, kType, i);
      const float w = load_element(p.weights.w_hidden, p.weights.dtype, m * size + i) *
                      load_element(p.weights.w_key, p.weights.dtype, m * size + i);
      sums[0] = fmaf(h, k * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(k, k, sums[2]);
    }
    branch_sums(sums, partial);
    if (threadIdx.x == 0) score = gate_score(p.options, size, sums[0], sums[1], sums[2]).gate;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kRowThreads) {
      if (masked) {  // bits, not values: a NaN keeps its payload
        for (int b = 0; b < dtype_bytes(kType); ++b) {
          const auto* from = static_cast<const std::byte*>(hidden) + i * dtype_bytes(kType) + b;
          static_cast<std::byte*>(out)[i * dtype_bytes(kType) + b] = p.options.add_residual ? *from : std::byte{0};
        }
        continue;
      }
      const float v = load_element(p.value, kType, t * p.value_stride + i);
      const float update = score * v;
      store_element(out, kType, i, p.options.add_residual ? fmaf(score, v, load_element(hidden, kType, i)) : update);
    }
    __syncthreads();  // score and partial are free again
  }
}

template <DType kType, int kVectors, bool kWhole>
void launch_tokens(const GateParams& p, const Tile& tile, int lanes, int shared_bytes, cudaStream_t stream) {
  const auto kernel = gate_tokens<kType, kVectors, kWhole>;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t resident = int64_t{num_multiprocessors()} * std::max(1, kThreadsPerSm / (lanes * tile.branches));
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, resident)), static_cast<unsigned>(p.branches / tile.branches)),
      block(static_cast<unsigned>(lanes), static_cast<unsigned>(tile.branches));
  kernel<<<grid, block, shared_bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
}

// Whether the first kernel took it.
template <DType kType>
bool launch_tokens(const GateParams& p, cudaStream_t stream) {
  constexpr int kPlanes = kVectorElements<kType> / 4, kBytes = dtype_bytes(kType);
  if (p.hidden_size % kVectorElements<kType> != 0 || !on_vectors(p.weights) ||
      !on_vectors(p.hidden, p.num_tokens, p.branches, kBytes) || !on_vectors(p.key, p.num_tokens, p.branches, kBytes) ||
      !on_vectors(p.out, p.num_tokens, p.branches, kBytes) ||
      !on_vectors({const_cast<void*>(p.value), p.value_stride, 0}, p.num_tokens, 1, kBytes)) {
    return false;
  }
  const int64_t vectors = p.hidden_size / kVectorElements<kType>;
  for (const int per_thread : {4, 8}) {
    if (vectors > int64_t{per_thread} * kMaxThreads) continue;
    const int lanes = lanes_for(vectors, per_thread);
    for (int64_t branches = p.branches; branches > 0; --branches) {  // as many in a block as fit
      if (p.branches % branches != 0 || lanes * branches > kMaxThreads) continue;
      const Tile tile{static_cast<int>(vectors), static_cast<int>(branches)};
      const int bytes = tile.size(kPlanes) * kVectorBytes;
      if (bytes > max_shared_bytes() - kStaticBytes) continue;
      if (per_thread == 4 && branches < p.branches) break;  // longer threads may hold them all
      per_thread == 8             ? launch_tokens<kType, 8, false>(p, tile, lanes, bytes, stream)
      : lanes * 4 == tile.vectors ? launch_tokens<kType, 4, true>(p, tile, lanes, bytes, stream)
                                  : launch_tokens<kType, 4, false>(p, tile, lanes, bytes, stream);
      return true;
    }
  }
  return false;
}

template <DType kType>
void launch(const GateParams& p, cudaStream_t stream) {
  if (launch_tokens<kType>(p, stream)) return;
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, int64_t{num_multiprocessors()} * 16)),
                  static_cast<unsigned>(p.branches));
  gate_rows<kType><<<grid, kRowThreads, 0, stream>>>(p);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void gate_cuda(const GateParams& p, void* stream) {
  check_params(p);
  if (p.num_tokens == 0) return;
  EK_CHECK(p.branches <= kMaxGridY, "gate: " << p.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= INT32_MAX, "gate: hidden_size is " << p.hidden_size << ", expected less than 2^31");
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kF32:
      return launch<DType::kF32>(p, on);
    case DType::kBf16:
      return launch<DType::kBf16>(p, on);
    case DType::kF16:
      return launch<DType::kF16>(p, on);
  }
}

}  // namespace engram_kernels
