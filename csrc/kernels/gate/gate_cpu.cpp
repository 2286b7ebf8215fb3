// CPU kernel of gate. Contract and formula: gate.h.
//
// Mapping  threads share the (token, branch) rows; a row is summed, then written while it is in L1 or L2, and the next row
//          is prefetched meanwhile, so that memory does not idle in the second pass. value stays in L1 across branches.
// Traffic  reads hidden, key, value and writes out once. w_hidden * w_key is made once per call (float, L2).
#include "kernels/gate/gate_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

template <class T, bool kStream>
void gate_rows(const GateParams& p, const float* w, int64_t begin, int64_t end) {
  const int64_t size = p.hidden_size, w_stride = padded_size(size);
  int64_t t = begin / p.branches, m = begin % p.branches;
  for (int64_t r = begin; r < end; ++r) {
    const T* h = p.hidden.row<const T>(t, m);
    T* out = p.out.row<T>(t, m);
    const int64_t branch = m, token = t;
    if (++m == p.branches) {
      m = 0;
      ++t;
    }
    if (p.masked(token)) {
      pass_row(h, p.options.add_residual, size, out);
      continue;
    }
    const T* k = p.key.row<const T>(token, branch);
    const T* v = static_cast<const T*>(p.value) + token * p.value_stride;
    const RowSums sums = row_sums<true>(h, k, w + branch * w_stride, size, [](int64_t) {});
    const float gate = gate_score(p.options, size, sums.dot, sums.hh, sums.kk).gate;
    // the last row prefetches itself
    const T* next_h = r + 1 < end ? p.hidden.row<const T>(t, m) : h;
    const T* next_k = r + 1 < end ? p.key.row<const T>(t, m) : k;
    write_row<kStream>(h, v, gate, p.options.add_residual, size, out, [=](int64_t i) {
      prefetch(next_h + i);
      prefetch(next_k + i);
    });
  }
  if constexpr (kStream) finish_streams();
}

template <class T>
void gate_of_type(const GateParams& p, const Parallel& parallel) {
  const Scratch w(p.branches * padded_size(p.hidden_size));
  multiply_weights<T>(p.weights, p.branches, p.hidden_size, w.data());
  const bool stream = streams<T>(p.out, p.hidden, p.num_tokens * p.branches, p.hidden_size);
  const auto rows = stream ? gate_rows<T, kHasPairs> : gate_rows<T, false>;
  parallel.for_range(p.num_tokens * p.branches, ceil_div(kGrainElements, p.hidden_size),
                     [&](int64_t begin, int64_t end) { rows(p, w.data(), begin, end); });
}

}  // namespace

void gate_cpu(const GateParams& p, const Parallel& parallel) {
  if (p.num_tokens == 0) return;
  with_dtype(p.dtype, [&](auto* tag) { gate_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gate_cpu, (const GateParams& p, const Parallel& parallel), (p, parallel))
