// Kernels of gate and gather_gate for any size and alignment, element by element. Included by .cu files only.
//
// What the ops differ in is where key and value come from: key_and_value is overloaded for GateParams (tensors) here and
// for GatherGateParams (decoded rows, which are both) in gather_gate_block_cuda.h.
//   forward   1. gate_plain_kernel           a block per (token, branch) sums, then writes
//   backward  1. gate_bwd_slopes_kernel      the slopes of every (token, branch), a block each
//             2. gate_bwd_plain_kernel       a thread per element of a token takes it in every branch
//             3. gate_bwd_products_kernel    partial sums of a h k, of kPlainChunks chunks of tokens
//             4. gate_bwd_weights_kernel     gradients of the weights; also behind the kernels that are not plain
// Traffic  hidden and key are read two or three times, grad_out and value twice, by and large out of the cache.
#pragma once

#include <algorithm>

#include "kernels/gate/gate_cuda.h"

namespace engram_kernels {

struct KeyAndValue {
  float key, value;
};

// Element i of a token; `counts`: whether a bad row id is counted, where there are row ids.
template <DType kType>
__device__ __forceinline__ KeyAndValue key_and_value(const GateParams& p, int64_t t, int m, int i, bool /*counts*/ = false) {
  return {load_element(vector_at<std::byte>(p.key, kType, t, m, 0), kType, i),
          load_element(p.value, kType, t * p.value_stride + i)};
}

namespace {

constexpr int kPlainThreads = 128;
constexpr int kPlainChunks = 64;  // of tokens, for the weights
constexpr int kPlainBlocksPerSm = 16;
constexpr int kWeightColumns = 32, kWeightRows = 8;

__device__ __forceinline__ float weight_product(const GateWeights& w, int64_t element) {
  return load_element(w.w_hidden, w.dtype, element) * load_element(w.w_key, w.dtype, element);
}

// An element of a masked row: its bits, not its value, so that a NaN keeps its payload; or zero.
template <DType kType>
__device__ __forceinline__ void pass_element(bool residual, const void* hidden, int i, void* out) {
#pragma unroll
  for (int b = 0; b < dtype_bytes(kType); ++b) {
    const int64_t at = int64_t{i} * dtype_bytes(kType) + b;
    static_cast<std::byte*>(out)[at] = residual ? static_cast<const std::byte*>(hidden)[at] : std::byte{0};
  }
}

template <DType kType, class Params>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_plain_kernel(const Params p) {
  __shared__ float4 by_warp[kPlainThreads / kWarp];
  __shared__ float gate;
  const int size = static_cast<int>(p.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const bool masked = p.masked(t);
    const void* hidden = vector_at<std::byte>(p.hidden, kType, t, m, 0);
    void* out = vector_at<std::byte>(p.out, kType, t, m, 0);
    float sums[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < size && !masked; i += kPlainThreads) {
      const float h = load_element(hidden, kType, i), k = key_and_value<kType>(p, t, m, i, m == 0).key;
      const float w = weight_product(p.weights, int64_t{m} * size + i);
      sums[0] = fmaf(h, k * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(k, k, sums[2]);
    }
    branch_sums(sums, by_warp);
    if (threadIdx.x == 0) gate = gate_score(p.options, size, sums[0], sums[1], sums[2]).gate;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kPlainThreads) {
      if (masked) {
        pass_element<kType>(p.options.add_residual, hidden, i, out);
        continue;
      }
      const float v = key_and_value<kType>(p, t, m, i).value;
      store_element(out, kType, i, p.options.add_residual ? fmaf(gate, v, load_element(hidden, kType, i)) : gate * v);
    }
    __syncthreads();  // gate and by_warp are free again
  }
}

// Zeros for a masked token.
template <DType kType, class BwdParams>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_slopes_kernel(const BwdParams p, GateSlopes* slopes) {
  __shared__ float4 by_warp[kPlainThreads / kWarp];
  const auto& f = p.forward;
  const int size = static_cast<int>(f.hidden_size), m = blockIdx.y;
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const bool masked = f.masked(t);
    const void* hidden = vector_at<std::byte>(f.hidden, kType, t, m, 0);
    const void* grad_out = vector_at<std::byte>(p.grad_out, kType, t, m, 0);
    float sums[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < size && !masked; i += kPlainThreads) {
      const float h = load_element(hidden, kType, i), w = weight_product(f.weights, int64_t{m} * size + i);
      const KeyAndValue e = key_and_value<kType>(f, t, m, i);
      sums[0] = fmaf(h, e.key * w, sums[0]), sums[1] = fmaf(h, h, sums[1]), sums[2] = fmaf(e.key, e.key, sums[2]);
      sums[3] = fmaf(load_element(grad_out, kType, i), e.value, sums[3]);
    }
    branch_sums(sums, by_warp);
    if (threadIdx.x == 0) {
      slopes[t * f.branches + m] =
          masked ? GateSlopes{0, 0, 0, 0} : gate_slopes(f.options, f.hidden_size, sums[0], sums[1], sums[2], sums[3]);
    }
    __syncthreads();
  }
}

// Where the gradient of the value goes: with decoded rows it holds that of the key, too.
template <class BwdParams>
__device__ __forceinline__ void* value_gradient(const BwdParams& p) {
  if constexpr (std::is_same_v<BwdParams, GateBwdParams>) {
    return p.grad_value;
  } else {
    return p.grad_rows;
  }
}

template <DType kType, class BwdParams>
__global__ void __launch_bounds__(kPlainThreads, 8) gate_bwd_plain_kernel(const BwdParams p, const GateSlopes* slopes) {
  constexpr bool kKeyGradient = std::is_same_v<BwdParams, GateBwdParams>;
  const auto& f = p.forward;
  const int size = static_cast<int>(f.hidden_size);
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < f.num_tokens; t += gridDim.x) {
    const bool masked = f.masked(t);
#pragma unroll 1
    for (int i = blockIdx.y * kPlainThreads + threadIdx.x; i < size; i += gridDim.y * kPlainThreads) {
      float to_value = 0, k = kKeyGradient || masked ? 0.0F : key_and_value<kType>(f, t, 0, i).key;
#pragma unroll 1
      for (int m = 0; m < f.branches; ++m) {
        const float g = load_element(vector_at<std::byte>(p.grad_out, kType, t, m, 0), kType, i);
        float to_hidden = f.options.add_residual ? g : 0.0F, to_key = kKeyGradient ? 0.0F : to_value;
        if (!masked) {
          const GateSlopes s = slopes[t * f.branches + m];
          const float h = load_element(vector_at<std::byte>(f.hidden, kType, t, m, 0), kType, i);
          if constexpr (kKeyGradient) k = key_and_value<kType>(f, t, m, i).key;
          const float aw = s.a * weight_product(f.weights, int64_t{m} * size + i);
          to_hidden = fmaf(aw, k, fmaf(-s.b, h, to_hidden));
          to_key = fmaf(aw, h, fmaf(-s.c, k, to_key));
          to_value = fmaf(s.gate, g, kKeyGradient ? to_value : to_key);
        }
        store_element(vector_at<std::byte>(p.grad_hidden, kType, t, m, 0), kType, i, to_hidden);
        if constexpr (kKeyGradient) store_element(vector_at<std::byte>(p.grad_key, kType, t, m, 0), kType, i, to_key);
      }
      store_element(value_gradient(p), kType, t * size + i, to_value);
    }
  }
}

