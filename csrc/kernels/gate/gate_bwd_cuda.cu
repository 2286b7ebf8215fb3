// CUDA kernels of the backward pass of gate. Contract: gate.h; layout of a block: gate_token_cuda.h.
//
// Mapping  a block takes a token after the other, kBranches branches at once. A thread keeps hidden and key of its vectors in
//          registers and the output's gradient in shared memory from the sums to the gradients, adds the value's gradient
//          over the branches, and loads a branch of the next token as soon as it is done with that of this one: loads are
//          in flight while the gradients are computed. sum_t a h k, of which both weight gradients are multiples, is collected
//          in shared memory and written once a block; a last kernel adds the blocks' shares in their order, so that the bits
//          depend on the number of blocks only. What is not aligned, of 4 bytes or too wide: gate_bwd_any_cuda.h.
// Traffic  least: hidden, key, grad_out and value read, grad_hidden, grad_key and grad_value written once, (5 M + 2) H a
//          token. On top a share of 4 M H bytes a block, written and read: 2.3 % of the least with 32 tokens a block.
// Limits   2-byte elements, rows on 16 bytes, kMaxThreads * kVectors vectors a row, 10 M H + 2 H bytes of shared memory: what
//          an H100 has at H 5120 and M 4 of bf16 (f16 takes 2 branches at once), and more than an A100 has.
#include <algorithm>
#include <utility>

#include "kernels/gate/gate_bwd_any_cuda.h"
#include "kernels/gate/gate_bwd_weights_cuda.h"
#include "kernels/gate/gate_token_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 384;
constexpr int kElements = 8;  // of a vector
constexpr int kPlanes = kElements / 4;
constexpr int kShare = kPlanes, kGradOut = 2 * kPlanes;  // slots of a vector behind the weights: the weights' gradient, grad_out
constexpr int kSlots = kGradOut + 1;
constexpr int kTokensABlock = 16;   // at least, for more than one block a multiprocessor
constexpr int kStaticBytes = 1024;  // of shared memory, at most

extern __shared__ float4 shared[];

template <int kBranches, int kVectors>
using Place = Slots<kBranches, kVectors, kSlots>;

// What a thread holds of a token in registers; grad_out and value are in slots.
template <int kBranches, int kVectors>
struct Held {
  uint4 hidden[kBranches][kVectors], key[kBranches][kVectors];
};

// The arrays as the kernel addresses them.
struct Arrays {
  TokenRows hidden, key, grad_out, value, grad_hidden, grad_key, grad_value;
};

// Behind the slots: the value's vectors, then, between two groups, its gradient.
template <int kBranches, int kVectors>
__device__ __forceinline__ float4* value_slots(const TokenTile& tile) {
  return shared + Place<kBranches, kVectors>::size(tile) + threadIdx.x;
}

// The masked token: its output is hidden, or nothing.
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
#pragma unroll 1
  for (; t < tile.tokens && p.forward.masked(t); t += gridDim.x) pass_gradient<kType>(p, t, tile.vectors);
  return t;
}

// Loads steps into `held` and its slots. A vector in every branch, then the next one with the branches in reverse: so the
// addresses move by a branch, and are back at the first one in the end.
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
  __device__ __forceinline__ void copy_grad_out(int j, float4* slots) {
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) arrays.grad_out.next_branch(&grad_out, j % 2 != 0);
      copy_if(has(j), grad_out + j * kWarp * kVectorBytes,
              slots + Place<kBranches, kVectors>::at(j % 2 == 0 ? n : kBranches - 1 - n, j, kGradOut));
    }
  }
  __device__ __forceinline__ void copy_value() const {
    const std::byte* value = arrays.value.at(token, first_vector<kVectors>());
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      copy_if(has(j), value + j * kWarp * kVectorBytes, value_slots<kBranches, kVectors>(tile) + j * blockDim.x);
    }
  }

 private:
  __device__ __forceinline__ bool has(int j) const {
    return token < tile.tokens && first_vector<kVectors>() + j * kWarp < tile.vectors;
  }
};

// Where a thread writes the gradients of a step.
struct Writer {
  const Arrays& arrays;
  std::byte *hidden, *key, *value;

