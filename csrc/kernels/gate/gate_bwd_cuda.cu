// CUDA kernels of the backward pass of gate. Contract: gate.h; layout of a block: gate_cuda.h.
//
// One persistent block walks over tokens, kBranches branches at a time:
//   1. sums     dot, |h|^2, |k|^2 and dout . v, per thread, then over the block
//   2. slopes   one thread per branch turns them into a, b, c and the gate
//   3. grads    grad_hidden and grad_key go out; loads of the next token start as registers fall free
//   4. weights  a h k is summed over the tokens in shared memory; a last kernel adds the sums of the blocks
// hidden and key stay in registers, grad_out in shared memory. The sums have a fixed order: the bits depend on the number of
// blocks only.
// Few tokens are bound by latency: as long as there are enough multiprocessors, each of their branches has a block, which
// keeps everything in registers, and a second kernel adds over branches and tokens (few tokens).
// Traffic  least: hidden, key, grad_out and value read, grad_hidden, grad_key and grad_value written once, (5 M + 2) H
//          elements per token. On top 4 M H bytes of partial sums per block, written and read: 2.3 % of the least with 32
//          tokens per block.
// Limits   2-byte elements, 16-byte aligned rows of at most kMaxThreads * kVectors vectors, 10 M H + 2 H bytes of shared
//          memory: what an H100 has at H 5120 and M 4 of bf16 (f16 takes 2 branches at a time), and more than an A100
//          has. Other rows go to gate_plain_cuda.h.
#include <algorithm>

#include "kernels/gate/gate_cuda.h"
#include "kernels/gate/gate_plain_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 384;
constexpr int kElements = 8;  // of a vector
constexpr int kPlanes = kElements / 4;
// words of a vector behind the weights: partial sums of the weights' gradient, grad_out
constexpr int kPartialSums = kPlanes, kGradOut = 2 * kPlanes;
constexpr int kWords = kGradOut + 1;
constexpr int kTokensPerBlock = 16;  // at least, for more than one block per multiprocessor
constexpr int kStaticBytes = 1024;   // of shared memory, at most

extern __shared__ float4 shared[];

template <int kBranches, int kVectors>
using WeightSlots = Slots<kBranches, kVectors, kWords>;

// The arrays as the kernel addresses them.
struct Arrays {
  TokenRows hidden, key, grad_out, value, grad_hidden, grad_key, grad_value;
};

// Behind the words of the weights: the value's vectors, then, between two groups, its gradient.
template <int kBranches, int kVectors>
__device__ __forceinline__ float4* value_words(const TokenTile& tile) {
  return shared + WeightSlots<kBranches, kVectors>::size(tile) + threadIdx.x;
}

// Gradients of a masked token: its output is hidden, or nothing.
template <DType kType>
__device__ __forceinline__ void pass_gradient(const GateBwdParams& p, int t, int vectors) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
#pragma unroll 1
    for (int m = 0; m < p.forward.branches; ++m) {
      *vector_at<uint4>(p.grad_hidden, kType, t, m, i) =
          p.forward.options.add_residual ? *vector_at<const uint4>(p.grad_out, kType, t, m, i) : zeros;
      *vector_at<uint4>(p.grad_key, kType, t, m, i) = zeros;
    }
    static_cast<uint4*>(p.grad_value)[int64_t{t} * vectors + i] = zeros;
  }
}

// The block's first token from t on that is not masked; masked ones are passed on the way.
template <DType kType>
__device__ __forceinline__ int next_token(const GateBwdParams& p, const TokenTile& tile, int t) {
  return next_token(p.forward, tile, t, [&](int masked) { pass_gradient<kType>(p, masked, tile.vectors); });
}

// What a block does at once: kBranches branches of a token.
struct Step {
  int token;
  int branch;  // the first
};

// Loads steps into `held` and shared memory: a vector in every branch, then the next one with the branches in reverse. So
// the addresses move by a branch, and are back at the first one in the end.
template <int kBranches, int kVectors>
struct Loader {
  static_assert(kVectors % 2 == 0);
  const Arrays& arrays;
  const TokenTile& tile;
  std::byte *hidden, *key, *grad_out;
  int token;