// The bounds of the chunks depend on the number of tokens only.
template <DType kType, class BwdParams>
__global__ void __launch_bounds__(kPlainThreads, 8)
    gate_bwd_products_kernel(const BwdParams p, const GateSlopes* slopes, float* partial_sums) {
  const auto& f = p.forward;
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
    sum = fmaf(slopes[t * f.branches + m].a * h, key_and_value<kType>(f, t, m, i).key, sum);
  }
  partial_sums[(int64_t{blockIdx.z} * f.branches + m) * size + i] = sum;
}

// Partial sums that lie as the weights do.
struct AsWeights {
  __device__ __forceinline__ int64_t element(int64_t, int i) const { return i; }
};

// Gradients of the weights out of partial_sums [count][size]. order.element(hidden_size, i): the element of the weights
// that the i-th sum belongs to, or -1. A thread adds every kWeightRows-th of `count`; a block adds its rows in their order.
template <class BwdParams, class Order>
__global__ void __launch_bounds__(kWeightColumns* kWeightRows)
    gate_bwd_weights_kernel(const BwdParams p, const float* partial_sums, int count, int size, const Order order) {
  __shared__ float of_row[kWeightRows][kWeightColumns];
  const auto& f = p.forward;
  const int i = blockIdx.x * kWeightColumns + threadIdx.x;
  float sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int n = threadIdx.y; n < count; n += kWeightRows) sum += partial_sums[int64_t{n} * size + i];
  }
  of_row[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
  for (int n = 1; n < kWeightRows; ++n) sum += of_row[n][threadIdx.x];
  const int64_t element = order.element(f.hidden_size, i);
  if (element < 0) return;
  const DType dtype = f.weights.dtype;
  store_element(p.grad_w_hidden, dtype, element, sum * load_element(f.weights.w_key, dtype, element));
  store_element(p.grad_w_key, dtype, element, sum * load_element(f.weights.w_hidden, dtype, element));
}

