// CUDA kernels of short_conv, backward. Contract: short_conv.h; formulas: short_conv_bwd_cpu.cpp.
//
// Mapping  three launches: sums over whole rows (short_conv_bwd_stats_cuda.h), gradients by tiles of channels and chunks of
//          tokens (short_conv_bwd_grads_cuda.h), and the chunks' sums of the weights' gradients, added in order.
// Traffic  the least is x and grad_out read once and grad_x written once, 3 rows a token and branch; here x and grad_out come
//          twice, 5 rows (1.67x), plus the rows that blocks reach to in front and behind, plus (width + 1) * 4 B of stats
//          thrice. One pass would have to hold x, grad_out and dz in float over the reach for whole rows: 8 B a channel and
//          token of the reach, which an SM has for rows of 2,000 channels, not of 5,120.
// Order    sums depend on the sizes and the number of multiprocessors alone: the same bits every run.
#include "kernels/short_conv/short_conv_bwd_any_cuda.h"
#include "kernels/short_conv/short_conv_bwd_grads_cuda.h"
#include "kernels/short_conv/short_conv_bwd_stats_cuda.h"
#include "kernels/short_conv/short_conv_plan_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kSumThreads = 128;
constexpr int kMinChunk = 32;

// grad_weight and grad_norm_weight from the sums over the chunks: both are sums of dz * xh, since
// sum of dn[t] * xh[t] = sum over j of weight[j] * sum over t of dz[t] * xh[t - back(j)].
template <DType kType>
__global__ void __launch_bounds__(kSumThreads) short_conv_bwd_weights_kernel(const ShortConvBwdParams b, const Saved saved) {
  const ShortConvParams& p = b.forward;
  const int64_t channel = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const int branch = blockIdx.y;
  if (channel >= p.hidden_size) return;
  const int64_t at = branch * p.hidden_size + channel;
  const float norm_weight = load_weight<kType>(p, p.norm_weight, at);
  float norm_grad = 0.0F;
  const auto store = [&](float value, void* to, int64_t i) {
    p.weight_dtype == DType::kF32 ? store_element<DType::kF32>(value, to, i) : store_element<kType>(value, to, i);
  };
#pragma unroll 1
  for (int j = 0; j < p.width; ++j) {
    float sum = 0.0F;
#pragma unroll 4
    for (int chunk = 0; chunk < saved.chunks; ++chunk) sum += saved.tap_sum(p, chunk, branch, j)[channel];
    store(sum * norm_weight, b.grad_weight, at * p.width + j);
    norm_grad = __fmaf_rn(load_weight<kType>(p, p.weight, at * p.width + j), sum, norm_grad);
  }
  store(norm_grad, b.grad_norm_weight, at);
}

struct BwdPlan {
  Plan stats, grads;
  bool stats_in_ring, grads_in_ring;
  int tiles;
  Saved saved;
  int64_t scratch_bytes;
};

// Whether the rows within reach fit into shared memory.
template <DType kType>
bool plan_stats(const ShortConvParams& p, Plan* plan) {
  if (!plan->aligned || !fits_registers<kType>(p, *plan) || p.reach() * plan->row_bytes > kSharedBytesOfSm) return false;
  for (plan->group = kGroup; plan->group > 0; plan->group /= 2) {
    plan->ring_rows = static_cast<int>(p.reach()) + 2 * plan->group;
    plan->rows_held = plan->ring_rows + 2 * plan->group;
    plan->shared_bytes = stats_bytes(*plan);
    if (plan->shared_bytes > max_shared_bytes()) continue;
    plan->tokens = std::max({even_tokens<kType>(p, *plan), static_cast<int>(p.reach()), kGroup});
    return true;
  }
  return false;
}

// Tiles of the channels that fit, and chunks long enough to earn the rows around them.
template <DType kType>
bool plan_grads(const ShortConvParams& p, Plan* plan, int* tiles) {
  if (!plan->aligned || p.width > kTaps || p.reach() * kWarp * 16 > kSharedBytesOfSm) return false;
  const int needed = static_cast<int>(ceil_div(ceil_div(plan->vectors, kVectors<kType>), kWarp)) * kWarp;
  plan->group = 2;
  plan->ring_rows = static_cast<int>(p.reach()) + 2 * plan->group;
  plan->rows_held = 2 * plan->ring_rows;
  for (plan->threads = std::min(needed, kMaxTileThreads); plan->threads >= kWarp; plan->threads -= kWarp) {
    plan->row_bytes = plan->threads * kVectors<kType> * 16;
    plan->shared_bytes = grads_bytes(p, *plan);
    if (plan->shared_bytes <= max_shared_bytes()) break;
  }
  if (plan->threads < kWarp) return false;
  *tiles = static_cast<int>(ceil_div(plan->vectors, plan->threads * kVectors<kType>));
  return true;
}