  __device__ __forceinline__ Loader(const Arrays& a, const TokenTile& tile, const Step& s)
      : arrays(a),
        tile(tile),
        hidden(a.hidden.at(s.token, first_vector<kVectors>())),
        key(a.key.at(s.token, first_vector<kVectors>())),
        grad_out(a.grad_out.at(s.token, first_vector<kVectors>())),
        token(s.token) {
    if (s.branch == 0) return;
    arrays.hidden.go_branches(&hidden, s.branch), arrays.key.go_branches(&key, s.branch);
    arrays.grad_out.go_branches(&grad_out, s.branch);
  }
  __device__ __forceinline__ void next_branch(bool back) {
    arrays.hidden.next_branch(&hidden, back), arrays.key.next_branch(&key, back);
  }
  __device__ __forceinline__ void load(int m, int j, Held<kBranches, kVectors>* held) const {
    load_if(has(j), hidden + j * kWarp * kVectorBytes, &held->hidden[m][j]);
    load_if(has(j), key + j * kWarp * kVectorBytes, &held->key[m][j]);
  }
  // of all branches at once: the compiler puts empty instructions in front of such copies
  __device__ __forceinline__ void copy_grad_out(int j, float4* words) {
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) arrays.grad_out.next_branch(&grad_out, j % 2 != 0);
      copy_if(has(j), grad_out + j * kWarp * kVectorBytes,
              words + WeightSlots<kBranches, kVectors>::at(j % 2 == 0 ? n : kBranches - 1 - n, j, kGradOut));
    }
  }
  __device__ __forceinline__ void copy_value() const {
    const std::byte* value = arrays.value.at(token, first_vector<kVectors>());
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      copy_if(has(j), value + j * kWarp * kVectorBytes, value_words<kBranches, kVectors>(tile) + j * blockDim.x);
    }
  }

 private:
  __device__ __forceinline__ bool has(int j) const { return has_vector<kVectors>(tile, token, j); }
};

// Where a thread writes the gradients of a step's branches.
struct Writer {
  const Arrays& arrays;
  std::byte *hidden, *key;

  __device__ __forceinline__ Writer(const Arrays& a, const Step& s, int first)
      : arrays(a), hidden(a.grad_hidden.at(s.token, first)), key(a.grad_key.at(s.token, first)) {
    if (s.branch > 0) arrays.grad_hidden.go_branches(&hidden, s.branch), arrays.grad_key.go_branches(&key, s.branch);
  }
  __device__ __forceinline__ void next_branch(bool back) {
    arrays.grad_hidden.next_branch(&hidden, back), arrays.grad_key.next_branch(&key, back);
  }
};

// The thread's part of the sums [kind][branch].
template <DType kType, int kBranches, int kVectors>
__device__ __forceinline__ void add_sums(const Held<kBranches, kVectors>& held, const float4* words, const float4* values,
                                         float (&sums)[kSums * kBranches]) {
  uint4 value[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) value[j] = reinterpret_cast<const uint4&>(values[j * blockDim.x]);
#pragma unroll
  for (int m = 0; m < kBranches; ++m) {
    const float4* of_branch = words + WeightSlots<kBranches, kVectors>::at(m, 0, 0);
    const auto word = [&](int j, int i) -> const float4& { return of_branch[WeightSlots<kBranches, kVectors>::at(0, j, i)]; };
    sums[kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held.hidden[m][j], held.hidden[m][j]); });
    sums[2 * kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held.key[m][j], held.key[m][j]); });
    sums[3 * kBranches + m] =
        product_sum<kType, kVectors>([&](int j, auto add) { add(reinterpret_cast<const uint4&>(word(j, kGradOut)), value[j]); });
    sums[m] = weighted_dot<kType, kWords>(held.hidden[m], held.key[m], of_branch);
  }
}