// ---- launches --------------------------------------------------------------------------------------------------------

inline unsigned plain_token_blocks(int64_t num_tokens) {
  return static_cast<unsigned>(std::min(num_tokens, int64_t{num_multiprocessors()} * kPlainBlocksPerSm));
}

template <DType kType, class Params>
void launch_plain(const Params& p, cudaStream_t stream) {
  const dim3 grid(plain_token_blocks(p.num_tokens), static_cast<unsigned>(p.branches));
  gate_plain_kernel<kType><<<grid, kPlainThreads, 0, stream>>>(p);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <class BwdParams, class Order>
void launch_weights(const BwdParams& p, const float* partial_sums, int64_t count, int64_t size, const Order& order,
                    cudaStream_t stream) {
  const dim3 block(kWeightColumns, kWeightRows);
  gate_bwd_weights_kernel<<<static_cast<unsigned>(ceil_div(size, int64_t{kWeightColumns})), block, 0, stream>>>(
      p, partial_sums, static_cast<int>(count), static_cast<int>(size), order);
  EK_CUDA_CHECK(cudaGetLastError());
}

// Scratch memory of launch_bwd_plain: the slopes, then the partial sums.
template <class Params>
int64_t plain_scratch_bytes(const Params& f) {
  return f.num_tokens * f.branches * int64_t{sizeof(GateSlopes)} +
         kPlainChunks * f.branches * f.hidden_size * int64_t{sizeof(float)};
}

// All gradients, of no tokens too: zeros for the weights.
template <DType kType, class BwdParams>
void launch_bwd_plain(const BwdParams& p, cudaStream_t stream) {
  const auto& f = p.forward;
  auto* slopes = static_cast<GateSlopes*>(p.scratch);
  auto* partial_sums = reinterpret_cast<float*>(slopes + f.num_tokens * f.branches);
  if (f.num_tokens > 0) {
    const auto branches = static_cast<unsigned>(f.branches);
    const auto columns = static_cast<unsigned>(ceil_div(f.hidden_size, int64_t{kPlainThreads}));
    const unsigned tokens = plain_token_blocks(f.num_tokens);
    gate_bwd_slopes_kernel<kType><<<dim3(tokens, branches), kPlainThreads, 0, stream>>>(p, slopes);
    gate_bwd_plain_kernel<kType><<<dim3(tokens, std::min(columns, 64U)), kPlainThreads, 0, stream>>>(p, slopes);
    gate_bwd_products_kernel<kType><<<dim3(columns, branches, kPlainChunks), kPlainThreads, 0, stream>>>(p, slopes, partial_sums);
    EK_CUDA_CHECK(cudaGetLastError());
  }
  launch_weights(p, partial_sums, f.num_tokens > 0 ? kPlainChunks : 0, f.branches * f.hidden_size, AsWeights(), stream);
}

}  // namespace
}  // namespace engram_kernels
