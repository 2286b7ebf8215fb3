// CUDA kernels of the backward pass of gate. Contract: gate.h; layout of a block: gate_row_cuda.h.
//
// Mapping  a block takes a token after the other, all its branches at once. Hidden, key and the output's gradient stay in
//          registers from the sums to the gradients. The value's gradient is summed over the branches through shared
//          memory, a vector of each thread a time. sum_t a h k, of which both weight gradients are multiples, is
//          collected in shared memory and written once a block; a last kernel adds the blocks' shares in their order, so
//          that the bits depend on the number of blocks only. Three plain kernels take what is not aligned or too wide.
// Traffic  least: hidden, key, grad_out and value read, grad_hidden, grad_key and grad_value written once, (5 M + 2) H a
//          token. On top a share of 4 M H bytes a block, written and read: 4 % of the least with 32 tokens a block.
// Limits   the first kernel: 2-byte elements, rows on 16 bytes, 5 * kMaxThreads vectors in a token's branches.
#include <algorithm>

#include "kernels/gate/gate_row_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kVectors = 5;  // of a thread
constexpr int kElements = 8;
constexpr int kPlanes = kElements / 4;
constexpr int kStaticBytes = 1024;  // of shared memory, at most
constexpr int kPlainThreads = 128;
constexpr int kPlainChunks = 64;  // of tokens, for the weights

extern __shared__ float4 shared[];

struct Slopes {  // of a (token, branch)
  float a, b, c, gate;
};

struct Tile {
  int vectors;   // of a row
  int branches;  // of a token, all in the block
  int lanes;     // threads a branch
  int tokens;
  // float4 of dynamic shared memory
  __host__ __device__ int rows() const { return branches * kPlanes * vectors; }
  __host__ __device__ int shares_at() const { return rows(); }
  __host__ __device__ int exchange_at() const { return 2 * rows(); }
  __host__ __device__ int exchange() const { return branches * kPlanes * lanes; }
  __host__ __device__ int value_at() const { return exchange_at() + 2 * exchange(); }
  __host__ __device__ int size() const { return value_at() + vectors; }
};

__device__ __forceinline__ Slopes slopes_of(const GateParams& p, const float (&sums)[4]) {
  const GateScore score = gate_score(p.options, p.hidden_size, sums[0], sums[1], sums[2]);
  const GateSlopes s = gate_slopes(p.options, p.hidden_size, score, sums[3]);
  return {s.a, s.b, s.c, score.gate};
}

template <DType kType>
__device__ __forceinline__ void stage_value(const GateParams& p, int64_t t, int vectors, float4* value) {
  const auto* row =
      reinterpret_cast<const uint4*>(static_cast<const std::byte*>(p.value) + t * p.value_stride * dtype_bytes(kType));
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < vectors; i += blockDim.x * blockDim.y) copy_async(value + i, row + i);
}

// The masked token: its output is hidden, or nothing.
template <DType kType>
__device__ __forceinline__ void pass_gradient(const GateBwdParams& p, int64_t t, int vectors) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 g = p.forward.options.add_residual ? *vector_at<const uint4>(p.grad_out, kType, t, threadIdx.y, i) : zeros;
    *vector_at<uint4>(p.grad_hidden, kType, t, threadIdx.y, i) = g;
    *vector_at<uint4>(p.grad_key, kType, t, threadIdx.y, i) = zeros;
    if (threadIdx.y == 0) static_cast<uint4*>(p.grad_value)[t * vectors + i] = zeros;
  }
}

template <DType kType>
__device__ __forceinline__ void unpack_half(const uint4& v, int half, float* values) {
  unpack_pair<kType>(half ? v.z : v.x, values, values + 1);
  unpack_pair<kType>(half ? v.w : v.y, values + 2, values + 3);
}

