// CPU kernel of gather_gate. Contract: gather_gate.h, gate.h.
//
// Mapping  threads share the tokens. A token's rows are decoded into a scratch of the thread's own (L1, L2) together with
//          the sums of the first branch; the other branches read them there. The rows of the next token, which lie anywhere
//          in the table, are prefetched before.
// Traffic  reads the rows and hidden and writes out once.
#include "kernels/gather_gate/gather_gate_row_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

// K: see Kept
template <class T, class K, bool kStream>
void gate_tokens(const GatherGateParams& p, const float* w, int64_t begin, int64_t end) {
  const int64_t size = p.hidden_size, w_stride = padded_size(size);
  const bool residual = p.options.add_residual;
  const DecodeAndSum decode = decoder<T>(p.table.format);
  const Scratch memory(padded_size(size));
  K* e = reinterpret_cast<K*>(memory.data());
  for (int64_t t = begin; t < end; ++t) {
    if (p.masked(t)) {
      for (int64_t m = 0; m < p.branches; ++m) {
        pass_row(p.hidden.row<const T>(t, m), residual, size, p.out.row<T>(t, m));
      }
      continue;
    }
    const int64_t next = next_token(p, t, end);
    prefetch_rows(p, next);
    RowSums sums{};
    for (int64_t m = 0; m < p.branches; ++m) {
      const T* h = p.hidden.row<const T>(t, m);
      const float* w_row = w + m * w_stride;
      if (m == 0) {
        sums = decode(p, t, h, w_row, e);
      } else {
        const float kk = sums.kk;
        sums = row_sums<false>(h, e, w_row, size, [](int64_t) {});
        sums.kk = kk;
      }
      const float gate = gate_score(p.options, size, sums.dot, sums.hh, sums.kk).gate;
      const T* next_h = m + 1 < p.branches ? p.hidden.row<const T>(t, m + 1) : next >= 0 ? p.hidden.row<const T>(next, 0) : h;
      write_row<kStream>(h, e, gate, residual, size, p.out.row<T>(t, m), [=](int64_t i) { prefetch(next_h + i); });
    }
  }
  if constexpr (kStream) finish_streams();
}

template <class T, class K>
void gather_gate_of_type(const GatherGateParams& p, const Parallel& parallel) {
  const Scratch w(p.branches * padded_size(p.hidden_size));
  multiply_weights<T>(p.weights, p.branches, p.hidden_size, w.data());
  const bool stream = streams<T>(p.out, p.hidden, p.num_tokens * p.branches, p.hidden_size);
  const auto tokens = stream ? gate_tokens<T, K, kHasPairs> : gate_tokens<T, K, false>;
  parallel.for_range(p.num_tokens, ceil_div(kGrainElements, p.hidden_size * p.branches),
                     [&](int64_t begin, int64_t end) { tokens(p, w.data(), begin, end); });
}

}  // namespace

void gather_gate_cpu(const GatherGateParams& p, const Parallel& parallel) {
  if (p.num_tokens == 0) return;
  with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    with_kept<T>(p.table.format, [&](auto* kept) { gather_gate_of_type<T, std::remove_pointer_t<decltype(kept)>>(p, parallel); });
  });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gather_gate_cpu, (const GatherGateParams& p, const Parallel& parallel), (p, parallel))
