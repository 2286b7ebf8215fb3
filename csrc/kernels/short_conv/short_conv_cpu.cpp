// CPU kernel of short_conv, forward, with or without state. Contract and formula: short_conv.h.
//
// A task is a block of tokens of one branch:
//   1. the branch's weights are brought into float, once per task;
//   2. every token of the block is convolved; many sequences of one token each fill a block as one long
//      sequence does;
//   3. when all tasks are done, the last inputs of each sequence are written into its ring.
// A row is read from memory once, then by its taps from L2, and written once. The rows that a block reaches
// back to are read once more. With state, a decode step reads W - 1 slots and writes one; no slot is moved.
#include "common/cu_seqlens.h"
#include "kernels/short_conv/short_conv_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 25 us of work; less would be done before a second thread has woken
constexpr int64_t kWeightTokens = 4;       // converting a branch's weights takes as long as this many tokens

// out = x + silu(z) over the channels; the norm weight is folded into `weights`. With kTaps > 0 there are
// kTaps rows and none is null. With kTaps 0 there are p.width rows, some of them null. Both add the taps in
// the same order and give the same bits.
template <int kTaps, class T>
EK_LANE void convolve_row(const ShortConvParams& p, const BranchWeights& weights, const Tap<T>* taps, T* out) {
  const int width = kTaps > 0 ? kTaps : p.width;
  const T* x = taps[width - 1].row;
  F32 factors[kMaxTaps];
  for (int j = 0; j < width; ++j) factors[j] = splat(taps[j].rsqrt_mean);
  const auto lanes = [&](int64_t i, auto load_row) __attribute__((always_inline)) {
    F32 z = zeros();
    for (int j = 0; j < width; ++j) {
      if (kTaps == 0 && taps[j].row == nullptr) continue;  // not a zero: the weight may be Inf
      z = fma(load(weights.tap(j) + i), mul(load_row(taps[j].row + i), factors[j]), z);
    }
    return fma(z, sigmoid(z), load_row(x + i));
  };
  int64_t i = 0;
  for (; i + kLanes <= p.hidden_size; i += kLanes) {
    store(out + i, lanes(i, [](const T* row) __attribute__((always_inline)) { return load(row); }));
  }
  const int rest = static_cast<int>(p.hidden_size - i);
  if (rest == 0) return;
  store_first(out + i, lanes(i, [rest](const T* row) __attribute__((always_inline)) { return load_first(row, rest); }), rest);
}

template <class T>
void convolve_block(const ShortConvParams& p, const BranchWeights& weights, int64_t branch, int64_t begin, int64_t end) {
  Taps<T> taps_of_token(p, branch);
  Tap<T> taps[kMaxTaps];
  int64_t b = sequence_of(p.cu_seqlens, p.num_sequences, begin);
  for (int64_t t = begin; t < end; ++t) {
    while (p.cu_seqlens[b + 1] <= t) ++b;
    T* out = static_cast<T*>(p.out) + (t * p.branches + branch) * p.hidden_size;
    if (p.has_state() && p.index(b) == kSkipped) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(p.hidden_size) * sizeof(T));
      continue;
    }
    taps_of_token.of(b, t, taps);
    // taps reach further back the lower they are: where the first has a row, all have
    if (p.width == kUnrolledTaps && taps[0].row != nullptr) {
      convolve_row<kUnrolledTaps>(p, weights, taps, out);
    } else {
      convolve_row<0>(p, weights, taps, out);
    }
  }
}

// Writes the last inputs of each sequence into its ring. It runs when every output is written, since outputs
// read the slots.
template <class T>
void write_state(const ShortConvParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.cu_seqlens[b], last = p.cu_seqlens[b + 1], ring = p.index(b);
    if (ring == kSkipped || first == last) continue;
    if (p.state_ends != nullptr) p.advance(ring, p.position(b), last - first);
    for (int64_t t = last - first > p.slots ? last - p.slots : first; t < last; ++t) {
      const int64_t slot = (p.position(b) + t - first) % p.slots;
      T* target = static_cast<T*>(p.state) + ring * p.state_ring_stride + slot * p.branches * p.hidden_size;
      for (int64_t m = 0; m < p.branches; ++m) {
        std::memcpy(target + m * p.hidden_size, input_row<T>(p, b, m, t, 0), static_cast<size_t>(p.hidden_size) * sizeof(T));
      }
    }
  }
}

template <class T>
void short_conv_of_type(const ShortConvParams& p, const Parallel& parallel) {
  const int64_t task_tokens = p.num_tokens < kBlockTokens ? p.num_tokens : kBlockTokens;
  const int64_t grain = ceil_div(kGrainElements, (task_tokens + kWeightTokens) * p.hidden_size);
  parallel.for_range(ceil_div(p.num_tokens, kBlockTokens) * p.branches, grain, [&](int64_t begin, int64_t end) {
    BranchWeights weights(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t branch = task % p.branches, first = task / p.branches * kBlockTokens;
      with_weight_dtype<T>(p, [&](auto* tag) { weights.load_branch<std::remove_pointer_t<decltype(tag)>>(p, branch); });
      weights.fold_norm(p);
      convolve_block<T>(p, weights, branch, first, first + kBlockTokens < p.num_tokens ? first + kBlockTokens : p.num_tokens);
    }
  });
  if (p.has_state()) {
    parallel.for_range(p.num_sequences, 16, [&](int64_t begin, int64_t end) { write_state<T>(p, begin, end); });
  }
}

}  // namespace

void short_conv_cpu(const ShortConvParams& p, const Parallel& parallel) {
  if (p.num_tokens == 0) return;
  with_dtype(p.dtype, [&](auto* tag) { short_conv_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(short_conv_cpu, (const ShortConvParams& p, const Parallel& parallel), (p, parallel))
