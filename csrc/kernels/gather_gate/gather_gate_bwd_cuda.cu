// CUDA kernels of the backward pass of gather_gate. Contract: gather_gate.h, gate.h; layout of a block:
// gather_gate_block_cuda.h.
//
// A persistent block walks over tokens, kGroup branches at a time:
//   1. decode   the token's rows, once for all branches, as the forward pass does
//   2. sums     dot, |h|^2, |e|^2 and dout . e, per thread, then by warp
//   3. slopes   one warp per branch turns them into a, b, c and the gate; the copies of the next token's rows start
//   4. grads    grad_hidden goes out; the next hidden and grad_out take their place in the registers
//   5. rows     grad_rows goes out after the last branch
//   6. weights  a h e is summed over the tokens in shared memory; a last kernel adds the sums of the blocks
// The sums have a fixed order: the bits depend on the number of blocks only.
// Traffic  least: rows, ids, hidden and grad_out read, grad_hidden and grad_rows written once. On top the weights once per
//          block and 4 M H bytes of partial sums per block, written and read.
// Limits   those of the forward pass; rows of hidden up to 8,192 elements of 2 bytes or 6,144 of 4. Other rows go to
//          gate_plain_cuda.h.
#include <algorithm>

#include "kernels/gather_gate/gather_gate_block_cuda.h"

namespace engram_kernels {
namespace {

template <DType kType, int kGroup>
constexpr int kMaxThreads = kGroup > 1             ? 384
                            : kType == DType::kF32 ? 768
                                                   : 512;  // by registers

template <int kGroup>
struct Sums {                                // of a group
  float by_warp[4 * kGroup][kMaxWarps + 1];  // dot, hidden^2, grad_out . e, and e^2 once
  GateSlopes slopes[kGroup];
};

// What a thread holds of a group.
template <int kGroup>
struct Held {
  uint4 hidden[kGroup][kVectors], grad[kGroup][kVectors];
};

// Where the vectors of a group's first branch lie.
struct Group {
  const std::byte *hidden, *grad;
  int count;  // branches
};

template <DType kType>
__device__ __forceinline__ Group group_at(const GatherGateBwdParams& p, int t, int branch, int count) {
  return {first_vector_at<kType>(p.forward.hidden, t, branch), first_vector_at<kType>(p.grad_out, t, branch), count};
}

template <DType kType, int kGroup>
__device__ __forceinline__ void load_groups(const GatherGateBwdParams& p, const Group& group,
                                            const VectorPlace (&places)[kVectors], Held<kGroup>& held) {
  load_group<kType>(p.forward.hidden, group.hidden, group.count, places, held.hidden);
  load_group<kType>(p.grad_out, group.grad, group.count, places, held.grad);
}

template <DType kType, bool kStaged, int kGroup>
__device__ __forceinline__ void sum_group(const GatherGateParams& p, const Tile& tile, int branch, int count,
                                          const VectorPlace (&places)[kVectors], const Held<kGroup>& held,
                                          const float (&e)[kVectors][kVectorElements<kType>], Sums<kGroup>& sums) {
  constexpr int kElements = kVectorElements<kType>, kLanes = kWarp / (4 * kGroup);
  float v[4 * kGroup] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int n = 0; n < kElements; ++n) v[3] = fmaf(e[j][n], e[j][n], v[3]);
  }
  Products<kElements, kStaged, false> products(p, tile, branch, places);
#pragma unroll
  for (int m = 0; m < kGroup; ++m, products.next_branch()) {
    if (m >= count) break;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int quad = 0; quad < kElements / 4; ++quad) {  // four elements at a time, for the registers' sake
        float h[4], g[4], w[4];
        products.load(j, quad, w);
        unpack_four<kType>(held.hidden[m][j], quad, h);
        unpack_four<kType>(held.grad[m][j], quad, g);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float x = e[j][4 * quad + n];
          v[4 * m] = fmaf(h[n], x * w[n], v[4 * m]);
          v[4 * m + 1] = fmaf(h[n], h[n], v[4 * m + 1]);
          v[4 * m + 2] = fmaf(g[n], x, v[4 * m + 2]);
        }
      }
    }
  }
  const float sum = spread_sums<kLanes>(v);
  const int lane = threadIdx.x % kWarp;
  if (lane % kLanes == 0) sums.by_warp[lane / kLanes][threadIdx.x / kWarp] = sum;
}

