// CUDA kernels of short_conv, forward. Contract and formula: short_conv.h.
//
// One launch does all, so that a decode step has one latency; a tiny second one follows where state_ends is
// kept. A block has a branch and a stretch of the packed tokens; a thread has 8 channels of them, with their
// taps in registers. The launcher chooses one of three kernels:
//   1. walk   for long chunks. The block walks along a phase: every dilation-th token of its stretch. So a token's taps
//             reach the three rows before it, which each thread keeps normalized in registers; four rows at a time come
//             through shared memory, with one barrier. A second launch keeps the last inputs in the state.
//   2. taps   for few tokens per sequence, as in decoding. It fetches only the rows that the taps reach, and
//             there is a block for each token until every multiprocessor is busy.
//   3. plain  for everything that does not fit the other two: short_conv_plain_cuda.h. They need at most
//             kTaps taps, rows of at most kMaxThreads * kChannels channels, and 16-byte alignment.
//
// Traffic: at least x is read once and out is written once; a decode step reads at least `width` rows and
// writes two.
//   walk   reads each row once, and `width` - 1 rows in front of a block's L tokens again: (L + 3) / L. With 8,192 tokens of
//          4 branches of 5,120 on 132 multiprocessors L is 249, so 1.01x the least moves, both directions counted.
//   taps   moves 1.00x the least from memory. Weights come from L2 for every token. Splitting a row over
//          blocks would not spare that: the norm needs whole rows, and a block that reads another's slot of
//          the state would race with its writer.
#include "kernels/short_conv/short_conv_cuda.h"

#include "kernels/short_conv/short_conv_plain_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kEndsThreads = 128;
template <DType kType>
constexpr int kWalkThreads = kType == DType::kF32 ? 512 : kMaxThreads;  // float rows take more than 96 registers on sm_80

// The last normalized rows of a phase: token i of a group lies in row i.
using Normalized = float[kGroup][kChannels];

// Token i of a group whose raw row lies in `slot`: its normalized row goes to `rows`, and its output, where
// `emits`, to `out`. Bit j of `taps_there` says whether tap j has a row; kAll: every tap has one. kWhole: every thread has all
// its vectors.
template <DType kType, bool kWhole, bool kAll>
__device__ __forceinline__ void walk_token(const Ring<kType>& ring, int i, int slot, float inverse_rms, bool emits,
                                           unsigned taps_there, const float (&taps)[kTaps][kChannels], Normalized& rows,
                                           std::byte* out) {
  constexpr int kPart = 4;  // channels at a time, for the registers' sake
#pragma unroll
  for (int v = 0; v < kVectors<kType>; ++v) {
    const bool has = kWhole || ring.has(v);
    const uint4 raw = has ? *ring.vector_of(slot, v) : make_uint4(0, 0, 0, 0);
    uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};  // of the row, then of the output
#pragma unroll
    for (int first = 0; first < kLanes<kType>; first += kPart) {
      const int channel = v * kLanes<kType> + first;
      float x[kPart], z[kPart] = {};
#pragma unroll
      for (int k = 0; k < kPart; ++k) {
        if constexpr (kType == DType::kF32) {
          x[k] = __uint_as_float(words[k]);
        } else if (k % 2 == 0) {
          unpack_pair<kType>(words[(first + k) / 2], &x[k], &x[k + 1]);
        }
      }
#pragma unroll
      for (int k = 0; k < kPart; ++k) rows[i][channel + k] = __fmul_rn(x[k], inverse_rms);
      if (!emits) continue;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (!kAll && (taps_there >> j & 1) == 0) continue;  // not a zero: the weight may be Inf
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          z[k] = __fmaf_rn(taps[j][channel + k], rows[(i + j + 1) % kGroup][channel + k], z[k]);
        }
      }
      finish<kType, kPart>(x, z);
#pragma unroll
      for (int k = 0; k < kPart; ++k) {
        if constexpr (kType == DType::kF32) {
          words[k] = __float_as_uint(z[k]);
        } else if (k % 2 == 0) {
          words[(first + k) / 2] = pack_pair<kType>(z[k], z[k + 1]);
        }
      }
    }
    auto* to = reinterpret_cast<uint4*>(out) + (threadIdx.x + v * ring.plan.threads);
    if (emits && has) *to = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Computes `count` tokens of the branch, every dilation-th one from `first` on, which lies in `s`. Without a state they may
