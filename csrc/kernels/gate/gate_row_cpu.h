// What the CPU kernels of gate and gather_gate do with one (token, branch) row; formulas in gate.h.
//
// T is the element of hidden; K that of key and value: T, or float for a row that was decoded into the pair order of T.
// Two passes: the sums first, then the output, while the row is still in L1 or L2.
#pragma once

#include "common/row_decode.h"
#include "common/simd_pair.h"
#include "kernels/gate/gate.h"

namespace engram_kernels::EK_ISA {

// from this size on an output cannot stay in a core's cache, and writing around the caches saves reading it first
constexpr int64_t kStreamBytes = int64_t{4} << 20;
constexpr int64_t kGrainElements = 1 << 15;  // about 10 us of work for a thread

// Elements from one branch's weights to the next; what lies behind hidden_size is zero.
EK_LANE int64_t padded_size(int64_t hidden_size) { return ceil_div(hidden_size, kPair) * kPair; }

// out[m] = w_hidden[m] * w_key[m] as float, in the pair order of T, [branches, padded_size].
template <class T>
static void multiply_weights(const GateWeights& weights, int64_t branches, int64_t hidden_size, float* out) {
  const auto multiply = [&](const auto* w_hidden, const auto* w_key) {
    for (int64_t m = 0; m < branches; ++m) {
      float* row = out + m * padded_size(hidden_size);
      int64_t i = 0;
      for (; i + kPair <= hidden_size; i += kPair) {
        store_pair(row + i, mul(load_in_order<T>(w_hidden + i), load_in_order<T>(w_key + i)));
      }
      for (; i < hidden_size; ++i) row[i] = to_float(w_hidden[i]) * to_float(w_key[i]);
      w_hidden += hidden_size;
      w_key += hidden_size;
    }
  };
  if (weights.dtype == DType::kF32) {
    return multiply(static_cast<const float*>(weights.w_hidden), static_cast<const float*>(weights.w_key));
  }
  multiply(static_cast<const T*>(weights.w_hidden), static_cast<const T*>(weights.w_key));
}

struct RowSums {
  float dot, hh, kk;
};

// Sums of a row. kKeySum = false: kk is not computed. ahead(i) is called once a pair, to prefetch what comes next.
template <bool kKeySum, class T, class K, class Ahead>
static RowSums row_sums(const T* h, const K* k, const float* w, int64_t hidden_size, const Ahead& ahead) {
  Pair dot = zero_pair(), hh = zero_pair(), kk = zero_pair();
  int64_t i = 0;
  for (; i + kPair <= hidden_size; i += kPair) {
    const Pair x = load_pair(h + i), y = load_pair(k + i);
    dot = fma(mul(x, y), load_pair(w + i), dot);
    hh = fma(x, x, hh);
    if constexpr (kKeySum) kk = fma(y, y, kk);
    ahead(i);
  }
  for (; i < hidden_size; i += kLanes) {
    const F32 x = load_upto(h + i, hidden_size - i), y = load_upto(k + i, hidden_size - i);
    dot.a = fma(mul(x, y), load(w + i), dot.a);
    hh.a = fma(x, x, hh.a);
    if constexpr (kKeySum) kk.a = fma(y, y, kk.a);
  }
  return {sum(dot), sum(hh), kKeySum ? sum(kk) : 0.0F};
}

// out = h + gate * v, or gate * v; out may be h. kStream: `out` and its rows are 64-byte aligned.
template <bool kStream, class T, class K, class Ahead>
static void write_row(const T* h, const K* v, float gate, bool residual, int64_t hidden_size, T* out, const Ahead& ahead) {
  const F32 g = splat(gate);
  int64_t i = 0;
  for (; i + kPair <= hidden_size; i += kPair) {
    const Pair y = load_pair(v + i);
    const Pair result = residual ? fma(y, g, load_pair(h + i)) : mul(y, g);
    if constexpr (kStream) {
      stream_pair(out + i, result);
    } else {
      store_pair(out + i, result);
    }
    ahead(i);
  }
  for (; i < hidden_size; i += kLanes) {
    const F32 y = load_upto(v + i, hidden_size - i);
    const F32 result = residual ? fma(y, g, load_upto(h + i, hidden_size - i)) : mul(y, g);
    store_upto(out + i, result, hidden_size - i);
  }
}

// A masked row: h bit for bit (NaN payloads too), or zeros.
template <class T>
EK_LANE void pass_row(const T* h, bool residual, int64_t hidden_size, T* out) {
  const size_t bytes = static_cast<size_t>(hidden_size) * sizeof(T);
  if (!residual) {
    std::memset(out, 0, bytes);
  } else if (h != out) {
    std::memcpy(out, h, bytes);
  }
}

// Whether rows of `out` may be written around the caches, and should be.
template <class T>
EK_LANE bool streams(const BranchRows& out, const BranchRows& hidden, int64_t rows, int64_t hidden_size) {
  const int64_t row_bytes = hidden_size * static_cast<int64_t>(sizeof(T));
  return kHasPairs && rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.data != hidden.data;
}

}  // namespace engram_kernels::EK_ISA