// Gradients of hidden and key of one vector; adds a h k to the thread's share and leaves gate * grad_out in the exchange.
template <DType kType>
__device__ __forceinline__ void gradients(const Slopes& s, bool residual, const uint4 (&in)[3], const float4* weights,
                                          float4* shares, int vectors, int i, uint4* grad_hidden, uint4* grad_key,
                                          float4* exchange) {
  uint32_t to_hidden[4], to_key[4];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {  // four elements a time, for the registers' sake
    float h[4], k[4], g[4], w[4], x[4];
    unpack_half<kType>(in[0], plane, h);
    unpack_half<kType>(in[1], plane, k);
    unpack_half<kType>(in[2], plane, g);
    load_planes<4>(shares + plane * vectors, vectors, i, x);
    load_planes<4>(weights + plane * vectors, vectors, i, w);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float ah = s.a * h[e];
      x[e] = fmaf(ah, k[e], x[e]);
      h[e] = fmaf(s.a * w[e], k[e], fmaf(-s.b, h[e], residual ? g[e] : 0.0F));
      k[e] = fmaf(w[e], ah, -s.c * k[e]);
      g[e] *= s.gate;
    }
    store_planes<4>(shares + plane * vectors, vectors, i, x);
    store_planes<4>(exchange + plane * blockDim.x, blockDim.x, threadIdx.x, g);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      to_hidden[2 * plane + e] = pack_pair<kType>(h[2 * e], h[2 * e + 1]);
      to_key[2 * plane + e] = pack_pair<kType>(k[2 * e], k[2 * e + 1]);
    }
  }
  store_words(grad_hidden, to_hidden);
  store_words(grad_key, to_key);
}

// One vector of the value's gradient, the branches added in their order.
template <DType kType>
__device__ __forceinline__ void write_value_gradient(const Tile& tile, const float4* exchange, uint4* to) {
  float sum[kElements] = {};
#pragma unroll 1
  for (int m = 0; m < tile.branches; ++m) {
    float of_branch[kElements];
    load_planes<kElements>(exchange + m * kPlanes * tile.lanes, tile.lanes, threadIdx.x, of_branch);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum[e] += of_branch[e];
  }
  store_floats<kType>(to, sum);
}

template <DType kType>
__device__ __forceinline__ void token_gradients(const GateBwdParams& p, const Tile& tile, int t, const float4* value) {
  __shared__ float4 partial[kMaxThreads / kWarp];
  __shared__ Slopes slopes[kMaxThreads / kWarp];
  const int vectors = tile.vectors, branch = threadIdx.y, first = first_vector<kVectors>();
  const float4* weights = shared + branch * kPlanes * vectors;
  const auto* hidden = vector_at<const uint4>(p.forward.hidden, kType, t, branch, 0);
  const auto* key = vector_at<const uint4>(p.forward.key, kType, t, branch, 0);
  const auto* grad_out = vector_at<const uint4>(p.grad_out, kType, t, branch, 0);
  uint4 in[kVectors][3];
  float sums[4] = {0, 0, 0, 0};  // dot, hidden^2, key^2, grad_out . value
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    if (i >= vectors) break;
    in[j][0] = hidden[i], in[j][1] = key[i], in[j][2] = grad_out[i];
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    if (i >= vectors) break;
    float h[kElements], k[kElements], x[kElements], g[kElements];
    unpack_vector<kType>(in[j][0], h);
    unpack_vector<kType>(in[j][1], k);
    load_planes<kElements>(weights, vectors, i, x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      sums[0] = fmaf(h[e], k[e] * x[e], sums[0]);
      sums[1] = fmaf(h[e], h[e], sums[1]);
      sums[2] = fmaf(k[e], k[e], sums[2]);
    }
    unpack_vector<kType>(in[j][2], g);
    unpack_vector<kType>(reinterpret_cast<const uint4*>(value)[i], x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sums[3] = fmaf(g[e], x[e], sums[3]);
  }
  branch_sums(sums, partial);
  if (threadIdx.x == 0) slopes[branch] = slopes_of(p.forward, sums);
  __syncthreads();
  const Slopes s = slopes[branch];
  auto* grad_hidden = vector_at<uint4>(p.grad_hidden, kType, t, branch, 0);
  auto* grad_key = vector_at<uint4>(p.grad_key, kType, t, branch, 0);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * kWarp;
    float4* exchange = shared + tile.exchange_at() + j % 2 * tile.exchange();
    if (i < vectors) {
      gradients<kType>(s, p.forward.options.add_residual, in[j], weights, shared + tile.shares_at() + branch * kPlanes * vectors,
                       vectors, i, grad_hidden + i, grad_key + i, exchange + branch * kPlanes * tile.lanes);
    }
    __syncthreads();  // the other exchange is free again after it, too
    if (j % tile.branches == branch && i < vectors) {
      write_value_gradient<kType>(tile, exchange, static_cast<uint4*>(p.grad_value) + int64_t{t} * vectors + i);
    }
  }
}