// Gradients of hidden and key of one vector; adds a h k to its partial sums and gate * grad_out to grad_value.
template <DType kType, bool kResidual, int kBranches, int kVectors>
__device__ __forceinline__ void gradients(const GateSlopes s, const Held<kBranches, kVectors>& held, int m, int j, float4* words,
                                          float* grad_value, uint32_t (&to_hidden)[4], uint32_t (&to_key)[4]) {
  const uint4 grad_out = reinterpret_cast<const uint4&>(words[WeightSlots<kBranches, kVectors>::at(m, j, kGradOut)]);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    float h[4], k[4], g[4], w[4], x[4];
    unpack_four<kType>(held.hidden[m][j], plane, h);
    unpack_four<kType>(held.key[m][j], plane, k);
    unpack_four<kType>(grad_out, plane, g);
    float4* partial_sums = words + WeightSlots<kBranches, kVectors>::at(m, j, kPartialSums + plane);
    read_word(words[WeightSlots<kBranches, kVectors>::at(m, j, plane)], w);
    read_word(*partial_sums, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float ah = s.a * h[e];
      x[e] = fmaf(ah, k[e], x[e]);
      grad_value[4 * plane + e] = fmaf(s.gate, g[e], grad_value[4 * plane + e]);
      h[e] = fmaf(s.a * w[e], k[e], kResidual ? fmaf(-s.b, h[e], g[e]) : -s.b * h[e]);
      k[e] = fmaf(w[e], ah, -s.c * k[e]);
    }
    *partial_sums = make_float4(x[0], x[1], x[2], x[3]);
    if (plane + 1 < kPlanes)
      __syncwarp();  // no instruction, but keeps the compiler from mixing the halves, for want of registers
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      to_hidden[2 * plane + e] = pack_pair<kType>(h[2 * e], h[2 * e + 1]);
      to_key[2 * plane + e] = pack_pair<kType>(k[2 * e], k[2 * e + 1]);
    }
  }
}

__device__ __forceinline__ void add_planes(const float4* planes, int stride, float (&values)[kElements]) {
  float more[kElements];
  load_planes<kElements>(planes, stride, 0, more);
#pragma unroll
  for (int e = 0; e < kElements; ++e) values[e] += more[e];
}

// The gradients of `now`, which is held; then the loader's step is.
template <DType kType, bool kResidual, int kBranches, int kVectors>
__device__ __forceinline__ void write_gradients(const Step& now, const GateSlopes* slopes, float4* next_words,
                                                Held<kBranches, kVectors>* held, Loader<kBranches, kVectors> loader) {
  const TokenTile& tile = loader.tile;
  Writer writer(loader.arrays, now, first_vector<kVectors>());
  float4* words = shared + WeightSlots<kBranches, kVectors>::first(tile, now.branch / kBranches);
  float4* between = value_words<kBranches, kVectors>(tile) + kVectors * blockDim.x;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const bool mine = first_vector<kVectors>() + j * kWarp < tile.vectors, back = j % 2 != 0;
    const int offset = j * kWarp * kVectorBytes;
    float grad_value[kElements] = {};
    uint32_t packed[4];
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) writer.next_branch(back), loader.next_branch(back);
      const int m = back ? kBranches - 1 - n : n;
      uint32_t to_key[4];
      gradients<kType, kResidual>(slopes[m], *held, m, j, words, grad_value, packed, to_key);
      store_if(mine, writer.hidden + offset, packed);
      store_if(mine, writer.key + offset, to_key);
      loader.load(m, j, held);
      __syncwarp();  // as above
    }
    loader.copy_grad_out(j, next_words);
    if (tile.groups > 1) {
      float4* of_vector = between + j * kPlanes * blockDim.x;
      if (now.branch > 0) add_planes(of_vector, blockDim.x, grad_value);
      if (now.branch + kBranches < tile.groups * kBranches) {
        store_planes<kElements>(of_vector, blockDim.x, 0, grad_value);
        continue;
      }
    }
    pack_vector<kType>(grad_value, packed);
    // the address is computed here: one that is kept from the start spills registers on sm_100
    store_if(mine, loader.arrays.grad_value.at(now.token, first_vector<kVectors>()) + offset, packed);
  }
}