  __device__ __forceinline__ Writer(const Arrays& a, const Step& s, int first)
      : arrays(a),
        hidden(a.grad_hidden.at(s.token, first)),
        key(a.grad_key.at(s.token, first)),
        value(a.grad_value.at(s.token, first)) {
    if (s.branch > 0) arrays.grad_hidden.go_branches(&hidden, s.branch), arrays.grad_key.go_branches(&key, s.branch);
  }
  __device__ __forceinline__ void next_branch(bool back) {
    arrays.grad_hidden.next_branch(&hidden, back), arrays.grad_key.next_branch(&key, back);
  }
};

// The thread's part of the sums [kind][branch].
template <DType kType, int kBranches, int kVectors>
__device__ __forceinline__ void add_sums(const Held<kBranches, kVectors>& held, const float4* slots, const float4* values,
                                         float (&sums)[kSums * kBranches]) {
  uint4 value[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) value[j] = reinterpret_cast<const uint4&>(values[j * blockDim.x]);
#pragma unroll
  for (int m = 0; m < kBranches; ++m) {
    const float4* of_branch = slots + Place<kBranches, kVectors>::at(m, 0, 0);
    const auto slot = [&](int j, int i) -> const float4& { return of_branch[Place<kBranches, kVectors>::at(0, j, i)]; };
    sums[kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held.hidden[m][j], held.hidden[m][j]); });
    sums[2 * kBranches + m] = product_sum<kType, kVectors>([&](int j, auto add) { add(held.key[m][j], held.key[m][j]); });
    sums[3 * kBranches + m] =
        product_sum<kType, kVectors>([&](int j, auto add) { add(reinterpret_cast<const uint4&>(slot(j, kGradOut)), value[j]); });
    sums[m] = weighted_dot<kType, kSlots>(held.hidden[m], held.key[m], of_branch);
  }
}

// Gradients of hidden and key of one vector; adds a h k to its share and gate * grad_out to grad_value.
template <DType kType, bool kResidual, int kBranches, int kVectors>
__device__ __forceinline__ void gradients(const Slopes s, const Held<kBranches, kVectors>& held, int m, int j, float4* slots,
                                          float* grad_value, uint32_t (&to_hidden)[4], uint32_t (&to_key)[4]) {
  const uint4 grad_out = reinterpret_cast<const uint4&>(slots[Place<kBranches, kVectors>::at(m, j, kGradOut)]);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    float h[4], k[4], g[4], w[4], x[4];
    unpack_four<kType>(held.hidden[m][j], plane, h);
    unpack_four<kType>(held.key[m][j], plane, k);
    unpack_four<kType>(grad_out, plane, g);
    float4* share = slots + Place<kBranches, kVectors>::at(m, j, kShare + plane);
    read_slot(slots[Place<kBranches, kVectors>::at(m, j, plane)], w);
    read_slot(*share, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float ah = s.a * h[e];
      x[e] = fmaf(ah, k[e], x[e]);
      grad_value[4 * plane + e] = fmaf(s.gate, g[e], grad_value[4 * plane + e]);
      h[e] = fmaf(s.a * w[e], k[e], kResidual ? fmaf(-s.b, h[e], g[e]) : -s.b * h[e]);
      k[e] = fmaf(w[e], ah, -s.c * k[e]);
    }
    *share = make_float4(x[0], x[1], x[2], x[3]);
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
__device__ __forceinline__ void write_gradients(const Step& now, const Slopes* slopes, float4* next_slots,
                                                Held<kBranches, kVectors>* held, Loader<kBranches, kVectors> loader) {
  const TokenTile& tile = loader.tile;
  Writer writer(loader.arrays, now, first_vector<kVectors>());
  float4* slots = shared + Place<kBranches, kVectors>::first(tile, now.branch / kBranches);
  float4* between = value_slots<kBranches, kVectors>(tile) + kVectors * blockDim.x;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const bool mine = first_vector<kVectors>() + j * kWarp < tile.vectors, back = j % 2 != 0;
    const int offset = j * kWarp * kVectorBytes;
    float grad_value[kElements] = {};
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) writer.next_branch(back), loader.next_branch(back);
      const int m = back ? kBranches - 1 - n : n;
      uint32_t to_key[4];
      gradients<kType, kResidual>(slopes[m], *held, m, j, slots, grad_value, words, to_key);
      store_if(mine, writer.hidden + offset, words);
      store_if(mine, writer.key + offset, to_key);
      loader.load(m, j, held);
      __syncwarp();  // as above
    }
    loader.copy_grad_out(j, next_slots);
    if (tile.groups > 1) {
      float4* of_vector = between + j * kPlanes * blockDim.x;
      if (now.branch > 0) add_planes(of_vector, blockDim.x, grad_value);
      if (now.branch + kBranches < tile.groups * kBranches) {
        store_planes<kElements>(of_vector, blockDim.x, 0, grad_value);
        continue;
      }
    }
    pack_vector<kType>(grad_value, words);
    store_if(mine, writer.value + offset, words);
  }
}