template <DType kType>
__global__ void __launch_bounds__(kMaxThreads) gate_bwd_tokens(const GateBwdParams p, const Tile tile) {
  const GateParams& f = p.forward;
  const int vectors = tile.vectors;
  stage_weights<kElements, kVectors>(f.weights, f.hidden_size, threadIdx.y, vectors, shared + threadIdx.y * kPlanes * vectors);
  float4* shares = shared + tile.shares_at() + threadIdx.y * kPlanes * vectors;
  for (int i = threadIdx.x; i < kPlanes * vectors; i += blockDim.x) shares[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int t = blockIdx.x; t < tile.tokens; t += gridDim.x) {
    if (f.masked(t)) {
      pass_gradient<kType>(p, t, vectors);
      continue;
    }
    float4* value = shared + tile.value_at();
    stage_value<kType>(f, t, vectors, value);
    wait_for_copies();
    __syncthreads();  // also: the shares are zero, and the last token's exchange is read
    token_gradients<kType>(p, tile, t, value);
  }
  __syncthreads();
  auto* out = static_cast<float4*>(p.scratch) + (int64_t{blockIdx.x} * tile.branches + threadIdx.y) * kPlanes * vectors;
  for (int i = threadIdx.x; i < kPlanes * vectors; i += blockDim.x) out[i] = shares[i];
}

// Weight gradients out of the shares [count][branches * hidden_size]; `planes` float4 planes a row, or 0 for rows as they are.
__global__ void __launch_bounds__(kPlainThreads)
    gate_bwd_weights(const GateBwdParams p, const float* shares, int count, int planes) {
  const GateParams& f = p.forward;
  const int64_t weights = f.branches * f.hidden_size;
  const int64_t i = int64_t{blockIdx.x} * kPlainThreads + threadIdx.x;  // where the share lies
  if (i >= weights) return;
  float sum = 0;
#pragma unroll 8
  for (int n = 0; n < count; ++n) sum += shares[n * weights + i];
  int64_t element = i;
  if (planes > 0) {
    const int size = static_cast<int>(f.hidden_size), row = static_cast<int>(i) / size, at = static_cast<int>(i) % size;
    const int plane = at / (size / planes), in_plane = at % (size / planes);
    element = int64_t{row} * size + in_plane / 4 * (4 * planes) + plane * 4 + in_plane % 4;
  }
  const DType dtype = f.weights.dtype;
  store_element(p.grad_w_hidden, dtype, element, sum * load_element(f.weights.w_key, dtype, element));
  store_element(p.grad_w_key, dtype, element, sum * load_element(f.weights.w_hidden, dtype, element));
}

// ---- any size and alignment ------------------------------------------------------------------------------------------

// The slopes of every (token, branch), a block each; zeros for a masked token.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_slopes(const GateBwdParams p, Slopes* slopes) {
  __shared__ float4 partial[kPlainThreads / kWarp];
  const GateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const void* hidden = vector_at<std::byte>(f.hidden, kType, t, m, 0);
    const void* key = vector_at<std::byte>(f.key, kType, t, m, 0);
    const void* grad_out = vector_at<std::byte>(p.grad_out, kType, t, m, 0);
    float sums[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < size && !f.masked(t); i += kPlainThreads) {
      const float h = load_element(hidden, kType, i), k = load_element(key, kType, i);
      const float w = load_element(f.weights.w_hidden, f.weights.dtype, int64_t{m} * size + i) *
                      load_element(f.weights.w_key, f.weights.dtype, int64_t{m} * size + i);
      sums[0] = fmaf(h, k * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(k, k, sums[2]);
      sums[3] = fmaf(load_element(grad_out, kType, i), load_element(f.value, kType, t * f.value_stride + i), sums[3]);
    }
    branch_sums(sums, partial);
    if (threadIdx.x == 0) slopes[t * f.branches + m] = f.masked(t) ? Slopes{0, 0, 0, 0} : slopes_of(f, sums);
    __syncthreads();
  }
}

