// CUDA kernels of gate. Contract: gate.h.
//
// A persistent block walks over tokens, kBranches branches at a time:
//   1. sums    dot, |h|^2 and |k|^2, per thread, then over the block; loads of the next token's key start meanwhile
//   2. scores  one thread per branch turns them into the gate
//   3. output  h + gate * v goes out; loads of the next token's hidden start as registers fall free
// hidden and key stay in registers, the value and the products of the weights in shared memory (layout: gate_cuda.h). Few
// tokens are bound by latency: as long as there are enough multiprocessors, each of their branches has a block, which
// keeps everything in registers (one token).
// Traffic  hidden and key once, output once, the value once per group of branches (one group where they are 4, 2 or 1 and
//          not f16); the weights once per block.
// Limits   rows are 16-byte aligned and have at most kMaxThreads * 8 vectors. Other rows go to gate_plain_cuda.h.
#include <algorithm>
#include <array>

#include "kernels/gate/gate_cuda.h"
#include "kernels/gate/gate_plain_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 384;
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

// The products of the weights; the value lies behind them.
template <DType kType, int kBranches, int kVectors>
using WeightSlots = Slots<kBranches, kVectors, kVectorElements<kType> / 4>;

// The block's first token from t on that is not masked; masked ones are passed on the way.
template <DType kType, int kBranches>
__device__ __forceinline__ int next_token(const GateParams& p, const TokenTile& tile, int t) {
  return next_token(p, tile, t,
                    [&](int masked) { pass_token<kType>(p, masked, blockIdx.y * kBranches, kBranches, tile.vectors); });
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
  const float4* words = shared + WeightSlots<kType, kBranches, kVectors>::first(tile, 0);
  Cursor<kVectors> key(a.key, next, blockIdx.y * kBranches);
#pragma unroll
  for (int m = 0; m < kBranches; ++m) {
    if (m > 0) key.next_branch();
    sums[kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held->hidden[m][j], held->hidden[m][j]); });
    sums[2 * kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held->key[m][j], held->key[m][j]); });
    sums[m] = weighted_dot<kType, kElements / 4>(held->hidden[m], held->key[m],
                                                 words + WeightSlots<kType, kBranches, kVectors>::at(m, 0, 0));
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
      uint32_t packed[4];
      pack_vector<kType>(h, packed);
      store_if(has_vector<kVectors>(tile, now, j), out.vector(j), packed);
      load_if(has_vector<kVectors>(tile, next, j), hidden.vector(j), &held->hidden[m][j]);
    }
  }
}