template <DType kType, int kBranches, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    gate_bwd_tokens(const GateBwdParams p, const Arrays arrays, const TokenTile tile) {
  __shared__ float partial[kMaxThreads / kWarp * kSums * kBranches];
  __shared__ Slopes slopes[kBranches];
  const GateParams& f = p.forward;
  stage_slots<kType, kBranches, kVectors, kSlots>(f.weights, f.hidden_size, tile, 0, shared);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) value_slots<kBranches, kVectors>(tile)[j * blockDim.x] = make_float4(0, 0, 0, 0);
  Held<kBranches, kVectors> held{};
  Step now{next_token<kType>(p, tile, blockIdx.x), 0};
  float4* slots = shared + Place<kBranches, kVectors>::first(tile, 0);
  Loader<kBranches, kVectors> loader(arrays, tile, now);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int n = 0; n < kBranches; ++n) {
      if (n > 0) loader.next_branch(j % 2 != 0);
      loader.load(j % 2 == 0 ? n : kBranches - 1 - n, j, &held);
    }
    loader.copy_grad_out(j, slots);
  }
  loader.copy_value();
#pragma unroll 1
  while (now.token < tile.tokens) {
    Step next{now.token, now.branch + kBranches};
    if (next.branch == tile.groups * kBranches) next = {next_token<kType>(p, tile, now.token + gridDim.x), 0};
    float sums[kSums * kBranches], of_branch[kSums];
    wait_for_copies();  // each thread reads what it copied itself
    add_sums<kType>(held, slots, value_slots<kBranches, kVectors>(tile), sums);
    const Loader<kBranches, kVectors> next_loader(arrays, tile, next);
    if (next.branch == 0) next_loader.copy_value();
    token_sums<kBranches>(sums, tile, partial, of_branch);
    if (threadIdx.x < kBranches) slopes[threadIdx.x] = slopes_of(f, of_branch);
    __syncthreads();
    slots = shared + Place<kBranches, kVectors>::first(tile, next.branch / kBranches);
    f.options.add_residual ? write_gradients<kType, true>(now, slopes, slots, &held, next_loader)
                           : write_gradients<kType, false>(now, slopes, slots, &held, next_loader);
    now = next;
  }
  // the shares as they lie, without what is between them; each thread wrote its own
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int group = 0; group < tile.groups; ++group) {
    const int at = Place<kBranches, kVectors>::first(tile, group);
    auto* out = static_cast<float4*>(p.scratch) +
                (int64_t{blockIdx.x} * Place<kBranches, kVectors>::size(tile) + at - lane) / kSlots * kPlanes + lane;
#pragma unroll
    for (int i = 0; i < kBranches * kVectors * kPlanes; ++i) {
      out[i * kWarp] = shared[at + (i / kPlanes * kSlots + kShare + i % kPlanes) * kWarp];
    }
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

struct Launch {
  ShareOrder order;
  TokenTile tile;
  int shared_bytes;
  int64_t shares;  // of a block
  int blocks = 0;
};

// The first of the compiled shapes that holds these rows; false: none does.
bool plan_tokens(const GateBwdParams& p, Launch* launch) {
  const GateParams& f = p.forward;
  if (f.dtype == DType::kF32 || f.hidden_size % kElements != 0 || f.num_tokens > INT32_MAX / 2) return false;
  const int64_t vectors = f.hidden_size / kElements;
  for (const auto& [branches, per_thread] : {std::pair{4, 2}, {2, 2}, {1, 4}}) {
    if (branches == 4 && f.dtype == DType::kF16) continue;  // spills registers on sm_100
    if (f.branches % branches != 0 || vectors > int64_t{kMaxThreads} * per_thread) continue;
    const int threads = lanes_for(vectors, per_thread), warps = threads / kWarp;
    const int64_t padded = per_thread * threads, slots = f.branches * padded * kSlots;
    const int64_t bytes = (slots + padded * (f.branches > branches ? 1 + kPlanes : 1)) * kVectorBytes;
    if (bytes > max_shared_bytes() - kStaticBytes) continue;
    *launch = {{branches, per_thread, warps},
               {static_cast<int>(vectors), warps, static_cast<int>(f.branches / branches), static_cast<int>(f.num_tokens)},
               static_cast<int>(bytes),
               slots / kSlots * kPlanes * 4};
    // more blocks a multiprocessor only where each still takes tokens enough to be worth its share of the weights' gradients
    const int64_t sms = num_multiprocessors(),
                  resident = std::min(kMaxThreads / threads, max_shared_bytes() / launch->shared_bytes);
    const int64_t worth = std::max(int64_t{1}, f.num_tokens / (sms * kTokensABlock));
    launch->blocks = static_cast<int>(std::min(f.num_tokens, sms * std::min(resident, worth)));
    return true;
  }
  return false;
}

template <DType kType, int kBranches, int kVectors>
void launch_tokens(const GateBwdParams& p, const Arrays& arrays, const Launch& launch, cudaStream_t stream) {
  const auto kernel = gate_bwd_tokens<kType, kBranches, kVectors>;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes));
  kernel<<<static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.tile.warps * kWarp), launch.shared_bytes, stream>>>(
      p, arrays, launch.tile);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kType>