// The slopes of the group: a warp per branch.
template <int kGroup>
__device__ __forceinline__ void score_group(const GatherGateParams& p, int count, Sums<kGroup>& sums) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int m = threadIdx.x / kWarp; m < count; m += warps) {
    float v[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane < warps) v[i] = sums.by_warp[i < 3 ? 4 * m + i : 3][lane];
    }
    warp_sums(v);
    if (lane == 0) sums.slopes[m] = gate_slopes(p.options, p.hidden_size, v[0], v[1], v[3], v[2]);
  }
}

__device__ __forceinline__ float4* partial_sums_of(const Tile& tile, int planes, int branch, int plane) {
  return shared + tile.partial_sums_at + (branch * planes + plane) * tile.vectors;
}

// Four elements of a branch: hidden's gradient into words; adds to the memory vector's and to the partial sums.
template <DType kType, bool kResidual>
__device__ __forceinline__ void quad_gradients(const GateSlopes& s, const uint4& hidden, const uint4& grad, int quad,
                                               const float (&w)[4], const float* e, float* grad_e, float4* partial_sums,
                                               uint32_t* words) {
  float h[4], g[4], x[4];
  unpack_four<kType>(hidden, quad, h);
  unpack_four<kType>(grad, quad, g);
  load_floats<DType::kF32, 4>(partial_sums, x);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float aw = s.a * w[n];
    x[n] = fmaf(s.a * h[n], e[n], x[n]);
    grad_e[n] = fmaf(s.gate, g[n], fmaf(aw, h[n], grad_e[n]));
    h[n] = fmaf(aw, e[n], fmaf(-s.b, h[n], kResidual ? g[n] : 0.0F));
  }
  *partial_sums = make_float4(x[0], x[1], x[2], x[3]);
  pack_four<kType>(h, words);
}

// Writes hidden's gradient of the group and asks for the next one. kWhole: the thread has all its vectors.
template <DType kType, bool kStaged, bool kResidual, bool kWhole, int kGroup>
__device__ __forceinline__ void write_group(const GatherGateBwdParams& p, const Tile& tile, int t, int branch, int count,
                                            const VectorPlace (&places)[kVectors], const GateSlopes* slopes,
                                            const float (&e)[kVectors][kVectorElements<kType>],
                                            float (&grad_e)[kVectors][kVectorElements<kType>], Group next, Held<kGroup>& held) {
  constexpr int kElements = kVectorElements<kType>, kPlanes = kElements / 4, kBytes = dtype_bytes(kType);
  std::byte* to = first_vector_at<kType>(p.grad_hidden, t, branch);
  Products<kElements, kStaged, kWhole> products(p.forward, tile, branch, places);
  float4* partial_sums = partial_sums_of(tile, kPlanes, branch, 0) + first_vector<kVectors>();
#pragma unroll
  for (int m = 0; m < kGroup; ++m) {
    if (m < count) {
      const GateSlopes s = slopes[m];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!kWhole && !places[j].is_there()) continue;
        uint32_t words[4];
#pragma unroll
        for (int quad = 0; quad < kPlanes; ++quad) {
          float w[4];
          products.load(j, quad, w);
          quad_gradients<kType, kResidual>(s, held.hidden[m][j], held.grad[m][j], quad, w, e[j] + 4 * quad, grad_e[j] + 4 * quad,
                                           partial_sums + quad * tile.vectors + j * kWarp, words + 2 * quad);
        }
        store_words(to + j * kWarp * kVectorBytes, words);
#pragma unroll
        for (int n = 0; n < kElements; ++n) grad_e[j][n] = fmaf(-s.c, e[j][n], grad_e[j][n]);
      }
    }
    if (m < next.count) {
      load_vectors<kWhole>(next.hidden, places, held.hidden[m]);
      load_vectors<kWhole>(next.grad, places, held.grad[m]);
    }
    products.next_branch();
    partial_sums += kPlanes * tile.vectors;
    to += p.grad_hidden.branch_stride * kBytes;
    next.hidden += p.forward.hidden.branch_stride * kBytes, next.grad += p.grad_out.branch_stride * kBytes;
  }
}

// Writes hidden's gradient of a masked token: the output's gradient as it is, or zeros.
template <DType kType, int kGroup>
__device__ __forceinline__ void pass_group(const GatherGateBwdParams& p, int t, int branch, int count,
                                           const VectorPlace (&places)[kVectors], const Held<kGroup>& held) {
  std::byte* to = first_vector_at<kType>(p.grad_hidden, t, branch);
#pragma unroll
  for (int m = 0; m < kGroup; ++m, to += p.grad_hidden.branch_stride * dtype_bytes(kType)) {
    if (m >= count) break;
    uint4 written[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      written[j] = p.forward.options.add_residual ? held.grad[m][j] : make_uint4(0, 0, 0, 0);
    }
    store_vectors(to, places, written);
  }
}