template <DType kType, int kBranches, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_bwd_kernel(const GateBwdParams p, const Arrays arrays, const TokenTile tile) {
  __shared__ float by_warp[kMaxThreads / kWarp * kSums * kBranches];
  __shared__ GateSlopes slopes[kBranches];
  const GateParams& f = p.forward;
  stage_slots<kType, kBranches, kVectors, kWords>(f.weights, f.hidden_size, tile, 0, shared);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) value_words<kBranches, kVectors>(tile)[j * blockDim.x] = make_float4(0, 0, 0, 0);
  Held<kBranches, kVectors> held{};
  Step now{next_token<kType>(p, tile, blockIdx.x), 0};
  float4* words = shared + WeightSlots<kBranches, kVectors>::first(tile, 0);
  Loader<kBranches, kVectors> loader(arrays, tile, now);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) loader.next_branch(j % 2 != 0);
      loader.load(j % 2 == 0 ? n : kBranches - 1 - n, j, &held);
    }
    loader.copy_grad_out(j, words);
  }
  loader.copy_value();
#pragma unroll 1
  while (now.token < tile.tokens) {
    Step next{now.token, now.branch + kBranches};
    if (next.branch == tile.groups * kBranches) next = {next_token<kType>(p, tile, now.token + gridDim.x), 0};
    float sums[kSums * kBranches], of_branch[kSums];
    wait_for_copies();  // each thread reads what it copied itself
    add_sums<kType>(held, words, value_words<kBranches, kVectors>(tile), sums);
    const Loader<kBranches, kVectors> next_loader(arrays, tile, next);
    if (next.branch == 0) next_loader.copy_value();
    token_sums<kBranches>(sums, tile, by_warp, of_branch);
    if (threadIdx.x < kBranches) {
      slopes[threadIdx.x] = gate_slopes(f.options, f.hidden_size, of_branch[0], of_branch[1], of_branch[2], of_branch[3]);
    }
    __syncthreads();
    words = shared + WeightSlots<kBranches, kVectors>::first(tile, next.branch / kBranches);
    f.options.add_residual ? write_gradients<kType, true>(now, slopes, words, &held, next_loader)
                           : write_gradients<kType, false>(now, slopes, words, &held, next_loader);
    now = next;
  }
  // the partial sums as they lie, without what is between them; each thread wrote its own
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int group = 0; group < tile.groups; ++group) {
    const int at = WeightSlots<kBranches, kVectors>::first(tile, group);
    auto* out = static_cast<float4*>(p.scratch) +
                (int64_t{blockIdx.x} * WeightSlots<kBranches, kVectors>::size(tile) + at - lane) / kWords * kPlanes + lane;
#pragma unroll
    for (int i = 0; i < kBranches * kVectors * kPlanes; ++i) {
      out[i * kWarp] = shared[at + (i / kPlanes * kWords + kPartialSums + i % kPlanes) * kWarp];
    }
  }
}

// ---- few tokens ------------------------------------------------------------------------------------------------------
//
//   1. gate_bwd_one_token_kernel  a block per token and branch: the gradients of hidden and key, and the slopes to scratch memory
//   2. gate_bwd_few_kernel        the gradients of the weights, summed over tokens, and of the value, summed over branches
// Hidden, key and grad_out are read twice, the second time out of the cache; no partial sums are.

constexpr int kFewThreads = 64;  // of the second kernel: a vector each