template <DType kType, int kBranches, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1) gate_kernel(const GateParams p, const Arrays arrays, const TokenTile tile) {
  __shared__ float by_warp[kMaxThreads / kWarp * kSums * kBranches];
  __shared__ float gates[kBranches];
  const int first_branch = blockIdx.y * kBranches;
  float4* value = shared + WeightSlots<kType, kBranches, kVectors>::size(tile) + threadIdx.x;
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
    float sums[kSums * kBranches], of_branch[3];
    add_sums<kType>(arrays, tile, next, &held, sums);
    token_sums<kBranches>(sums, tile, by_warp, of_branch);
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

// ---- one token -------------------------------------------------------------------------------------------------------
//
// A block per token and branch. All that it reads is asked for at once and stays in registers, the weights too.

template <DType kType, DType kWeights, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_one_token_kernel(const GateParams p, const Arrays arrays, const TokenTile tile) {
  constexpr int kElements = kVectorElements<kType>, kWords = dtype_bytes(kWeights) / dtype_bytes(kType);
  __shared__ float by_warp[kMaxThreads / kWarp * kSums];
  __shared__ float shared_gate;
  const int t = blockIdx.x, branch = blockIdx.y;
  wait_for_predecessor();
  if (p.masked(t)) return pass_token<kType>(p, t, branch, 1, tile.vectors);
  const int first = first_vector<kTokenVectors>();
  const bool there[kTokenVectors] = {first < tile.vectors, first + kWarp < tile.vectors};
  uint4 hidden[kTokenVectors][1], key[kTokenVectors][1], value[kTokenVectors][1];
  uint4 of_hidden[kTokenVectors][kWords], of_key[kTokenVectors][kWords];
  const uint32_t weights_at = (branch * static_cast<uint32_t>(tile.vectors) + first) * (kVectorBytes * kWords);
  load_row<kWhole>(arrays.hidden.at(t, first) + branch * arrays.hidden.branch_bytes, there, hidden);
  load_row<kWhole>(arrays.key.at(t, first) + branch * arrays.key.branch_bytes, there, key);
  load_row<kWhole>(static_cast<const std::byte*>(p.weights.w_hidden) + weights_at, there, of_hidden);
  load_row<kWhole>(static_cast<const std::byte*>(p.weights.w_key) + weights_at, there, of_key);
  load_row<kWhole>(arrays.value.at(t, first), there, value);
  float h[kTokenVectors][kElements], sums[kSums] = {}, of_branch[3];
  sums[1] = product_sum<kType, kTokenVectors>([&](int j, auto add) { add(hidden[j][0], hidden[j][0]); });
  sums[2] = product_sum<kType, kTokenVectors>([&](int j, auto add) { add(key[j][0], key[j][0]); });
#pragma unroll
  for (int j = 0; j < kTokenVectors; ++j) {
    float k[kElements], w[kElements];
    unpack_once<kType>(hidden[j][0], h[j]), unpack_once<kType>(key[j][0], k);
    multiply_weights<kWeights>(of_hidden[j], of_key[j], w);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sums[0] = fmaf(h[j][e], k[e] * w[e], sums[0]);
  }
  token_sums<1>(sums, tile, by_warp, of_branch);
  if (threadIdx.x == 0) {
    shared_gate = gate_score(p.options, p.hidden_size, of_branch[0], of_branch[1], of_branch[2]).gate;
  }
  __syncthreads();
  const float gate = shared_gate;
  std::byte* out = arrays.out.at(t, first) + branch * arrays.out.branch_bytes;
  const auto write = [&](bool residual) {
#pragma unroll
    for (int j = 0; j < kTokenVectors; ++j) {
      float v[kElements];
      unpack_once<kType>(value[j][0], v);
#pragma unroll
      for (int e = 0; e < kElements; ++e) v[e] = residual ? fmaf(gate, v[e], h[j][e]) : gate * v[e];
      if (kWhole || there[j]) store_floats<kType>(out + j * kWarp * kVectorBytes, v);
    }
  };
  p.options.add_residual ? write(true) : write(false);
}

template <DType kType>
void launch_one_token(const GateParams& p, const Arrays& arrays, const TokenTile& tile, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(p.branches));
  const bool floats = p.weights.dtype == DType::kF32, whole = tile.vectors == tile.warps * kWarp * kTokenVectors;
  const auto kernel =
      floats ? (whole ? gate_one_token_kernel<kType, DType::kF32, true> : gate_one_token_kernel<kType, DType::kF32, false>)
             : (whole ? gate_one_token_kernel<kType, kType, true> : gate_one_token_kernel<kType, kType, false>);
  launch_overlapping(kernel, grid, static_cast<unsigned>(tile.warps * kWarp), stream, p, arrays, tile);
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <DType kType, int kBranches, int kVectors>
void launch_tokens(const GateParams& p, const Arrays& arrays, const TokenTile& tile, cudaStream_t stream) {
  const auto kernel = gate_kernel<kType, kBranches, kVectors>;
  const int bytes = (WeightSlots<kType, kBranches, kVectors>::size(tile) + kVectors * tile.warps * kWarp) * kVectorBytes;
  allow_max_shared_bytes(reinterpret_cast<const void*>(kernel));
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

// One compiled shape of the kernel.
struct Shape {
  int branches;  // at a time
  int vectors_per_thread;
  void (*launch)(const GateParams& p, const Arrays& arrays, const TokenTile& tile, cudaStream_t stream);
  bool only_for_few_tokens;  // so few that each of its blocks has a multiprocessor and one token
};

template <DType kType, int kBranches, int kVectors>
constexpr Shape shape(bool only_for_few_tokens = false) {
  return {kBranches, kVectors, launch_tokens<kType, kBranches, kVectors>, only_for_few_tokens};
}

template <DType kType>
constexpr Shape kOneToken = {1, kTokenVectors, launch_one_token<kType>, true};

// In the order in which they are tried.
template <DType kType>
constexpr auto shapes() {
  if constexpr (kType == DType::kF16) {  // four branches spill registers on sm_90
    return std::array{kOneToken<kType>, shape<kType, 2, 4>(), shape<kType, 1, 8>()};
  } else {
    return std::array{kOneToken<kType>, shape<kType, 2, 4>(true), shape<kType, 4, 2>(), shape<kType, 2, 4>(),
                      shape<kType, 1, 8>()};
  }
}

// Whether rows of `vectors` vectors in so many branches fit the shape.
template <DType kType>
bool fits(const Shape& shape, int64_t branches, int64_t vectors) {
  if (branches % shape.branches != 0 || vectors > int64_t{kMaxThreads} * shape.vectors_per_thread) return false;
  const int weight_bytes = shape.branches * kVectorElements<kType> * 4;
  const int vectors_of_block = shape.vectors_per_thread * lanes_for(vectors, shape.vectors_per_thread);
  return vectors_of_block * (weight_bytes + kVectorBytes) <= max_shared_bytes() - kStaticBytes;
}

// Whether one of the shapes took it.
template <DType kType>
bool launch_tokens(const GateParams& p, cudaStream_t stream) {
  Arrays arrays;
  if (!arrays_of<kType>(p, &arrays) || p.num_tokens > INT32_MAX / 2) return false;
  const int64_t vectors = p.hidden_size / kVectorElements<kType>;
  for (const Shape& shape : shapes<kType>()) {
    const bool few = p.num_tokens * (p.branches / shape.branches) <= num_multiprocessors();
    if ((shape.only_for_few_tokens && !few) || !fits<kType>(shape, p.branches, vectors)) continue;
    const int warps = lanes_for(vectors, shape.vectors_per_thread) / kWarp;
    shape.launch(p, arrays, {static_cast<int>(vectors), warps, 1, static_cast<int>(p.num_tokens)}, stream);
    return true;
  }
  return false;
}

}  // namespace

void gate_cuda(const GateParams& p, void* stream) {
  check_params(p);
  if (p.num_tokens == 0) return;
  EK_CHECK(p.branches <= kMaxGridY, "gate: " << p.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= INT32_MAX, "gate: hidden_size is " << p.hidden_size << ", expected less than 2^31");
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.dtype, [&](auto type) {
    if (!launch_tokens<type.value>(p, on)) launch_plain<type.value>(p, on);
  });
}

}  // namespace engram_kernels
