// What the CPU kernels of gate and gather_gate do with one (token, branch) row; the formulas are in gate.h.
//
// T is the element of hidden; K that of key and value: T, or float for a row that was decoded into the pair order of T.
// There are two passes: the sums first, then the output, while the row is still in L1 or L2.
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

// Sums of a row. kKeySum = false: kk is not computed. ahead(i) is called once per pair, to prefetch what comes next.
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

// ---- backward --------------------------------------------------------------------------------------------------------

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
  float* partial_sums;  // sum over the chunk's tokens of a * h * k, [padded_size] in pair order
  float residual;       // 1 or 0
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
  row->slopes = gate_slopes(options, size, sums.dot, sums.hh, sums.kk, sums.dout_v);
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
static void write_weight_grads(const WeightGrads& p, float* partial_sums, int64_t num_chunks, const Parallel& parallel) {
  const int64_t stride = padded_size(p.hidden_size), total = p.branches * stride;
  parallel.for_range(total / kPair, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kPair; i < end * kPair; i += kPair) {
      Pair all = load_pair(partial_sums + i);
      for (int64_t c = 1; c < num_chunks; ++c) {
        const Pair one = load_pair(partial_sums + c * total + i);
        all = {add(all.a, one.a), add(all.b, one.b)};
      }
      store_pair(partial_sums + i, all);
    }
  });
  const auto write = [&](const auto* w_hidden, const auto* w_key, auto* grad_w_hidden, auto* grad_w_key) {
    parallel.for_range(p.branches, ceil_div(kGrainElements, p.hidden_size), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = 0; i < p.hidden_size; ++i) {
          const float product = partial_sums[m * stride + pair_ordered_index<T>(i, p.hidden_size)];
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