template <DType kType, DType kWeights, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_bwd_one_token_kernel(const GateBwdParams p, const Arrays arrays, const TokenTile tile) {
  constexpr int kWordsOfWeights = dtype_bytes(kWeights) / dtype_bytes(kType);
  __shared__ float by_warp[kMaxThreads / kWarp * kSums];
  __shared__ GateSlopes shared_slopes;
  const GateParams& f = p.forward;
  const int t = blockIdx.x, branch = blockIdx.y, first = first_vector<kTokenVectors>();
  const bool there[kTokenVectors] = {first < tile.vectors, first + kWarp < tile.vectors};
  const auto in_branch = [&](const TokenRows& rows) { return rows.at(t, first) + branch * rows.branch_bytes; };
  std::byte *to_hidden = in_branch(arrays.grad_hidden), *to_key = in_branch(arrays.grad_key);
  const auto store = [&](std::byte* to, int j, const float* values) {
    if (kWhole || there[j]) store_floats<kType>(to + j * kWarp * kVectorBytes, values);
  };
  uint4 hidden[kTokenVectors][1], key[kTokenVectors][1], value[kTokenVectors][1], grad_out[kTokenVectors][1];
  load_row<kWhole>(in_branch(arrays.grad_out), there, grad_out);
  if (f.masked(t)) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kTokenVectors; ++j) {
      if (!kWhole && !there[j]) continue;
      *reinterpret_cast<uint4*>(to_hidden + j * kWarp * kVectorBytes) = f.options.add_residual ? grad_out[j][0] : zeros;
      *reinterpret_cast<uint4*>(to_key + j * kWarp * kVectorBytes) = zeros;
    }
    return;
  }
  uint4 of_hidden[kTokenVectors][kWordsOfWeights], of_key[kTokenVectors][kWordsOfWeights];
  const uint32_t weights_at = (branch * static_cast<uint32_t>(tile.vectors) + first) * (kVectorBytes * kWordsOfWeights);
  load_row<kWhole>(in_branch(arrays.hidden), there, hidden);
  load_row<kWhole>(in_branch(arrays.key), there, key);
  load_row<kWhole>(arrays.value.at(t, first), there, value);
  load_row<kWhole>(static_cast<const std::byte*>(f.weights.w_hidden) + weights_at, there, of_hidden);
  load_row<kWhole>(static_cast<const std::byte*>(f.weights.w_key) + weights_at, there, of_key);
  float h[kTokenVectors][kElements], k[kTokenVectors][kElements], w[kTokenVectors][kElements], sums[kSums] = {}, of_branch[kSums];
  sums[1] = product_sum<kType, kTokenVectors>([&](int j, auto add) { add(hidden[j][0], hidden[j][0]); });
  sums[2] = product_sum<kType, kTokenVectors>([&](int j, auto add) { add(key[j][0], key[j][0]); });
  sums[3] = product_sum<kType, kTokenVectors>([&](int j, auto add) { add(grad_out[j][0], value[j][0]); });
#pragma unroll
  for (int j = 0; j < kTokenVectors; ++j) {
    unpack_once<kType>(hidden[j][0], h[j]), unpack_once<kType>(key[j][0], k[j]);
    multiply_weights<kWeights>(of_hidden[j], of_key[j], w[j]);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sums[0] = fmaf(h[j][e], k[j][e] * w[j][e], sums[0]);
  }
  token_sums<1>(sums, tile, by_warp, of_branch);
  if (threadIdx.x == 0) {
    shared_slopes = gate_slopes(f.options, f.hidden_size, of_branch[0], of_branch[1], of_branch[2], of_branch[3]);
    static_cast<GateSlopes*>(p.scratch)[t * static_cast<int>(f.branches) + branch] = shared_slopes;
  }
  __syncthreads();
  const GateSlopes s = shared_slopes;
  const auto write = [&](bool residual) {
#pragma unroll
    for (int j = 0; j < kTokenVectors; ++j) {
      float g[kElements];
      unpack_once<kType>(grad_out[j][0], g);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float aw = s.a * w[j][e], by_key = fmaf(aw, h[j][e], -s.c * k[j][e]);
        h[j][e] = fmaf(aw, k[j][e], residual ? fmaf(-s.b, h[j][e], g[e]) : -s.b * h[j][e]);
        k[j][e] = by_key;
      }
      store(to_hidden, j, h[j]);
      store(to_key, j, k[j]);
    }
  };
  f.options.add_residual ? write(true) : write(false);
}

