// What the CPU backward kernels of gate and gather_gate share: the sums of a row and the gradients of the weights.
#pragma once

#include "kernels/gate/gate_row_cpu.h"

namespace engram_kernels::EK_ISA {

// A fixed partition of the tokens, by their number alone.
struct TokenChunks {
  static constexpr int64_t kMaxCount = 64;  // bounds both the threads in use and the memory for partial sums
  static constexpr int64_t kMinTokens = 16;
  int64_t count;
  int64_t num_tokens;

  EK_LANE TokenChunks of(int64_t num_tokens) {
    const int64_t wanted = ceil_div(num_tokens, kMinTokens);
    return {wanted < 1 ? 1 : wanted < kMaxCount ? wanted : kMaxCount, num_tokens};
  }
  EK_INLINE int64_t begin(int64_t chunk) const { return num_tokens * chunk / count; }
};

template <class T>
struct RowGrads {
  const T* hidden;
  const T* grad_out;
  T* grad_hidden;
  float* product_sum;  // sum over tokens of a * h * k, [padded_size] in pair order
  float residual;      // 1 or 0
  float gate;
  GateSlopes slopes;
};

struct BwdSums {
  float dot, hh, kk, dout_v;
};

// First pass over a row. kKeySum = false: kk is not computed.
template <bool kKeySum, class T, class K>
static BwdSums bwd_sums(const T* h, const K* k, const K* v, const T* grad_out, const float* w, int64_t size) {
  Pair dot = zero_pair(), hh = zero_pair(), kk = zero_pair(), dout_v = zero_pair();
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair x = load_pair(h + i), y = load_pair(k + i);
    dot = fma(mul(x, y), load_pair(w + i), dot);
    hh = fma(x, x, hh);
    if constexpr (kKeySum) kk = fma(y, y, kk);
    dout_v = fma(load_pair(grad_out + i), load_pair(v + i), dout_v);
  }
  for (; i < size; i += kLanes) {
    const int64_t left = size - i;
    const F32 x = load_upto(h + i, left), y = load_upto(k + i, left);
    dot.a = fma(mul(x, y), load(w + i), dot.a);
    hh.a = fma(x, x, hh.a);
    if constexpr (kKeySum) kk.a = fma(y, y, kk.a);
    dout_v.a = fma(load_upto(grad_out + i, left), load_upto(v + i, left), dout_v.a);
  }
  return {sum(dot), sum(hh), kKeySum ? sum(kk) : 0.0F, sum(dout_v)};
}

template <class T>
EK_LANE void set_slopes(const GateOptions& options, int64_t size, const BwdSums& sums, RowGrads<T>* row) {
  const GateScore score = gate_score(options, size, sums.dot, sums.hh, sums.kk);
  row->gate = score.gate;
  row->slopes = gate_slopes(options, size, score, sums.dout_v);
}

// A float row in the pair order of T, rounded to T.
template <class T>
static void store_ordered(const float* row, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) store_pair(out + i, load_pair(row + i));
  for (; i < size; i += kLanes) store_upto(out + i, load(row + i), size - i);
}

struct WeightGrads {
  const GateWeights& weights;
  void* grad_w_hidden;
  void* grad_w_key;
  int64_t branches;
  int64_t hidden_size;
};

// Adds the chunks' sums, in order, into the first one, and writes the gradients of both weights.
template <class T>
static void write_weight_grads(const WeightGrads& p, float* product_sums, int64_t num_chunks, const Parallel& parallel) {
  const int64_t stride = padded_size(p.hidden_size), total = p.branches * stride;
  parallel.for_range(total / kPair, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kPair; i < end * kPair; i += kPair) {
      Pair all = load_pair(product_sums + i);
      for (int64_t c = 1; c < num_chunks; ++c) {
        const Pair one = load_pair(product_sums + c * total + i);
        all = {add(all.a, one.a), add(all.b, one.b)};
      }
      store_pair(product_sums + i, all);
    }
  });
  const auto write = [&](const auto* w_hidden, const auto* w_key, auto* grad_w_hidden, auto* grad_w_key) {
    parallel.for_range(p.branches, ceil_div(kGrainElements, p.hidden_size), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = 0; i < p.hidden_size; ++i) {
          const float product = product_sums[m * stride + pair_ordered_index<T>(i, p.hidden_size)];
          const int64_t j = m * p.hidden_size + i;
          from_float(product * to_float(w_key[j]), grad_w_hidden + j);
          from_float(product * to_float(w_hidden[j]), grad_w_key + j);
        }
      }
    });
  };
  const GateWeights& w = p.weights;
  if (w.dtype == DType::kF32) {
    return write(static_cast<const float*>(w.w_hidden), static_cast<const float*>(w.w_key), static_cast<float*>(p.grad_w_hidden),
                 static_cast<float*>(p.grad_w_key));
  }
  write(static_cast<const T*>(w.w_hidden), static_cast<const T*>(w.w_key), static_cast<T*>(p.grad_w_hidden),
        static_cast<T*>(p.grad_w_key));
}

}  // namespace engram_kernels::EK_ISA