// The gradient of the memory vector, which is that of the token's rows.
template <DType kType>
__device__ __forceinline__ void write_rows(const GatherGateBwdParams& p, const Tile& tile, int t,
                                           const VectorPlace (&places)[kVectors],
                                           const float (&grad_e)[kVectors][kVectorElements<kType>]) {
  auto* to = static_cast<uint4*>(p.grad_rows) + int64_t{t} * tile.vectors + first_vector<kVectors>();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (places[j].is_there()) store_floats<kType>(to + j * kWarp, grad_e[j]);
  }
}

template <DType kType, bool kStaged, int kGroup>
__device__ __forceinline__ void token_gradients(const GatherGateBwdParams& p, const Tile& tile, int t, bool masked,
                                                const Coming& next, const VectorPlace (&places)[kVectors], Held<kGroup>& held) {
  constexpr int kElements = kVectorElements<kType>;
  __shared__ Sums<kGroup> sums;
  const GatherGateParams& f = p.forward;
  float e[kVectors][kElements], grad_e[kVectors][kElements] = {};
  if (!masked) decode_memory<false>(f, tile, places, e);
#pragma unroll 1
  for (int branch = 0; branch < tile.branches; branch += kGroup) {
    const int count = min(kGroup, tile.branches - branch), left = tile.branches - branch - count;
    if (!masked) sum_group<kType, kStaged>(f, tile, branch, count, places, held, e, sums);
    __syncthreads();  // also: the rows are decoded, and where they were is free
    if (branch == 0) describe_rows(f, tile, next);
    if (!masked) score_group(f, count, sums);
    __syncthreads();
    const bool ends = t + static_cast<int>(gridDim.x) >= tile.tokens;
    if (branch == 0 && !ends) stage_rows(f, tile);
    const Group following = group_at<kType>(p, left > 0 ? t : t + static_cast<int>(gridDim.x), left > 0 ? branch + kGroup : 0,
                                            left > 0 ? min(kGroup, left)
                                            : ends   ? 0
                                                     : min(kGroup, tile.branches));
    if (masked) {
      pass_group<kType>(p, t, branch, count, places, held);
      load_groups<kType>(p, following, places, held);
    } else if (!f.options.add_residual) {
      write_group<kType, kStaged, false, false>(p, tile, t, branch, count, places, sums.slopes, e, grad_e, following, held);
    } else if (places[kVectors - 1].is_there()) {
      write_group<kType, kStaged, true, true>(p, tile, t, branch, count, places, sums.slopes, e, grad_e, following, held);
    } else {
      write_group<kType, kStaged, true, false>(p, tile, t, branch, count, places, sums.slopes, e, grad_e, following, held);
    }
  }
  write_rows<kType>(p, tile, t, places, grad_e);
}