// The gradients of the weights of vector i of a branch.
template <DType kType, DType kWeights>
__device__ __forceinline__ void sum_tokens(const GateBwdParams& p, const Arrays& arrays, int branch, int i, int vectors,
                                           const GateSlopes* slopes) {
  const GateParams& f = p.forward;
  const std::byte* hidden = arrays.hidden.at(0, i) + branch * arrays.hidden.branch_bytes;
  const std::byte* key = arrays.key.at(0, i) + branch * arrays.key.branch_bytes;
  float sums[kElements] = {}, of_hidden[kElements], of_key[kElements];
  const int64_t at = (int64_t{branch} * vectors + i) * kElements * dtype_bytes(kWeights);
  load_floats<kWeights, kElements>(static_cast<const std::byte*>(f.weights.w_hidden) + at, of_hidden);
  load_floats<kWeights, kElements>(static_cast<const std::byte*>(f.weights.w_key) + at, of_key);
#pragma unroll 2
  for (int t = 0; t < static_cast<int>(f.num_tokens); ++t) {
    if (!f.masked(t)) {
      const float a = slopes[t * static_cast<int>(f.branches) + branch].a;
      float h[kElements], k[kElements];
      load_floats<kType, kElements>(hidden, h), load_floats<kType, kElements>(key, k);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] = fmaf(a * h[e], k[e], sums[e]);
    }
    hidden += arrays.hidden.token_bytes, key += arrays.key.token_bytes;
  }
#pragma unroll
  for (int e = 0; e < kElements; ++e) of_hidden[e] *= sums[e], of_key[e] *= sums[e];
  constexpr int kAtOnce = kVectorElements<kWeights>;
#pragma unroll
  for (int e = 0; e < kElements; e += kAtOnce) {
    const int64_t to = at + e * dtype_bytes(kWeights);
    store_floats<kWeights>(static_cast<std::byte*>(p.grad_w_hidden) + to, of_key + e);
    store_floats<kWeights>(static_cast<std::byte*>(p.grad_w_key) + to, of_hidden + e);
  }
}

// The gradient of vector i of a token's value.
template <DType kType>
__device__ __forceinline__ void sum_branches(const GateBwdParams& p, const Arrays& arrays, int t, int i,
                                             const GateSlopes* slopes) {
  const int branches = static_cast<int>(p.forward.branches);
  float sums[kElements] = {};
  if (!p.forward.masked(t)) {
    const std::byte* grad_out = arrays.grad_out.at(t, i);
#pragma unroll 4
    for (int m = 0; m < branches; ++m) {
      const float gate = slopes[t * branches + m].gate;
      float g[kElements];
      load_floats<kType, kElements>(grad_out, g);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] = fmaf(gate, g[e], sums[e]);
      grad_out += arrays.grad_out.branch_bytes;
    }
  }
  store_floats<kType>(arrays.grad_value.at(t, i), sums);
}

// gridDim.y: the branches, then the tokens.
template <DType kType, DType kWeights>
__global__ void __launch_bounds__(kFewThreads)
    gate_bwd_few_kernel(const GateBwdParams p, const Arrays arrays, const int vectors, const GateSlopes* slopes) {
  const int i = blockIdx.x * kFewThreads + threadIdx.x, branches = static_cast<int>(p.forward.branches), n = blockIdx.y;
  if (i >= vectors) return;
  n < branches ? sum_tokens<kType, kWeights>(p, arrays, n, i, vectors, slopes)
               : sum_branches<kType>(p, arrays, n - branches, i, slopes);
}

// Whether the kernels for few tokens hold these rows.
bool is_few(const GateParams& f) {
  return f.dtype != DType::kF32 && f.hidden_size % kElements == 0 && f.num_tokens > 0 &&
         f.num_tokens * f.branches <= num_multiprocessors() && f.hidden_size / kElements <= int64_t{kMaxThreads} * kTokenVectors;
}