// A thread takes an element of a token in every branch.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_elements(const GateBwdParams p, const Slopes* slopes) {
  const GateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size);
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const bool masked = f.masked(t);
#pragma unroll 1
    for (int i = blockIdx.y * kPlainThreads + threadIdx.x; i < size; i += gridDim.y * kPlainThreads) {
      float grad_value = 0;
#pragma unroll 1
      for (int m = 0; m < f.branches; ++m) {
        const float g = load_element(vector_at<std::byte>(p.grad_out, kType, t, m, 0), kType, i);
        float to_hidden = f.options.add_residual ? g : 0.0F, to_key = 0;
        if (!masked) {
          const Slopes s = slopes[t * f.branches + m];
          const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
          const float k = load_element(vector_at<std::byte>(f.key, kType, t, m, 0), kType, i);
          const float w = load_element(f.weights.w_hidden, f.weights.dtype, int64_t{m} * size + i) *
                          load_element(f.weights.w_key, f.weights.dtype, int64_t{m} * size + i);
          to_hidden = fmaf(s.a * w, k, fmaf(-s.b, h, to_hidden));
          to_key = fmaf(w, s.a * h, -s.c * k);
          grad_value += s.gate * g;
        }
        store_element(vector_at<std::byte>(p.grad_hidden, kType, t, m, 0), kType, i, to_hidden);
        store_element(vector_at<std::byte>(p.grad_key, kType, t, m, 0), kType, i, to_key);
      }
      store_element(p.grad_value, kType, t * size + i, grad_value);
    }
  }
}

// The shares of kPlainChunks chunks of tokens, whose bounds depend on the number of tokens only.
template <DType kType>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_shares(const GateBwdParams p, const Slopes* slopes, float* shares) {
  const GateParams& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
  const int64_t chunk = ceil_div(f.num_tokens, int64_t{kPlainChunks});
  const int64_t begin = blockIdx.z * chunk, end = begin + chunk < f.num_tokens ? begin + chunk : f.num_tokens;
  const int i = blockIdx.x * kPlainThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    if (f.masked(t)) continue;
    const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
    sum = fmaf(slopes[t * f.branches + m].a * h, load_element(vector_at<std::byte>(f.key, kType, t, m, 0), kType, i), sum);
  }
  shares[(int64_t{blockIdx.z} * f.branches + m) * size + i] = sum;
}

// ---- launches --------------------------------------------------------------------------------------------------------

bool takes_tokens(const GateBwdParams& p, Tile* tile) {
  const GateParams& f = p.forward;
  if (f.dtype == DType::kF32 || f.hidden_size % kElements != 0) return false;
  const int64_t vectors = f.hidden_size / kElements;
  if (vectors > int64_t{kVectors} * kMaxThreads) return false;
  const int lanes = lanes_for(vectors, kVectors);
  if (lanes * f.branches > kMaxThreads || f.num_tokens > INT32_MAX / 2) return false;
  *tile = {static_cast<int>(vectors), static_cast<int>(f.branches), lanes, static_cast<int>(f.num_tokens)};
  return tile->size() * kVectorBytes + kStaticBytes <= max_shared_bytes();
}