template <DType kType, bool kStaged, int kGroup>
__global__ void __launch_bounds__(kMaxThreads<kType, kGroup>)
    gather_gate_bwd_kernel(const GatherGateBwdParams p, const Tile tile) {
  constexpr int kElements = kVectorElements<kType>, kPlanes = kElements / 4;
  const GatherGateParams& f = p.forward;
  for (int i = threadIdx.x; i < tile.branches * kPlanes * tile.vectors; i += blockDim.x) {
    partial_sums_of(tile, kPlanes, 0, 0)[i] = make_float4(0, 0, 0, 0);
  }
  VectorPlace places[kVectors];
  find_places<kElements>(f, tile, places);
  Coming next = look_ahead(f, tile, blockIdx.x);
  Held<kGroup> held = {};
  load_groups<kType>(p, group_at<kType>(p, blockIdx.x, 0, min(kGroup, tile.branches)), places, held);
  describe_rows(f, tile, next);
  __syncthreads();
  stage_rows(f, tile);
  // last, so that the first token is on its way meanwhile
  if (kStaged) stage_weights<kElements, kVectors>(f.weights, f.hidden_size, 0, tile.branches, tile.vectors, shared);
#pragma unroll 1
  for (int t = blockIdx.x; t < tile.tokens; t += gridDim.x) {
    const bool masked = next.masked;
    next = look_ahead(f, tile, t + gridDim.x);
    wait_for_copies();
    __syncthreads();
    token_gradients<kType, kStaged>(p, tile, t, masked, next, places, held);
  }
  __syncthreads();
  auto* out = static_cast<float4*>(p.scratch) + int64_t{blockIdx.x} * tile.branches * kPlanes * tile.vectors;
  for (int i = threadIdx.x; i < tile.branches * kPlanes * tile.vectors; i += blockDim.x) {
    out[i] = partial_sums_of(tile, kPlanes, 0, 0)[i];
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Where a block writes its partial sums: [branch][plane][vector][4].
struct PartialSumOrder {
  int planes;

  __device__ __forceinline__ int64_t element(int64_t hidden_size, int i) const {
    const int size = static_cast<int>(hidden_size), row = i / size, at = i % size;
    const int plane = at / (size / planes), in_plane = at % (size / planes);
    return int64_t{row} * size + in_plane / 4 * (4 * planes) + plane * 4 + in_plane % 4;
  }
};

int64_t token_blocks(const GatherGateParams& f) { return std::min(f.num_tokens, int64_t{num_multiprocessors()}); }

template <DType kType, bool kStaged, int kGroup>
bool launch_tokens(const GatherGateBwdParams& p, Tile tile, cudaStream_t stream) {
  const int64_t plane_bytes = p.forward.branches * p.forward.hidden_size * int64_t{sizeof(float)};
  const int64_t kept = plane_bytes * (kStaged ? 2 : 1);
  if (kept > max_shared_bytes() || !lay_out(p.forward, kVectorElements<kType>, static_cast<int>(kept), &tile)) return false;
  tile.partial_sums_at = static_cast<int>(kStaged ? plane_bytes / kVectorBytes : 0);
  const auto kernel = gather_gate_bwd_kernel<kType, kStaged, kGroup>;
  allow_max_shared_bytes(reinterpret_cast<const void*>(kernel));
  const int threads = lanes_for(tile.vectors, kVectors);
  kernel<<<static_cast<unsigned>(token_blocks(p.forward)), threads, tile.shared_bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

// Whether the kernel took it.
template <DType kType>
bool launch_tokens(const GatherGateBwdParams& p, cudaStream_t stream) {
  constexpr int kElements = kVectorElements<kType>, kBytes = dtype_bytes(kType);
  const GatherGateParams& f = p.forward;
  if (f.num_tokens > INT32_MAX / 2 || f.hidden_size % kElements != 0 || !on_vectors(f.weights) ||
      reinterpret_cast<uintptr_t>(p.grad_rows) % kVectorBytes != 0) {
    return false;
  }
  for (const BranchRows* rows : {&f.hidden, &p.grad_out, &p.grad_hidden}) {
    if (!on_vectors(*rows, f.num_tokens, f.branches, kBytes)) return false;
  }
  const int64_t vectors = f.hidden_size / kElements;
  if (vectors > kVectors * kMaxThreads<kType, 1> || f.columns > lanes_for(vectors, kVectors)) return false;
  Tile tile{};
  tile.vectors = static_cast<int>(vectors);
  tile.branches = static_cast<int>(f.branches);
  tile.tokens = static_cast<int>(f.num_tokens);
  if (vectors > kVectors * kMaxThreads<kType, 4>) return launch_tokens<kType, false, 1>(p, tile, stream);
  return launch_tokens<kType, true, 4>(p, tile, stream) || launch_tokens<kType, false, 4>(p, tile, stream);
}

template <DType kType>
void launch(const GatherGateBwdParams& p, cudaStream_t stream) {
  const GatherGateParams& f = p.forward;
  if (f.num_tokens == 0 || !launch_tokens<kType>(p, stream)) return launch_bwd_plain<kType>(p, stream);
  launch_weights(p, static_cast<const float*>(p.scratch), token_blocks(f), f.branches * f.hidden_size,
                 PartialSumOrder{kVectorElements<kType> / 4}, stream);
}

}  // namespace

int64_t gather_gate_bwd_cuda_scratch_bytes(const GatherGateBwdParams& p) {
  const GatherGateParams& f = p.forward;
  return std::max(token_blocks(f) * f.branches * f.hidden_size * int64_t{sizeof(float)}, plain_scratch_bytes(f));
}

void gather_gate_bwd_cuda(const GatherGateBwdParams& p, void* stream) {
  const GatherGateParams& f = p.forward;
  check_params(f);
  EK_CHECK(f.branches <= kMaxGridY, "gather_gate: " << f.branches << " branches, expected at most " << kMaxGridY);
  EK_CHECK(f.hidden_size * f.branches <= INT32_MAX,
           "gather_gate: " << f.branches << " rows of " << f.hidden_size << " are too many");
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(f.dtype, [&](auto type) { launch<type.value>(p, on); });
}

}  // namespace engram_kernels
