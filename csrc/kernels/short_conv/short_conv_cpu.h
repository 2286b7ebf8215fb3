// The forward and backward CPU kernels of short_conv share this: weights in float, and the taps of a token.
#pragma once

#include "common/row_decode.h"
#include "common/simd_pair.h"
#include "kernels/short_conv/short_conv.h"

namespace engram_kernels::EK_ISA {

constexpr int64_t kKeptFactors = 4096;  // a longer reach takes some sums of squares again
constexpr int64_t kBlockTokens = 64;    // tokens per task: the weights that a task converts are used that often
constexpr int kUnrolledTaps = 4;        // this width, the published one, has loops of its own

EK_LANE int64_t padded_lanes(int64_t size) { return ceil_div(size, kLanes) * kLanes; }

// Weights of one branch in float: taps [width][padded H], then the norm weight [padded H]. The padding is
// zero.
class BranchWeights {
 public:
  BranchWeights(const ShortConvParams& p) : size_(padded_lanes(p.hidden_size)), data_((p.width + 1) * size_) {}

  template <class W>
  void load_branch(const ShortConvParams& p, int64_t branch) {
    const W* weight = static_cast<const W*>(p.weight) + branch * p.hidden_size * p.width;
    const W* norm = static_cast<const W*>(p.norm_weight) + branch * p.hidden_size;
    if (p.width == kUnrolledTaps) {
      load_taps<W, kUnrolledTaps>(weight, p.hidden_size, kUnrolledTaps);
    } else {
      load_taps<W, 0>(weight, p.hidden_size, p.width);
    }
    for (int64_t i = 0; i < p.hidden_size; ++i) data_.data()[p.width * size_ + i] = to_float(norm[i]);
  }
  // Multiplies the norm weight into the taps, for a caller that only convolves.
  void fold_norm(const ShortConvParams& p) {
    for (int j = 0; j < p.width; ++j) {
      float* taps = data_.data() + j * size_;
      for (int64_t i = 0; i < size_; i += kLanes) store(taps + i, mul(load(taps + i), load(norm(p) + i)));
    }
  }
  const float* tap(int j) const { return data_.data() + j * size_; }
  const float* norm(const ShortConvParams& p) const { return tap(p.width); }

 private:
  // A decode step of one sequence is little more than this transposition: with the width known it becomes
  // shuffles.
  template <class W, int kWidth>
  void load_taps(const W* __restrict weight, int64_t hidden_size, int width) {
    const int taps = kWidth > 0 ? kWidth : width;
    for (int j = 0; j < taps; ++j) {
      float* __restrict tap = data_.data() + j * size_;
      for (int64_t i = 0; i < hidden_size; ++i) tap[i] = to_float(weight[i * taps + j]);
    }
  }

  int64_t size_;
  Scratch data_;
};

// An input row and the factor that normalizes it; row is null before the sequence start.
template <class T>
struct Tap {
  const T* row;
  float rsqrt_mean;
};

template <class T>
EK_LANE float rsqrt_mean_square(const T* row, int64_t size, float eps) {
  F32 sums[4] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const F32 x = load(row + i + u * kLanes);
      sums[u] = fma(x, x, sums[u]);
    }
  }
  for (; i < size; i += kLanes) {
    const F32 x = load_upto(row + i, size - i);
    sums[0] = fma(x, x, sums[0]);
  }
  const float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return 1.0F / __builtin_sqrtf(total / static_cast<float>(size) + eps);
}

// Input row of sequence b, branch m, `back` tokens before its token t. It may lie in front of the chunk; null
// before the start.
template <class T>
EK_LANE const T* input_row(const ShortConvParams& p, int64_t b, int64_t m, int64_t t, int64_t back) {
  const int64_t source = t - back, begin = p.cu_seqlens[b];
  if (source >= begin) return static_cast<const T*>(p.x) + source * p.x_token_stride + m * p.x_branch_stride;
  if (!p.has_state()) return nullptr;
  const int64_t position = p.position(b) + source - begin;
  if (position < 0) return nullptr;
  const int64_t slot = position % p.slots;
  return static_cast<const T*>(p.state) + p.index(b) * p.state_ring_stride + (slot * p.branches + m) * p.hidden_size;
}

// Finds the taps of a token. A row's normalizing factor is kept while a token within reach may want it again.
// Tokens in order, or in reverse, therefore take each row's sum of squares once, and a single token takes
// those of its own taps.
template <class T>
class Taps {
 public:
  Taps(const ShortConvParams& p, int64_t branch)
      : p_(p), branch_(branch), slots_(p.reach() < kKeptFactors ? p.reach() + 1 : kKeptFactors), kept_(slots_ * kWords) {}

  void of(int64_t b, int64_t t, Tap<T>* taps) {
    for (int j = 0; j < p_.width; ++j) {
      const T* row = input_row<T>(p_, b, branch_, t, p_.back(j));
      taps[j] = {row, row == nullptr ? 0.0F : factor(b, t - p_.back(j), row)};
    }
  }

 private:
  struct Kept {
    int64_t key;
    float factor;
  };
  static constexpr int64_t kWords = sizeof(Kept) / sizeof(float);

  float factor(int64_t b, int64_t source, const T* row) {
    const int64_t shifted = source + (int64_t{1} << 33);  // a source in front of the chunk is negative
    const int64_t key = (b << 35) + shifted;              // never 0, which the ring is filled with
    Kept& kept = reinterpret_cast<Kept*>(kept_.data())[shifted % slots_];
    if (kept.key != key) kept = {key, rsqrt_mean_square(row, p_.hidden_size, p_.eps)};
    return kept.factor;
  }

  const ShortConvParams& p_;
  int64_t branch_;
  int64_t slots_;
  Scratch kept_;
};

// z of kLanes channels from i on; `count` channels are left.
template <class T>
EK_LANE F32 convolve_lanes(const ShortConvParams& p, const BranchWeights& weights, const Tap<T>* taps, int64_t i, int64_t count) {
  const F32 norm = load(weights.norm(p) + i);
  F32 z = zeros();
  for (int j = 0; j < p.width; ++j) {
    if (taps[j].row == nullptr) continue;  // not a zero: the weight may be Inf
    const F32 n = mul(mul(load_upto(taps[j].row + i, count), splat(taps[j].rsqrt_mean)), norm);
    z = fma(load(weights.tap(j) + i), n, z);
  }
  return z;
}

// Calls f with a null pointer of the weights' element type, T or float.
template <class T, class F>
EK_LANE void with_weight_dtype(const ShortConvParams& p, const F& f) {
  if (p.weight_dtype == DType::kF32) return f(static_cast<float*>(nullptr));
  f(static_cast<T*>(nullptr));
}

}  // namespace engram_kernels::EK_ISA