bool is_aligned(const GateBwdParams& p) {
  const GateParams& f = p.forward;
  bool ok = on_vectors(f.weights) && on_vectors({const_cast<void*>(f.value), f.value_stride, 0}, f.num_tokens, 1, 2) &&
            reinterpret_cast<uintptr_t>(p.grad_value) % kVectorBytes == 0;
  for (const BranchRows* rows : {&f.hidden, &f.key, &p.grad_out, &p.grad_hidden, &p.grad_key}) {
    ok = ok && on_vectors(*rows, f.num_tokens, f.branches, 2);
  }
  return ok;
}

int64_t token_blocks(const GateParams& f) { return std::min(f.num_tokens, int64_t{num_multiprocessors()}); }

template <DType kType>
void launch_tokens(const GateBwdParams& p, const Tile& tile, cudaStream_t stream) {
  const auto kernel = gate_bwd_tokens<kType>;
  const int bytes = tile.size() * kVectorBytes;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 block(static_cast<unsigned>(tile.lanes), static_cast<unsigned>(tile.branches));
  kernel<<<static_cast<unsigned>(token_blocks(p.forward)), block, bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kType>
void launch_plain(const GateBwdParams& p, cudaStream_t stream) {
  const GateParams& f = p.forward;
  auto* slopes = static_cast<Slopes*>(p.scratch);
  auto* shares = reinterpret_cast<float*>(slopes + f.num_tokens * f.branches);
  const auto branches = static_cast<unsigned>(f.branches);
  const auto columns = static_cast<unsigned>(ceil_div(f.hidden_size, int64_t{kPlainThreads}));
  const auto tokens = static_cast<unsigned>(std::min(f.num_tokens, int64_t{num_multiprocessors()} * 16));
  gate_bwd_slopes<kType><<<dim3(tokens, branches), kPlainThreads, 0, stream>>>(p, slopes);
  gate_bwd_elements<kType><<<dim3(tokens, std::min(columns, 64U)), kPlainThreads, 0, stream>>>(p, slopes);
  gate_bwd_shares<kType><<<dim3(columns, branches, kPlainChunks), kPlainThreads, 0, stream>>>(p, slopes, shares);
  EK_CUDA_CHECK(cudaGetLastError());
}

void launch_weights(const GateBwdParams& p, const float* shares, int64_t count, int planes, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.forward.branches * p.forward.hidden_size, int64_t{kPlainThreads});
  gate_bwd_weights<<<static_cast<unsigned>(blocks), kPlainThreads, 0, stream>>>(p, shares, static_cast<int>(count), planes);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

int64_t gate_bwd_cuda_scratch_bytes(const GateBwdParams& p) {
  const GateParams& f = p.forward;
  const int64_t row_bytes = f.branches * f.hidden_size * int64_t{sizeof(float)};
  return std::max(token_blocks(f) * row_bytes, f.num_tokens * f.branches * int64_t{sizeof(Slopes)} + kPlainChunks * row_bytes);
}

void gate_bwd_cuda(const GateBwdParams& p, void* stream) {
  const GateParams& f = p.forward;
  check_params(f);
  EK_CHECK(f.branches <= kMaxGridY, "gate: " << f.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(f.hidden_size * f.branches <= INT32_MAX, "gate: " << f.branches << " rows of " << f.hidden_size << " are too many");
  const auto on = static_cast<cudaStream_t>(stream);
  Tile tile;
  if (f.num_tokens > 0 && takes_tokens(p, &tile) && is_aligned(p)) {
    f.dtype == DType::kBf16 ? launch_tokens<DType::kBf16>(p, tile, on) : launch_tokens<DType::kF16>(p, tile, on);
    return launch_weights(p, static_cast<const float*>(p.scratch), token_blocks(f), kPlanes, on);
  }
  if (f.num_tokens > 0) {
    f.dtype == DType::kF32    ? launch_plain<DType::kF32>(p, on)
    : f.dtype == DType::kBf16 ? launch_plain<DType::kBf16>(p, on)
                              : launch_plain<DType::kF16>(p, on);
  }
  const auto* shares = reinterpret_cast<const float*>(static_cast<Slopes*>(p.scratch) + f.num_tokens * f.branches);
  launch_weights(p, shares, f.num_tokens > 0 ? kPlainChunks : 0, 0, on);
}

}  // namespace engram_kernels