int chunk_tokens(const ShortConvParams& p, const Plan& plan, int tiles) {
  const int blocks_of_sm = std::clamp(kSharedBytesOfSm / (plan.shared_bytes + kReservedSharedBytes), 1, kMaxBlocksOfSm);
  const int64_t even = ceil_div(p.num_tokens * p.branches * tiles, int64_t{blocks_of_sm} * num_multiprocessors());
  return static_cast<int>(std::max({even, 2 * p.reach() < p.num_tokens ? 2 * p.reach() : p.num_tokens, int64_t{kMinChunk}}));
}

template <DType kType>
BwdPlan make_bwd_plan(const ShortConvBwdParams& b) {
  const ShortConvParams& p = b.forward;
  BwdPlan plan{};
  plan.stats = make_plan<kType>(p, kMaxThreads);
  plan.stats.aligned &= all_aligned(p.dtype, {b.grad_token_stride, b.grad_branch_stride}, {b.grad_out, b.grad_x});
  plan.grads = plan.stats;
  plan.stats_in_ring = plan_stats<kType>(p, &plan.stats);
  if (!plan.stats_in_ring) {
    plan.stats = make_plan<kType>(p, kAnyThreads);
    plan.stats.aligned = plan.grads.aligned;
    plan.stats.tokens = even_tokens<kType>(p, plan.stats);
  }
  plan.grads_in_ring = plan_grads<kType>(p, &plan.grads, &plan.tiles);
  if (!plan.grads_in_ring) {
    plan.grads.shared_bytes = 0;
    plan.grads.threads = kElementThreads;
    plan.tiles = static_cast<int>(ceil_div(p.hidden_size, kElementThreads));
  }
  plan.grads.tokens = plan.saved.chunk_tokens = chunk_tokens(p, plan.grads, plan.tiles);
  plan.saved.chunks = static_cast<int>(ceil_div(p.num_tokens, plan.grads.tokens));
  const int64_t stats = ceil_div(p.num_tokens * p.branches * (p.width + 1), 4) * 4;
  plan.scratch_bytes = 4 * (stats + plan.saved.chunks * p.branches * p.width * p.hidden_size);
  plan.saved.stats = static_cast<float*>(b.scratch);
  plan.saved.tap_sums = plan.saved.stats + stats;
  return plan;
}

template <DType kType>
void launch(const ShortConvBwdParams& b, cudaStream_t stream) {
  const ShortConvParams& p = b.forward;
  const BwdPlan plan = make_bwd_plan<kType>(b);
  const auto sum_blocks = dim3(static_cast<unsigned>(ceil_div(p.hidden_size, kSumThreads)), static_cast<unsigned>(p.branches));
  if (p.num_tokens > 0) {
    launch_blocks(plan.stats_in_ring ? short_conv_bwd_stats_kernel<kType> : short_conv_bwd_stats_any_kernel<kType>,
                  blocks_of(p, plan.stats), plan.stats.threads, plan.stats.shared_bytes, stream, b, plan.stats, plan.saved);
    dim3 blocks = blocks_of(p, plan.grads);
    blocks.z = static_cast<unsigned>(plan.tiles);
    launch_blocks(plan.grads_in_ring ? short_conv_bwd_grads_kernel<kType> : short_conv_bwd_grads_any_kernel<kType>, blocks,
                  plan.grads.threads, plan.grads.shared_bytes, stream, b, plan.grads, plan.saved);
  }
  launch_blocks(short_conv_bwd_weights_kernel<kType>, sum_blocks, kSumThreads, 0, stream, b, plan.saved);
}

template <class F>
auto with_type(DType dtype, const F& f) {
  if (dtype == DType::kF32) return f(std::integral_constant<DType, DType::kF32>{});
  if (dtype == DType::kBf16) return f(std::integral_constant<DType, DType::kBf16>{});
  return f(std::integral_constant<DType, DType::kF16>{});
}

}  // namespace

int64_t short_conv_bwd_cuda_scratch_bytes(const ShortConvBwdParams& p) {
  check_launch(p.forward);
  return with_type(p.forward.dtype, [&](auto type) { return make_bwd_plan<type.value>(p).scratch_bytes; });
}

void short_conv_bwd_cuda(const ShortConvBwdParams& p, void* stream) {
  check_launch(p.forward);
  EK_CHECK(p.forward.state == nullptr, "short_conv_bwd: state is given, expected none");
  with_type(p.forward.dtype, [&](auto type) { launch<type.value>(p, static_cast<cudaStream_t>(stream)); });
}

}  // namespace engram_kernels
