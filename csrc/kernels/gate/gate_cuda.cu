// CUDA kernels of gate. Contract: gate.h; layout of a block: gate_token_cuda.h.
//
// Mapping  a block takes a token after the other, kBranches branches of it: all of them, where they are 4, 2 or 1. A thread keeps
//          hidden, key and value of its vectors in registers from the sums to the output, and loads those of the next token
//          as soon as it is done with them. The products of the weights stay in shared memory for the life of the block. Few
//          tokens are bound by latency: as long as there are multiprocessors enough, each of their branches has a block. The
//          second kernel, element by element, takes what is not aligned or too wide, and reads hidden twice (the second
//          time out of the cache).
// Traffic  hidden and key once, output once, the value once a step of branches (one step where they are 4, 2 or 1 and not f16);
//          the weights once a block.
// Limits   the first kernel: rows on 16 bytes, at most kMaxThreads * 8 vectors a row.
#include <algorithm>
#include <utility>

#include "kernels/gate/gate_token_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 384;
constexpr int kRowThreads = 128;
constexpr int kStaticBytes = 1024;  // of shared memory, at most

extern __shared__ float4 shared[];

// The arrays as the first kernel addresses them.
struct Arrays {
  TokenRows hidden, key, value, out;
};

// A masked token: hidden as it is, or zeros.
template <DType kType>
__device__ __forceinline__ void pass_token(const GateParams& p, int t, int first_branch, int branches, int vectors) {
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
#pragma unroll 1
    for (int m = first_branch; m < first_branch + branches; ++m) {
      const uint4 v = p.options.add_residual ? *vector_at<const uint4>(p.hidden, kType, t, m, i) : make_uint4(0, 0, 0, 0);
      *vector_at<uint4>(p.out, kType, t, m, i) = v;
    }
  }
}

// What a thread holds of a token in registers; the value is behind the slots of the weights.
template <int kBranches, int kVectors>
struct Held {
  uint4 hidden[kBranches][kVectors], key[kBranches][kVectors];
};

template <DType kType, int kBranches, int kVectors>
using Place = Slots<kBranches, kVectors, kVectorElements<kType> / 4>;

// The block's first token from t on that is not masked; masked ones are passed on the way.
template <DType kType, int kBranches>
__device__ __forceinline__ int next_token(const GateParams& p, const TokenTile& tile, int t) {
#pragma unroll 1
  for (; t < tile.tokens && p.masked(t); t += gridDim.x) pass_token<kType>(p, t, blockIdx.y * kBranches, kBranches, tile.vectors);
  return t;
}

// A thread's place in an array at a token: its vectors, branch after branch.
template <int kVectors>
struct Cursor {
  const TokenRows& rows;
  std::byte* at;

  __device__ __forceinline__ Cursor(const TokenRows& rows, int token, int first_branch)
      : rows(rows), at(rows.at(token, first_vector<kVectors>())) {
    rows.go_branches(&at, first_branch);
  }
  __device__ __forceinline__ std::byte* vector(int j) const { return at + j * kWarp * kVectorBytes; }
  __device__ __forceinline__ void next_branch(bool back = false) { rows.next_branch(&at, back); }
};

template <int kVectors>
__device__ __forceinline__ bool has_vector(const TokenTile& tile, int token, int j) {
  return token < tile.tokens && first_vector<kVectors>() + j * kWarp < tile.vectors;
}

template <int kVectors>
__device__ __forceinline__ void copy_value(const Arrays& a, const TokenTile& tile, int token, float4* to) {
  const Cursor<kVectors> value(a.value, token, 0);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) copy_if(has_vector<kVectors>(tile, token, j), value.vector(j), to + j * blockDim.x);
}

