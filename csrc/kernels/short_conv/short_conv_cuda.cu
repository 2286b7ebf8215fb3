// CUDA kernels of short_conv, forward. Contract and formula: short_conv.h.
//
// One launch does all, so that a decode step has one latency; a tiny second one follows where state_ends is
// kept. A block has a branch and a stretch of the packed tokens; a thread has 8 channels of them, with their
// taps in registers. The launcher chooses one of three kernels:
//   1. walk   for long chunks. The block walks along its stretch. The rows within reach lie in a ring in
//             shared memory, and the next group of rows is on its way while one is computed.
//   2. taps   for few tokens per sequence, as in decoding. It fetches only the rows that the taps reach, and
//             there is a block for each token until every multiprocessor is busy.
//   3. plain  for everything that does not fit the other two: short_conv_plain_cuda.h. They need at most
//             kTaps taps, rows of at most kMaxThreads * kChannels channels, and 16-byte alignment.
//
// Traffic: at least x is read once and out is written once; a decode step reads at least `width` rows and
// writes two.
//   walk   reads each row once, and the reach in front of a block's stretch of L tokens again: (L + reach) /
//          L. With 8,192 tokens of 4 branches of 5,120 on 132 multiprocessors L is 249, so 1.02x the least
//          moves, both directions counted.
//   taps   moves 1.00x the least from memory. Weights come from L2 for every token. Splitting a row over
//          blocks would not spare that: the norm needs whole rows, and a block that reads another's slot of
//          the state would race with its writer.
#include "kernels/short_conv/short_conv_cuda.h"

#include "kernels/short_conv/short_conv_plain_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kEndsThreads = 128;

// Computes tokens [first, last) of the branch from the rows [oldest, last). Rows before `first` are only
// normalized.
template <DType kType>
__device__ __forceinline__ void walk(const Ring<kType>& ring, const Span& s, int branch, int oldest, int first, int last,
                                     bool owns, const float (&taps)[kTaps][kChannels], int* parity) {
  const ShortConvParams& p = ring.p;
  const Plan& plan = ring.plan;
  const auto fetch = [&](int row, int slot) {
    for (int i = 0; i < plan.group && row + i < last; ++i) {
      ring.fetch(ring.wrapped(slot + i), input_row<kType>(p, plan, s, branch, row + i));
    }
    end_copies();
  };
  const auto compute = [&](int t, int slot) {
    float x[kChannels] = {}, z[kChannels] = {};
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int back = (kTaps - 1 - j) * p.dilation;
      if (j < kTaps - p.width || t - back < oldest) continue;  // not a zero: the weight may be Inf
      ring.add_row(slot - back + (slot < back ? plan.ring_rows : 0), taps[j], x, z);
    }
    ring.write(s, branch, t, slot, owns, x, z);
  };
  int slot = 0;
  fetch(oldest, slot);
  for (int row = oldest; row < last; row += plan.group) {
    const int next = ring.wrapped(slot + plan.group);
    fetch(row + plan.group, next);
    wait_for_copies();
    const int count = min(plan.group, last - row);
    ring.norm_group(slot, (1U << count) - 1, *parity);
    *parity ^= 1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (row + i >= first) compute(row + i, ring.wrapped(slot + i));
    }
    slot = next;
  }
}

// The kernel for long chunks fetches every row once and keeps it while a token within reach wants it.
template <DType kType>
__global__ void __launch_bounds__(kMaxThreads, 1) short_conv_walk_kernel(const ShortConvParams p, const Plan plan) {
  count_bad_data(p);
  const int branch = blockIdx.y;
  BlockTokens tokens(p, plan);
  float taps[kTaps][kChannels] = {};
  load_thread_taps<kType>(p, plan, branch * p.hidden_size, taps);
  int parity = 0;
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    if (s.ring < 0) {
      tokens.next = skip<kType>(p, plan, branch, tokens.next, min(s.end, tokens.last));
      continue;
    }
    const bool mine = tokens.begins_in(p, s), owns = tokens.owns(p, s);
    const int end = mine ? tokens.end_in(p, s) : max(tokens.next, s.end);
    if (mine) {
      const int oldest = max(tokens.next - static_cast<int>(p.reach()), s.begin - s.before);
      walk<kType>({p, plan}, s, branch, oldest, tokens.next, end, owns, taps, &parity);
      if (owns) copy_to_state<kType>(p, plan, s, branch, first_copied(p, s, end));
    }
    tokens.next = end;
  }
}

