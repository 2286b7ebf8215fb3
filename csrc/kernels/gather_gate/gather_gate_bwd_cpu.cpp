// CPU backward of gather_gate. Formula: gather_gate.h, gate.h. Everything is recomputed from the inputs.
//
// Mapping  as gate_bwd_cpu.cpp: tokens in chunks whose number does not depend on the threads.
// Traffic  reads the rows, hidden and grad_out and writes grad_hidden and grad_rows once.
#include "kernels/gather_gate/gather_gate_row_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

// Second pass over a row. de (float, pair order) is set by the first branch and added to by the others.
template <class T, class K>
void write_grads(const RowGrads<T>& row, const K* e, const float* w, int64_t size, bool first_branch, float* de) {
  const F32 a = splat(row.slopes.a), b = splat(-row.slopes.b), c = splat(-row.slopes.c), g = splat(row.slopes.gate);
  const F32 residual = splat(row.residual);
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair h = load_pair(row.hidden + i), k = load_pair(e + i), d = load_pair(row.grad_out + i);
    const Pair aw = mul(load_pair(w + i), a);
    store_pair(row.grad_hidden + i, fma(aw, k, fma(h, b, mul(d, residual))));
    store_pair(row.partial_sums + i, fma(mul(h, a), k, load_pair(row.partial_sums + i)));
    const Pair as_key = fma(aw, h, fma(k, c, first_branch ? zero_pair() : load_pair(de + i)));
    store_pair(de + i, fma(d, g, as_key));
  }
  for (; i < size; i += kLanes) {
    const int64_t left = size - i;
    const F32 h = load_upto(row.hidden + i, left), k = load_upto(e + i, left), d = load_upto(row.grad_out + i, left);
    const F32 aw = mul(load(w + i), a);
    store_upto(row.grad_hidden + i, fma(aw, k, fma(h, b, mul(d, residual))), left);
    store(row.partial_sums + i, fma(mul(h, a), k, load(row.partial_sums + i)));
    store(de + i, fma(d, g, fma(aw, h, fma(k, c, first_branch ? zeros() : load(de + i)))));
  }
}

template <class T>
void masked_token(const GatherGateBwdParams& p, int64_t t) {
  const GatherGateParams& f = p.forward;
  for (int64_t m = 0; m < f.branches; ++m) {
    pass_row(p.grad_out.row<const T>(t, m), f.options.add_residual, f.hidden_size, p.grad_hidden.row<T>(t, m));
  }
  std::memset(static_cast<T*>(p.grad_rows) + t * f.hidden_size, 0, static_cast<size_t>(f.hidden_size) * sizeof(T));
}

template <class T, class K>
void token_grads(const GatherGateBwdParams& p, int64_t t, const float* w, float* partial_sums, K* e, float* de) {
  const GatherGateParams& f = p.forward;
  const int64_t size = f.hidden_size, stride = padded_size(size);
  const float sum_kk = decoder<T>(f.table.format)(f, t, f.hidden.row<const T>(t, 0), w, e).kk;
  for (int64_t m = 0; m < f.branches; ++m) {
    RowGrads<T> row{f.hidden.row<const T>(t, m), p.grad_out.row<const T>(t, m),        p.grad_hidden.row<T>(t, m),
                    partial_sums + m * stride,   f.options.add_residual ? 1.0F : 0.0F, {}};
    BwdSums sums = bwd_sums<false>(row.hidden, e, e, row.grad_out, w + m * stride, size);
    sums.kk = sum_kk;
    set_slopes(f.options, size, sums, &row);
    write_grads(row, e, w + m * stride, size, m == 0, de);
  }
  store_ordered(de, size, static_cast<T*>(p.grad_rows) + t * size);
}

template <class T, class K>
void gather_gate_bwd_of_type(const GatherGateBwdParams& p, const Parallel& parallel) {
  const GatherGateParams& f = p.forward;
  const int64_t sums_size = f.branches * padded_size(f.hidden_size);
  const TokenChunks chunks = TokenChunks::of(f.num_tokens);
  const Scratch w(sums_size), partial_sums(chunks.count * sums_size);
  multiply_weights<T>(f.weights, f.branches, f.hidden_size, w.data());
  parallel.for_range(chunks.count, 1, [&](int64_t begin, int64_t end) {
    const Scratch e(padded_size(f.hidden_size)), de(padded_size(f.hidden_size));
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = chunks.begin(c); t < chunks.begin(c + 1); ++t) {
        if (f.masked(t)) {
          masked_token<T>(p, t);
          continue;
        }
        prefetch_rows(f, next_token(f, t, chunks.begin(c + 1)));
        token_grads<T, K>(p, t, w.data(), partial_sums.data() + c * sums_size, reinterpret_cast<K*>(e.data()), de.data());
      }
    }
  });
  write_weight_grads<T>({f.weights, p.grad_w_hidden, p.grad_w_key, f.branches, f.hidden_size}, partial_sums.data(), chunks.count,
                        parallel);
}

}  // namespace

void gather_gate_bwd_cpu(const GatherGateBwdParams& p, const Parallel& parallel) {
  with_dtype(p.forward.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    with_kept<T>(p.forward.table.format,
                 [&](auto* kept) { gather_gate_bwd_of_type<T, std::remove_pointer_t<decltype(kept)>>(p, parallel); });
  });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gather_gate_bwd_cpu, (const GatherGateBwdParams& p, const Parallel& parallel), (p, parallel))