// The thread's part of the sums [kind][branch] of what is held; then loads the keys of token `next`.
template <DType kType, int kBranches, int kVectors>
__device__ __forceinline__ void add_sums(const Arrays& a, const TokenTile& tile, int next, Held<kBranches, kVectors>* held,
                                         float (&sums)[kSums * kBranches]) {
  constexpr int kElements = kVectorElements<kType>;
  const float4* slots = shared + Place<kType, kBranches, kVectors>::first(tile, 0);
  Cursor<kVectors> key(a.key, next, blockIdx.y * kBranches);
#pragma unroll
  for (int m = 0; m < kBranches; ++m) {
    if (m > 0) key.next_branch();
    sums[kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held->hidden[m][j], held->hidden[m][j]); });
    sums[2 * kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held->key[m][j], held->key[m][j]); });
    sums[m] =
        weighted_dot<kType, kElements / 4>(held->hidden[m], held->key[m], slots + Place<kType, kBranches, kVectors>::at(m, 0, 0));
    sums[3 * kBranches + m] = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) load_if(has_vector<kVectors>(tile, next, j), key.vector(j), &held->key[m][j]);
  }
}

// The output of token `now`; then hidden of `next` is held. A vector in every branch, then the next one with the branches in
// reverse: so the addresses move by a branch.
template <DType kType, bool kResidual, int kBranches, int kVectors>
__device__ __forceinline__ void write_out(const Arrays& a, const TokenTile& tile, int now, int next, const float* gates,
                                          const float4* value, Held<kBranches, kVectors>* held) {
  constexpr int kElements = kVectorElements<kType>;
  Cursor<kVectors> hidden(a.hidden, next, blockIdx.y * kBranches), out(a.out, now, blockIdx.y * kBranches);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const bool back = j % 2 != 0;
    float v[kElements];
    unpack_vector<kType>(reinterpret_cast<const uint4&>(value[j * blockDim.x]), v);
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) hidden.next_branch(back), out.next_branch(back);
      const int m = back ? kBranches - 1 - n : n;
      const float gate = gates[m];
      float h[kElements];
      unpack_vector<kType>(held->hidden[m][j], h);
#pragma unroll
      for (int e = 0; e < kElements; ++e) h[e] = kResidual ? fmaf(gate, v[e], h[e]) : gate * v[e];
      uint32_t words[4];
      pack_vector<kType>(h, words);
      store_if(has_vector<kVectors>(tile, now, j), out.vector(j), words);
      load_if(has_vector<kVectors>(tile, next, j), hidden.vector(j), &held->hidden[m][j]);
    }
  }
}

template <DType kType, int kBranches, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1) gate_tokens(const GateParams p, const Arrays arrays, const TokenTile tile) {
  __shared__ float partial[kMaxThreads / kWarp * kSums * kBranches];
  __shared__ float gates[kBranches];
  const int first_branch = blockIdx.y * kBranches;
  float4* value = shared + Place<kType, kBranches, kVectors>::size(tile) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) value[j * blockDim.x] = make_float4(0, 0, 0, 0);
  int now = next_token<kType, kBranches>(p, tile, blockIdx.x);
  Held<kBranches, kVectors> held{};
  Cursor<kVectors> hidden(arrays.hidden, now, first_branch), key(arrays.key, now, first_branch);
#pragma unroll
  for (int m = 0; m < kBranches; ++m) {
    if (m > 0) hidden.next_branch(), key.next_branch();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      load_if(has_vector<kVectors>(tile, now, j), hidden.vector(j), &held.hidden[m][j]);
      load_if(has_vector<kVectors>(tile, now, j), key.vector(j), &held.key[m][j]);
    }
  }
  copy_value<kVectors>(arrays, tile, now, value);
  // last, so that the first token is on its way meanwhile
  stage_slots<kType, kBranches, kVectors, kVectorElements<kType> / 4>(p.weights, p.hidden_size, tile, first_branch, shared);
#pragma unroll 1
  while (now < tile.tokens) {
    const int next = next_token<kType, kBranches>(p, tile, now + gridDim.x);
    float sums[kSums * kBranches], of_branch[kSums];
    add_sums<kType>(arrays, tile, next, &held, sums);
    token_sums<kBranches>(sums, tile, partial, of_branch);
    if (threadIdx.x < kBranches) {
      gates[threadIdx.x] = gate_score(p.options, p.hidden_size, of_branch[0], of_branch[1], of_branch[2]).gate;
    }
    __syncthreads();
    wait_for_copies();  // each thread reads what it copied itself
    p.options.add_residual ? write_out<kType, true>(arrays, tile, now, next, gates, value, &held)
                           : write_out<kType, false>(arrays, tile, now, next, gates, value, &held);
    copy_value<kVectors>(arrays, tile, next, value);
    now = next;
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
      const float w = load_element(p.weights.w_hidden, p.weights.dtype, int64_t{m} * size + i) *
                      load_element(p.weights.w_key, p.weights.dtype, int64_t{m} * size + i);
      sums[0] = fmaf(h, k * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(k, k, sums[2]);
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
      const float v = load_element(p.value, kType, t * p.value_stride + i);
      const float update = score * v;
      store_element(out, kType, i, p.options.add_residual ? fmaf(score, v, load_element(hidden, kType, i)) : update);
    }
    __syncthreads();  // score and partial are free again
  }
}