// The kernel for few tokens per sequence, decoding above all, fetches only the rows that taps reach. The rows
// of the next token are on their way while this one is computed.
template <DType kType>
__global__ void __launch_bounds__(kMaxThreads, 1) short_conv_taps_kernel(const ShortConvParams p, const Plan plan) {
  count_bad_data(p);
  const int branch = blockIdx.y;
  const Ring<kType> ring{p, plan};
  BlockTokens tokens(p, plan);
  float taps[kTaps][kChannels] = {};
  bool loaded = false;
  int parity = 0;
  while (tokens.next < tokens.last) {
    const Span s = span_of(p, plan, tokens.next);
    if (s.ring < 0) {
      tokens.next = skip<kType>(p, plan, branch, tokens.next, min(s.end, tokens.last));
      continue;
    }
    const bool mine = tokens.begins_in(p, s), owns = tokens.owns(p, s);
    const int end = mine ? tokens.end_in(p, s) : max(tokens.next, s.end);
    const auto there = [&](int t) {
      unsigned bits = 0;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (j >= kTaps - p.width && t - (kTaps - 1 - j) * p.dilation >= s.begin - s.before) bits |= 1U << j;
      }
      return bits;
    };
    const auto fetch = [&](int t, int slot) {
      const unsigned bits = t < end ? there(t) : 0;
      for (int j = 0; j < kTaps; ++j) {
        if ((bits >> j & 1) == 0) continue;
        ring.fetch(slot + j, input_row<kType>(p, plan, s, branch, t - (kTaps - 1 - j) * p.dilation));
      }
      end_copies();
    };
    if (mine) fetch(tokens.next, parity * kTaps);
    if (!loaded) load_thread_taps<kType>(p, plan, branch * p.hidden_size, taps);  // while the rows come
    loaded = true;
#pragma unroll 1
    for (int t = mine ? tokens.next : end; t < end; ++t, parity ^= 1) {
      fetch(t + 1, (parity ^ 1) * kTaps);
      wait_for_copies();
      const unsigned bits = there(t);
      const int slot = parity * kTaps;
      ring.norm_group(slot, bits, parity);
      float x[kChannels] = {}, z[kChannels] = {};
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if ((bits >> j & 1) != 0) ring.add_row(slot + j, taps[j], x, z);  // not a zero: the weight may be Inf
      }
      ring.write(s, branch, t, slot + kTaps - 1, owns, x, z);
    }
    if (mine && owns) copy_to_state<kType>(p, plan, s, branch, first_copied(p, s, end));
    tokens.next = end;
  }
}

// Notes in state_ends how far the rings have come, when all blocks of the main kernel have read it.
__global__ void __launch_bounds__(kEndsThreads) short_conv_ends_kernel(const ShortConvParams p) {
  const int64_t b = int64_t{blockIdx.x} * kEndsThreads + threadIdx.x;
  if (b >= p.num_sequences) return;
  const int64_t tokens = p.cu_seqlens[b + 1] - p.cu_seqlens[b], ring = p.ring_of(b, max(tokens, int64_t{0}));
  if (tokens > 0 && ring >= 0) p.advance(ring, p.position(b), tokens);
}

// Whether the rows within reach fit into shared memory and a block has enough tokens to earn those that it
// reads in front.
template <DType kType>
bool plan_walk(const ShortConvParams& p, Plan* plan) {
  if (p.reach() * plan->row_bytes > kSharedBytesOfSm || p.num_tokens < p.num_sequences * 2 * p.reach()) return false;
  const int shared_limit = max_shared_bytes();
  for (plan->group = kGroup; plan->group > 0; plan->group /= 2) {
    plan->ring_rows = plan->rows_held =
        static_cast<int>(p.reach()) + 2 * plan->group;  // one group is computed while the next comes
    plan->shared_bytes = ring_bytes(plan->rows_held, plan->row_bytes, plan->threads);
    if (plan->shared_bytes > shared_limit) continue;
    plan->tokens = even_tokens<kType>(p, *plan);
    return plan->tokens >= std::max(static_cast<int>(p.reach()), kGroup);
  }
  return false;
}

// Whether the rows of two tokens fit into shared memory.
template <DType kType>
bool plan_taps(const ShortConvParams& p, Plan* plan) {
  plan->ring_rows = plan->rows_held = 2 * kTaps;
  plan->shared_bytes = ring_bytes(plan->rows_held, plan->row_bytes, plan->threads);
  plan->tokens = even_tokens<kType>(p, *plan);
  return plan->shared_bytes <= max_shared_bytes();
}

template <DType kType>
void launch(const ShortConvParams& p, cudaStream_t stream) {
  Plan plan = make_plan<kType>(p, kMaxThreads);
  const auto run = [&](auto* kernel) {
    launch_blocks(kernel, blocks_of(p, plan), plan.threads, plan.shared_bytes, stream, p, plan);
  };
  if (plan.aligned && fits_registers<kType>(p, plan)) {
    if (plan_walk<kType>(p, &plan)) return run(short_conv_walk_kernel<kType>);
    if (plan_taps<kType>(p, &plan)) return run(short_conv_taps_kernel<kType>);
  }
  plan.shared_bytes = 0;
  plan.tokens = even_tokens<kType>(p, plan);
  run(short_conv_plain_kernel<kType>);
}

}  // namespace

void short_conv_cuda(const ShortConvParams& p, void* stream) {
  check_launch(p);
  if (p.num_tokens == 0) return;  // an empty grid is a launch error, an empty batch is not
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.dtype, [&](auto type) { launch<type.value>(p, on); });
  if (p.state_ends == nullptr || !p.has_state()) return;
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.num_sequences, kEndsThreads)));
  launch_blocks(short_conv_ends_kernel, blocks, kEndsThreads, 0, on, p);
}

}  // namespace engram_kernels
