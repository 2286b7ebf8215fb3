// CUDA kernels of the backward pass of gather_gate. Contract: gather_gate.h, gate.h; layout of a block:
// gather_gate_block_cuda.h.
//
// Mapping  as the forward pass: a block takes a token after the other; hidden, the output's gradient, the memory vector and
//          the gradient of it stay in registers, where the next token's hidden and gradient take their place. sum_t a h e, of
//          which both weight gradients are multiples, is collected in shared memory and written once a block; a last kernel
//          adds the blocks' shares in their order, so that the bits depend on the number of blocks only. Three plain
//          kernels (gather_gate_bwd_plain_cuda.h) take what is not aligned or too wide.
// Traffic  least: rows, ids, hidden and grad_out read, grad_hidden and grad_rows written once. On top the weights once a block
//          and a share of 4 M H bytes, written and read.
// Limits   the first kernel: as the forward pass; rows of hidden up to 8,192 elements of 2 bytes or 6,144 of 4.
#include <algorithm>

#include "kernels/gather_gate/gather_gate_bwd_plain_cuda.h"

namespace engram_kernels {
namespace {

template <DType kType, int kGroup>
constexpr int kMaxThreads = kGroup > 1             ? 384
                            : kType == DType::kF32 ? 768
                                                   : 512;  // by registers

template <int kGroup>
struct Sums {                                // of a group
  float by_warp[4 * kGroup][kMaxWarps + 1];  // dot, hidden^2, grad_out . e, and e^2 once
  Slopes slopes[kGroup];
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
__device__ __forceinline__ void load_groups(const GatherGateBwdParams& p, const Group& group, const Place (&places)[kVectors],
                                            Held<kGroup>& held) {
  load_group<kType>(p.forward.hidden, group.hidden, group.count, places, held.hidden);
  load_group<kType>(p.grad_out, group.grad, group.count, places, held.grad);
}

template <DType kType, bool kStaged, int kGroup>
__device__ __forceinline__ void sum_group(const GatherGateParams& p, const Tile& tile, int branch, int count,
                                          const Place (&places)[kVectors], const Held<kGroup>& held,
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
      for (int quad = 0; quad < kElements / 4; ++quad) {  // four elements a time, for the registers' sake
        float h[4], g[4], w[4];
        products.load(j, quad, w);
        unpack_quad<kType>(held.hidden[m][j], quad, h);
        unpack_quad<kType>(held.grad[m][j], quad, g);
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
  spread_sums<4 * kGroup>(v);
  const int lane = threadIdx.x % kWarp;
  if (lane % kLanes == 0) sums.by_warp[lane / kLanes][threadIdx.x / kWarp] = v[0];
}

// The slopes of the group: a warp a branch.
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
    if (lane == 0) sums.slopes[m] = slopes_of(p, v);
  }
}

__device__ __forceinline__ float4* shares_at(const Tile& tile, int planes, int branch, int plane) {
  return shared + tile.shares_at + (branch * planes + plane) * tile.vectors;
}

// Four elements of a branch: hidden's gradient into words; adds to the memory vector's and to the share.
template <DType kType, bool kResidual>
__device__ __forceinline__ void quad_gradients(const Slopes& s, const uint4& hidden, const uint4& grad, int quad,
                                               const float (&w)[4], const float* e, float* grad_e, float4* share,
                                               uint32_t* words) {
  float h[4], g[4], x[4];
  unpack_quad<kType>(hidden, quad, h);
  unpack_quad<kType>(grad, quad, g);
  load_floats<DType::kF32, 4>(share, x);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float aw = s.a * w[n];
    x[n] = fmaf(s.a * h[n], e[n], x[n]);
    grad_e[n] = fmaf(s.gate, g[n], fmaf(aw, h[n], grad_e[n]));
    h[n] = fmaf(aw, e[n], fmaf(-s.b, h[n], kResidual ? g[n] : 0.0F));
  }
  *share = make_float4(x[0], x[1], x[2], x[3]);
  pack_quad<kType>(h, words);
}

// Writes hidden's gradient of the group and asks for the next one. kWhole: the thread has all its vectors.
template <DType kType, bool kStaged, bool kResidual, bool kWhole, int kGroup>
__device__ __forceinline__ void write_group(const GatherGateBwdParams& p, const Tile& tile, int t, int branch, int count,
                                            const Place (&places)[kVectors], const Slopes* slopes,
                                            const float (&e)[kVectors][kVectorElements<kType>],
                                            float (&grad_e)[kVectors][kVectorElements<kType>], Group next, Held<kGroup>& held) {
  constexpr int kElements = kVectorElements<kType>, kPlanes = kElements / 4, kBytes = dtype_bytes(kType);
  std::byte* to = first_vector_at<kType>(p.grad_hidden, t, branch);
  Products<kElements, kStaged, kWhole> products(p.forward, tile, branch, places);
  float4* share = shares_at(tile, kPlanes, branch, 0) + first_vector<kVectors>();
#pragma unroll
  for (int m = 0; m < kGroup; ++m) {
    if (m < count) {
      const Slopes s = slopes[m];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!kWhole && !places[j].is_there()) continue;
        uint32_t words[4];
#pragma unroll
        for (int quad = 0; quad < kPlanes; ++quad) {
          float w[4];
          products.load(j, quad, w);
          quad_gradients<kType, kResidual>(s, held.hidden[m][j], held.grad[m][j], quad, w, e[j] + 4 * quad, grad_e[j] + 4 * quad,
                                           share + quad * tile.vectors + j * kWarp, words + 2 * quad);
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
    share += kPlanes * tile.vectors;
    to += p.grad_hidden.branch_stride * kBytes;
    next.hidden += p.forward.hidden.branch_stride * kBytes, next.grad += p.grad_out.branch_stride * kBytes;
  }
}

// The same for a masked token: the output's gradient as it is, or zeros.
template <DType kType, int kGroup>
__device__ __forceinline__ void pass_group(const GatherGateBwdParams& p, int t, int branch, int count,
                                           const Place (&places)[kVectors], const Held<kGroup>& held) {
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
__device__ __forceinline__ void write_rows(const GatherGateBwdParams& p, const Tile& tile, int t, const Place (&places)[kVectors],
                                           const float (&grad_e)[kVectors][kVectorElements<kType>]) {
  auto* to = static_cast<uint4*>(p.grad_rows) + int64_t{t} * tile.vectors + first_vector<kVectors>();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (places[j].is_there()) store_floats<kType>(to + j * kWarp, grad_e[j]);
  }
}

template <DType kType, bool kStaged, int kGroup>
__device__ __forceinline__ void token_gradients(const GatherGateBwdParams& p, const Tile& tile, int t, bool masked,
                                                const Coming& next, const Place (&places)[kVectors], Held<kGroup>& held) {
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
    gather_gate_bwd_tokens(const GatherGateBwdParams p, const Tile tile) {
  constexpr int kElements = kVectorElements<kType>, kPlanes = kElements / 4;
  const GatherGateParams& f = p.forward;
  for (int i = threadIdx.x; i < tile.branches * kPlanes * tile.vectors; i += blockDim.x) {
    shares_at(tile, kPlanes, 0, 0)[i] = make_float4(0, 0, 0, 0);
  }
  Place places[kVectors];
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
    out[i] = shares_at(tile, kPlanes, 0, 0)[i];
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

int64_t token_blocks(const GatherGateParams& f) { return std::min(f.num_tokens, int64_t{num_multiprocessors()}); }

template <DType kType, bool kStaged, int kGroup>
bool launch_tokens(const GatherGateBwdParams& p, Tile tile, cudaStream_t stream) {
  const int64_t plane_bytes = p.forward.branches * p.forward.hidden_size * int64_t{sizeof(float)};
  const int64_t kept = plane_bytes * (kStaged ? 2 : 1);
  if (kept > max_shared_bytes() || !lay_out(p.forward, kVectorElements<kType>, static_cast<int>(kept), &tile)) return false;
  tile.shares_at = static_cast<int>(kStaged ? plane_bytes / kVectorBytes : 0);
  const auto kernel = gather_gate_bwd_tokens<kType, kStaged, kGroup>;
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.shared_bytes));
  const int threads = lanes_for(tile.vectors, kVectors);
  kernel<<<static_cast<unsigned>(token_blocks(p.forward)), threads, tile.shared_bytes, stream>>>(p, tile);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

// Whether the kernel of a block a token took it.
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
void launch_plain(const GatherGateBwdParams& p, Slopes* slopes, float* shares, cudaStream_t stream) {
  const GatherGateParams& f = p.forward;
  const auto branches = static_cast<unsigned>(f.branches);
  const auto columns = static_cast<unsigned>(ceil_div(f.hidden_size, int64_t{kPlainThreads}));
  const auto tokens = static_cast<unsigned>(std::min(f.num_tokens, int64_t{num_multiprocessors()} * 16));
  gather_gate_bwd_slopes<kType><<<dim3(tokens, branches), kPlainThreads, 0, stream>>>(p, slopes);
  gather_gate_bwd_elements<kType><<<dim3(tokens, std::min(columns, 64U)), kPlainThreads, 0, stream>>>(p, slopes);
  gather_gate_bwd_shares<kType><<<dim3(columns, branches, kPlainChunks), kPlainThreads, 0, stream>>>(p, slopes, shares);
  EK_CUDA_CHECK(cudaGetLastError());
}

void launch_weights(const GatherGateBwdParams& p, const float* shares, int64_t count, int planes, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.forward.branches * p.forward.hidden_size, int64_t{kPlainThreads});
  gather_gate_bwd_weights<<<static_cast<unsigned>(blocks), kPlainThreads, 0, stream>>>(p, shares, static_cast<int>(count),
                                                                                       planes);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kType>
void launch(const GatherGateBwdParams& p, cudaStream_t stream) {
  const GatherGateParams& f = p.forward;
  if (f.num_tokens > 0 && launch_tokens<kType>(p, stream)) {
    return launch_weights(p, static_cast<const float*>(p.scratch), token_blocks(f), kVectorElements<kType> / 4, stream);
  }
  auto* slopes = static_cast<Slopes*>(p.scratch);
  auto* shares = reinterpret_cast<float*>(slopes + f.num_tokens * f.branches);
  if (f.num_tokens > 0) launch_plain<kType>(p, slopes, shares, stream);
  launch_weights(p, shares, f.num_tokens > 0 ? kPlainChunks : 0, 0, stream);
}

}  // namespace

int64_t gather_gate_bwd_cuda_scratch_bytes(const GatherGateBwdParams& p) {
  const GatherGateParams& f = p.forward;
  const int64_t row_bytes = f.branches * f.hidden_size * int64_t{sizeof(float)};
  return std::max(token_blocks(f) * row_bytes, f.num_tokens * f.branches * int64_t{sizeof(Slopes)} + kPlainChunks * row_bytes);
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