template <DType kType, int kBranches, int kVectors>
void launch_tokens(const GateParams& p, const Arrays& arrays, const TokenTile& tile, cudaStream_t stream) {
  const auto kernel = gate_tokens<kType, kBranches, kVectors>;
  const int bytes = (Place<kType, kBranches, kVectors>::size(tile) + kVectors * tile.warps * kWarp) * kVectorBytes;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t resident = std::clamp(std::min(kMaxThreads / (tile.warps * kWarp), max_shared_bytes() / bytes), 1, 16);
  const dim3 grid(static_cast<unsigned>(std::min(p.num_tokens, num_multiprocessors() * resident)),
                  static_cast<unsigned>(p.branches / kBranches));
  kernel<<<grid, static_cast<unsigned>(tile.warps * kWarp), bytes, stream>>>(p, arrays, tile);
  EK_CUDA_CHECK(cudaGetLastError());
}

// Whether the arrays lie as the first kernel wants.
template <DType kType>
bool arrays_of(const GateParams& p, Arrays* arrays) {
  constexpr int kBytes = dtype_bytes(kType);
  const BranchRows value{const_cast<void*>(p.value), p.value_stride, 0};
  *arrays = {token_rows(p.hidden, kBytes), token_rows(p.key, kBytes), token_rows(value, kBytes), token_rows(p.out, kBytes)};
  return p.hidden_size % kVectorElements<kType> == 0 && on_vectors(p.weights) &&
         has_token_rows(p.hidden, p.num_tokens, p.branches, kBytes) && has_token_rows(p.key, p.num_tokens, p.branches, kBytes) &&
         has_token_rows(p.out, p.num_tokens, p.branches, kBytes) && has_token_rows(value, p.num_tokens, 1, kBytes);
}

// Whether the first kernel took it.
template <DType kType>
bool launch_tokens(const GateParams& p, cudaStream_t stream) {
  Arrays arrays;
  if (!arrays_of<kType>(p, &arrays) || p.num_tokens > INT32_MAX / 2) return false;
  const int64_t vectors = p.hidden_size / kVectorElements<kType>;
  const bool few = p.num_tokens * p.branches <= num_multiprocessors();
  for (const auto& [branches, per_thread] : {std::pair{1, 2}, {4, 2}, {2, 4}, {1, 8}}) {
    const bool block_a_branch = branches == 1 && per_thread == 2;
    if (block_a_branch && !few) continue;
    if (branches == 4 && kType == DType::kF16) continue;  // spills registers on sm_90
    if (p.branches % branches != 0 || vectors > int64_t{kMaxThreads} * per_thread) continue;
    const int threads = lanes_for(vectors, per_thread);
    if (per_thread * threads * (branches * kVectorElements<kType> * 4 + kVectorBytes) > max_shared_bytes() - kStaticBytes)
      continue;
    const TokenTile tile{static_cast<int>(vectors), threads / kWarp, 1, static_cast<int>(p.num_tokens)};
    if constexpr (kType != DType::kF16) {
      if (branches == 4) launch_tokens<kType, 4, 2>(p, arrays, tile, stream);
    }
    if (branches == 2) launch_tokens<kType, 2, 4>(p, arrays, tile, stream);
    if (branches == 1 && !block_a_branch) launch_tokens<kType, 1, 8>(p, arrays, tile, stream);
    if (block_a_branch) launch_tokens<kType, 1, 2>(p, arrays, tile, stream);
    return true;
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
  dispatch_dtype(p.dtype, [&](auto type) { launch<type.value>(p, on); });
}

}  // namespace engram_kernels