// go on into later sequences.
template <DType kType, bool kWhole>
__device__ __forceinline__ void walk(const Ring<kType>& ring, const Span& s, int branch, int first, int count,
                                     const float (&taps)[kTaps][kChannels], int* parity) {
  static_assert(kGroup == kTaps);
  const ShortConvParams& p = ring.p;
  int sequence = s.sequence, oldest = s.begin - s.before, end = s.end;
  const int dilation = p.dilation;
  unsigned there = 0;  // bit i: row i of the group is there
#pragma unroll 1
  for (int i = 1; i < kGroup; ++i) {
    const int back = first - (kGroup - i) * dilation;
    if (back < oldest) continue;
    there |= 1U << i;
    ring.fetch(*parity * kGroup + i, input_row<kType>(p, ring.plan, s, branch, back));
  }
  end_copies();
  Normalized rows = {};
#pragma unroll 1
  for (int left = count + kGroup; left > 0; left -= kGroup) {  // the first group lies in front: it is only normalized
    const int t = first + (count - left) * dilation, slot = *parity * kGroup;
    const auto* from = static_cast<const std::byte*>(p.x) + branch * p.x_branch_stride * dtype_bytes(kType);
    from += p.x_token_stride * (t + kGroup * dilation) * dtype_bytes(kType);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (kGroup + i < left) ring.fetch((slot ^ kGroup) + i, from + i * ring.plan.x_step);
    }
    end_copies();
    wait_for_copies();
    float sums[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sums[i] = (there >> i & 1) != 0 ? ring.template sum_of_squares<kWhole>(slot + i) : 0.0F;
    const float norm = inverse_rms(block_sums(sums, ring.partials(*parity)), p, ring.plan);
    const bool emits = left <= count;
    const int reach = (kGroup - 1) * dilation;
    if (emits && left >= kGroup && p.width == kTaps && t - reach >= oldest && t < end - reach) {
      std::byte* out = output_row<kType>(p, p.out, branch, t);
#pragma unroll
      for (int i = 0; i < kGroup; ++i, out += ring.plan.out_step) {
        // else it is multiplied out for every token. A store that could go to shared memory also keeps the loads of the next
        // row behind it: known to be global, they are moved up, and registers spill.
        asm("" : "+l"(out));
        walk_token<kType, kWhole, true>(ring, i, slot + i, __shfl_sync(~0U, norm, 8 * i), true, 0, taps, rows, out);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if ((there >> i & 1) == 0) continue;
        const int now = t + i * dilation;
        if (now >= end) {  // without a state
#pragma unroll 1
          while (sequence + 1 < p.num_sequences && p.cu_seqlens[sequence + 1] <= now) ++sequence;
          oldest = min(p.cu_seqlens[sequence], now), end = max(p.cu_seqlens[sequence + 1], now + 1);
        }
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) {
          if (j >= kTaps - p.width && now - (kTaps - 1 - j) * dilation >= oldest) bits |= 1U << j;
        }
        walk_token<kType, kWhole, false>(ring, i, slot + i, __shfl_sync(~0U, norm, 8 * i), emits, bits, taps, rows,
                                         output_row<kType>(p, p.out, branch, now));
      }
    }
    there = (1U << max(min(left - kGroup, kGroup), 0)) - 1;
    *parity ^= 1;
  }
}

// The kernel for long chunks: blockIdx.x says which stretch of plan.tokens * dilation tokens and which phase, the place among
// `dilation` neighbours.
template <DType kType, bool kWhole>
__global__ void __launch_bounds__(kWalkThreads<kType>, 1) short_conv_walk_kernel(const ShortConvParams p, const Plan plan) {
  count_bad_data(p);
  const int branch = blockIdx.y;
  const unsigned stretch = blockIdx.x / static_cast<unsigned>(p.dilation), phase = blockIdx.x % static_cast<unsigned>(p.dilation);
  const int begin = static_cast<int>(stretch) * plan.tokens * p.dilation;
  float taps[kTaps][kChannels] = {};
  load_thread_taps<kType>(p, plan, branch * p.hidden_size, taps);
  int parity = 0;
#pragma unroll 1
  for (int first = begin + static_cast<int>(phase);;) {
    const int last = min(begin + plan.tokens * p.dilation, static_cast<int>(p.num_tokens));
    if (first >= last) break;
    const Span s = span_of(p, plan, first);
    const int end = p.has_state() ? min(s.end, last) : last;
    const int count = (end - first - 1) / p.dilation + 1;
    if (s.ring < 0) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) skip<kType>(p, plan, branch, first + i * p.dilation, first + i * p.dilation + 1);
    } else {
      walk<kType, kWhole>({p, plan}, s, branch, first, count, taps, &parity);
    }
    first += count * p.dilation;
  }
}