template <DType kType, DType kWeights>
void launch_few_of(const GateBwdParams& p, const Arrays& arrays, cudaStream_t stream) {
  const GateParams& f = p.forward;
  const int64_t vectors = f.hidden_size / kElements;
  const int threads = lanes_for(vectors, kTokenVectors);
  const TokenTile tile{static_cast<int>(vectors), threads / kWarp, 1, static_cast<int>(f.num_tokens)};
  const auto tokens = static_cast<unsigned>(f.num_tokens), branches = static_cast<unsigned>(f.branches);
  const bool whole = vectors == int64_t{threads} * kTokenVectors;
  const auto kernel =
      whole ? gate_bwd_one_token_kernel<kType, kWeights, true> : gate_bwd_one_token_kernel<kType, kWeights, false>;
  kernel<<<dim3(tokens, branches), static_cast<unsigned>(threads), 0, stream>>>(p, arrays, tile);
  gate_bwd_few_kernel<kType, kWeights>
      <<<dim3(static_cast<unsigned>(ceil_div(vectors, int64_t{kFewThreads})), branches + tokens), kFewThreads, 0, stream>>>(
          p, arrays, static_cast<int>(vectors), static_cast<const GateSlopes*>(p.scratch));
  EK_CUDA_CHECK(cudaGetLastError());
}