void launch_tokens(const GateBwdParams& p, const Arrays& arrays, const Launch& launch, cudaStream_t stream) {
  if constexpr (kType == DType::kBf16) {
    if (launch.order.branches == 4) return launch_tokens<kType, 4, 2>(p, arrays, launch, stream);
  }
  launch.order.branches == 2 ? launch_tokens<kType, 2, 2>(p, arrays, launch, stream)
                             : launch_tokens<kType, 1, 4>(p, arrays, launch, stream);
}

}  // namespace

int64_t gate_bwd_cuda_scratch_bytes(const GateBwdParams& p) {
  const GateParams& f = p.forward;
  const int64_t plain =
      f.num_tokens * f.branches * int64_t{sizeof(Slopes)} + kPlainChunks * f.branches * f.hidden_size * int64_t{sizeof(float)};
  Launch launch;
  if (f.num_tokens == 0 || !plan_tokens(p, &launch)) return plain;
  return std::max(plain, launch.blocks * launch.shares * int64_t{sizeof(float)});
}

void gate_bwd_cuda(const GateBwdParams& p, void* stream) {
  const GateParams& f = p.forward;
  check_params(f);
  EK_CHECK(f.branches <= kMaxGridY, "gate: " << f.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(f.hidden_size * f.branches <= INT32_MAX, "gate: " << f.branches << " rows of " << f.hidden_size << " are too many");
  const auto on = static_cast<cudaStream_t>(stream);
  Launch launch;
  Arrays arrays;
  if (f.num_tokens > 0 && arrays_of(p, &arrays) && plan_tokens(p, &launch)) {
    f.dtype == DType::kBf16 ? launch_tokens<DType::kBf16>(p, arrays, launch, on)
                            : launch_tokens<DType::kF16>(p, arrays, launch, on);
    return launch_weights(p, static_cast<const float*>(p.scratch), launch.blocks, launch.shares, launch.order, on);
  }
  if (f.num_tokens > 0) {
    f.dtype == DType::kF32    ? launch_plain<DType::kF32>(p, on)
    : f.dtype == DType::kBf16 ? launch_plain<DType::kBf16>(p, on)
                              : launch_plain<DType::kF16>(p, on);
  }
  const auto* shares = reinterpret_cast<const float*>(static_cast<Slopes*>(p.scratch) + f.num_tokens * f.branches);
  launch_weights(p, shares, f.num_tokens > 0 ? kPlainChunks : 0, f.branches * f.hidden_size, {}, on);
}

}  // namespace engram_kernels