// Keeps the last inputs of every sequence in its ring, when all blocks of the walk have read it: a row per block.
template <DType kType>
__global__ void __launch_bounds__(kMaxThreads, 1) short_conv_keep_kernel(const ShortConvParams p, const Plan plan) {
#pragma unroll 1
  for (int64_t b = blockIdx.z; b < p.num_sequences; b += gridDim.z) {
    const int begin = p.cu_seqlens[b];
    if (begin < 0 || begin >= p.num_tokens || begin >= p.cu_seqlens[b + 1]) continue;
    const Span s = span_of_sequence(p, plan, static_cast<int>(b), begin);
    if (s.ring < 0) continue;
#pragma unroll 1
    for (int64_t t = s.end - 1 - int64_t{blockIdx.x}; t >= max(int64_t{s.begin}, s.end - p.slots); t -= gridDim.x) {
      copy_to_state<kType>(p, plan, s, blockIdx.y, static_cast<int>(t), static_cast<int>(t) + 1);
    }
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
    if (mine && owns) copy_to_state<kType>(p, plan, s, branch, first_copied(p, s, end), s.end);
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

// Whether two groups of rows fit into shared memory.
bool plan_ring(Plan* plan) {
  static_assert(kGroup == kTaps);
  plan->ring_rows = plan->rows_held = 2 * kGroup;  // one group, or the rows of a token, is computed while the next comes
  plan->shared_bytes = ring_bytes(plan->rows_held, plan->row_bytes, plan->threads);
  return plan->shared_bytes <= max_shared_bytes();
}

// Whether a block has enough tokens to earn those that it reads in front. Sets plan->tokens to those of a block's phase.
template <DType kType>
bool plan_walk(const ShortConvParams& p, Plan* plan) {
  if (plan->threads > kWalkThreads<kType> || p.num_tokens > INT32_MAX / 4) return false;
  if (p.num_tokens < p.num_sequences * 2 * p.reach()) return false;
  const int64_t blocks = ceil_div(p.num_tokens, even_tokens<kType>(p, *plan));  // of a branch
  const int64_t stretches = std::max<int64_t>(blocks / p.dilation, 1);
  plan->tokens = static_cast<int>(ceil_div(ceil_div(p.num_tokens, stretches), int64_t{p.dilation}));
  plan->x_step = p.x_token_stride * p.dilation * dtype_bytes(kType);
  plan->out_step = p.branches * p.hidden_size * p.dilation * dtype_bytes(kType);
  return plan->tokens >= kGroup;
}

template <DType kType>
void launch(const ShortConvParams& p, cudaStream_t stream) {
  Plan plan = make_plan<kType>(p, kMaxThreads);
  const auto run = [&](auto* kernel, dim3 blocks) {
    launch_blocks(kernel, blocks, plan.threads, plan.shared_bytes, stream, p, plan);
  };
  const bool fits = plan.aligned && fits_registers<kType>(p, plan) && plan_ring(&plan);
  if (fits && plan_walk<kType>(p, &plan)) {
    dim3 blocks = blocks_of(p, plan);
    blocks.x = static_cast<unsigned>(ceil_div(p.num_tokens, int64_t{plan.tokens} * p.dilation) * p.dilation);
    const bool whole = plan.vectors == kVectors<kType> * plan.threads;
    run(whole ? short_conv_walk_kernel<kType, true> : short_conv_walk_kernel<kType, false>, blocks);
    if (!p.has_state() || p.slots == 0) return;
    plan.shared_bytes = 0;
    blocks.x = static_cast<unsigned>(p.slots);
    blocks.z = static_cast<unsigned>(std::min(p.num_sequences, kMaxGridY));
    return run(short_conv_keep_kernel<kType>, blocks);
  }
  if (!fits) plan.shared_bytes = 0;
  plan.tokens = even_tokens<kType>(p, plan);
  run(fits ? short_conv_taps_kernel<kType> : short_conv_plain_kernel<kType>, blocks_of(p, plan));
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