void launch_few(const GateBwdParams& p, const Arrays& arrays, cudaStream_t stream) {
  const bool floats = p.forward.weights.dtype == DType::kF32;
  if (p.forward.dtype == DType::kBf16) {
    floats ? launch_few_of<DType::kBf16, DType::kF32>(p, arrays, stream)
           : launch_few_of<DType::kBf16, DType::kBf16>(p, arrays, stream);
  } else {
    floats ? launch_few_of<DType::kF16, DType::kF32>(p, arrays, stream)
           : launch_few_of<DType::kF16, DType::kF16>(p, arrays, stream);
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Whether the arrays lie as the first kernel wants.
bool arrays_of(const GateBwdParams& p, Arrays* arrays) {
  const GateParams& f = p.forward;
  const BranchRows value{const_cast<void*>(f.value), f.value_stride, 0}, grad_value{p.grad_value, f.hidden_size, 0};
  constexpr int kBytes = 2;
  bool ok = on_vectors(f.weights);
  for (const BranchRows* rows : {&f.hidden, &f.key, &p.grad_out, &p.grad_hidden, &p.grad_key}) {
    ok = ok && has_token_rows(*rows, f.num_tokens, f.branches, kBytes);
  }
  for (const BranchRows& rows : {value, grad_value}) ok = ok && has_token_rows(rows, f.num_tokens, 1, kBytes);
  *arrays = {token_rows(f.hidden, kBytes),  token_rows(f.key, kBytes),         token_rows(p.grad_out, kBytes),
             token_rows(value, kBytes),     token_rows(p.grad_hidden, kBytes), token_rows(p.grad_key, kBytes),
             token_rows(grad_value, kBytes)};
  return ok;
}

// Where a block writes its partial sums: [group][warp][branch][vector][plane][lane][4].
struct PartialSumOrder {
  int branches, vectors;  // of a thread
  int warps;

  __device__ __forceinline__ int64_t element(int64_t hidden_size, int i) const {
    const int in_plane = i % 4, lane = i / 4 % kWarp;
    i /= 4 * kWarp;
    const int plane = i % kPlanes, j = i / kPlanes % vectors;
    i /= vectors * kPlanes;
    const int m = i % branches, warp = i / branches % warps, group = i / branches / warps;
    const int vector = (warp * vectors + j) * kWarp + lane;
    if (vector * kElements >= hidden_size) return -1;
    return (int64_t{group} * branches + m) * hidden_size + vector * kElements + plane * 4 + in_plane;
  }
};

// One compiled shape of the kernel.
struct Shape {
  int branches;  // at a time
  int vectors_per_thread;
  void (*launch)(const GateBwdParams& p, const Arrays& arrays, const struct Launch& launch, cudaStream_t stream);
};

struct Launch {
  Shape shape;
  TokenTile tile;
  int shared_bytes;
  int64_t partial_sums;  // of a block
  int blocks;

  PartialSumOrder order() const { return {shape.branches, shape.vectors_per_thread, tile.warps}; }
};

template <DType kType, int kBranches, int kVectors>
void launch_tokens(const GateBwdParams& p, const Arrays& arrays, const Launch& launch, cudaStream_t stream) {
  const auto kernel = gate_bwd_kernel<kType, kBranches, kVectors>;
  allow_max_shared_bytes(reinterpret_cast<const void*>(kernel));
  kernel<<<static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.tile.warps * kWarp), launch.shared_bytes, stream>>>(
      p, arrays, launch.tile);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kType, int kBranches, int kVectors>
constexpr Shape shape() {
  return {kBranches, kVectors, launch_tokens<kType, kBranches, kVectors>};
}

// In the order in which they are tried. Four branches of f16 spill registers on sm_100.
constexpr Shape kBf16Shapes[] = {shape<DType::kBf16, 4, 2>(), shape<DType::kBf16, 2, 2>(), shape<DType::kBf16, 1, 4>()};
constexpr Shape kF16Shapes[] = {shape<DType::kF16, 2, 2>(), shape<DType::kF16, 1, 4>()};

// Whether the rows fit the shape; then the launch is set.
bool plan_launch(const GateBwdParams& p, const Shape& shape, Launch* launch) {
  const GateParams& f = p.forward;
  const int64_t vectors = f.hidden_size / kElements;
  if (f.branches % shape.branches != 0 || vectors > int64_t{kMaxThreads} * shape.vectors_per_thread) return false;
  const int threads = lanes_for(vectors, shape.vectors_per_thread), warps = threads / kWarp;
  const int64_t padded = shape.vectors_per_thread * threads, words = f.branches * padded * kWords;
  const int64_t bytes = (words + padded * (f.branches > shape.branches ? 1 + kPlanes : 1)) * kVectorBytes;
  if (bytes > max_shared_bytes() - kStaticBytes) return false;
  // more blocks per multiprocessor only where each still takes enough tokens to be worth its partial sums
  const int64_t sms = num_multiprocessors(), resident = std::min<int64_t>(kMaxThreads / threads, max_shared_bytes() / bytes);
  const int64_t worth = std::max(int64_t{1}, f.num_tokens / (sms * kTokensPerBlock));
  *launch = {shape,
             {static_cast<int>(vectors), warps, static_cast<int>(f.branches / shape.branches), static_cast<int>(f.num_tokens)},
             static_cast<int>(bytes),
             words / kWords * kPlanes * 4,
             static_cast<int>(std::min(f.num_tokens, sms * std::min(resident, worth)))};
  return true;
}

// The first of the compiled shapes that holds these rows; false: none does.
bool plan_tokens(const GateBwdParams& p, Launch* launch) {
  const GateParams& f = p.forward;
  if (f.dtype == DType::kF32 || f.hidden_size % kElements != 0 || f.num_tokens == 0 || f.num_tokens > INT32_MAX / 2) return false;
  const auto first_of = [&](const auto& shapes) {
    return std::any_of(std::begin(shapes), std::end(shapes), [&](const Shape& shape) { return plan_launch(p, shape, launch); });
  };
  return f.dtype == DType::kBf16 ? first_of(kBf16Shapes) : first_of(kF16Shapes);
}

}  // namespace

int64_t gate_bwd_cuda_scratch_bytes(const GateBwdParams& p) {
  const int64_t plain = plain_scratch_bytes(p.forward);
  Launch launch;
  return plan_tokens(p, &launch) ? std::max(plain, launch.blocks * launch.partial_sums * int64_t{sizeof(float)}) : plain;
}

void gate_bwd_cuda(const GateBwdParams& p, void* stream) {
  const GateParams& f = p.forward;
  check_params(f);
  EK_CHECK(f.branches <= kMaxGridY, "gate: " << f.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(f.hidden_size * f.branches <= INT32_MAX, "gate: " << f.branches << " rows of " << f.hidden_size << " are too many");
  const auto on = static_cast<cudaStream_t>(stream);
  Launch launch;
  Arrays arrays;
  const bool aligned = arrays_of(p, &arrays);
  if (aligned && is_few(f)) return launch_few(p, arrays, on);
  if (aligned && plan_tokens(p, &launch)) {
    launch.shape.launch(p, arrays, launch, on);
    return launch_weights(p, static_cast<const float*>(p.scratch), launch.blocks, launch.partial_sums, launch.order(), on);
  }
  dispatch_dtype(f.dtype, [&](auto type) { launch_bwd_plain<type.value>(p, on); });
}

}  // namespace engram_kernels
