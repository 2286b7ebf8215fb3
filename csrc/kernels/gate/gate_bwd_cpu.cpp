// CPU backward of gate. Formula: gate.h. Everything is recomputed from the inputs.
//
// Mapping  tokens in chunks whose number does not depend on the threads; a chunk sums a h k into its own float array
//          [branches, hidden_size], and the chunks are added in order: the same bits for any number of threads.
// Traffic  reads hidden, key, value, grad_out and writes the gradients once.
#include "kernels/gate/gate_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

// Second pass over a row. dv (float, pair order) is set by the first branch and added to by the others.
template <class T>
void write_grads(const RowGrads<T>& row, const T* k, const float* w, int64_t size, bool first_branch, T* grad_key, float* dv) {
  const F32 a = splat(row.slopes.a), b = splat(-row.slopes.b), c = splat(-row.slopes.c), g = splat(row.slopes.gate);
  const F32 residual = splat(row.residual);
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair h = load_pair(row.hidden + i), key = load_pair(k + i), d = load_pair(row.grad_out + i);
    const Pair aw = mul(load_pair(w + i), a);
    store_pair(row.grad_hidden + i, fma(aw, key, fma(h, b, mul(d, residual))));
    store_pair(grad_key + i, fma(aw, h, mul(key, c)));
    store_pair(row.partial_sums + i, fma(mul(h, a), key, load_pair(row.partial_sums + i)));
    store_pair(dv + i, fma(d, g, first_branch ? zero_pair() : load_pair(dv + i)));
  }
  for (; i < size; i += kLanes) {
    const int64_t left = size - i;
    const F32 h = load_upto(row.hidden + i, left), key = load_upto(k + i, left), d = load_upto(row.grad_out + i, left);
    const F32 aw = mul(load(w + i), a);
    store_upto(row.grad_hidden + i, fma(aw, key, fma(h, b, mul(d, residual))), left);
    store_upto(grad_key + i, fma(aw, h, mul(key, c)), left);
    store(row.partial_sums + i, fma(mul(h, a), key, load(row.partial_sums + i)));
    store(dv + i, fma(d, g, first_branch ? zeros() : load(dv + i)));
  }
}

template <class T>
void masked_token(const GateBwdParams& p, int64_t t) {
  const GateParams& f = p.forward;
  const size_t row_bytes = static_cast<size_t>(f.hidden_size) * sizeof(T);
  for (int64_t m = 0; m < f.branches; ++m) {
    pass_row(p.grad_out.row<const T>(t, m), f.options.add_residual, f.hidden_size, p.grad_hidden.row<T>(t, m));
    std::memset(p.grad_key.row<T>(t, m), 0, row_bytes);
  }
  std::memset(static_cast<T*>(p.grad_value) + t * f.hidden_size, 0, row_bytes);
}

template <class T>
void token_grads(const GateBwdParams& p, int64_t t, const float* w, float* partial_sums, float* dv) {
  const GateParams& f = p.forward;
  const int64_t size = f.hidden_size, stride = padded_size(size);
  const T* v = static_cast<const T*>(f.value) + t * f.value_stride;
  for (int64_t m = 0; m < f.branches; ++m) {
    const T* k = f.key.row<const T>(t, m);
    RowGrads<T> row{f.hidden.row<const T>(t, m), p.grad_out.row<const T>(t, m),        p.grad_hidden.row<T>(t, m),
                    partial_sums + m * stride,   f.options.add_residual ? 1.0F : 0.0F, {}};
    const BwdSums sums = bwd_sums<true>(row.hidden, k, v, row.grad_out, w + m * stride, size);
    set_slopes(f.options, size, sums, &row);
    write_grads(row, k, w + m * stride, size, m == 0, p.grad_key.row<T>(t, m), dv);
  }
  store_ordered(dv, size, static_cast<T*>(p.grad_value) + t * size);
}

template <class T>
void gate_bwd_of_type(const GateBwdParams& p, const Parallel& parallel) {
  const GateParams& f = p.forward;
  const int64_t sums_size = f.branches * padded_size(f.hidden_size);
  const TokenChunks chunks = TokenChunks::of(f.num_tokens);
  const Scratch w(sums_size), partial_sums(chunks.count * sums_size);
  multiply_weights<T>(f.weights, f.branches, f.hidden_size, w.data());
  parallel.for_range(chunks.count, 1, [&](int64_t begin, int64_t end) {
    const Scratch dv(padded_size(f.hidden_size));
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = chunks.begin(c); t < chunks.begin(c + 1); ++t) {
        if (f.masked(t)) {
          masked_token<T>(p, t);
        } else {
          token_grads<T>(p, t, w.data(), partial_sums.data() + c * sums_size, dv.data());
        }
      }
    }
  });
  write_weight_grads<T>({f.weights, p.grad_w_hidden, p.grad_w_key, f.branches, f.hidden_size}, partial_sums.data(), chunks.count,
                        parallel);
}

}  // namespace

void gate_bwd_cpu(const GateBwdParams& p, const Parallel& parallel) {
  with_dtype(p.forward.dtype, [&](auto* tag) { gate_bwd_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gate_bwd_cpu, (const GateBwdParams& p, const Parallel& parallel), (p, parallel))
