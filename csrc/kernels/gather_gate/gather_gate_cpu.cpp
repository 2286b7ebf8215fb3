// CPU kernel of gather_gate. Contract: gather_gate.h, gate.h.
//
// Mapping  threads share the tokens. A token's rows are decoded into a float scratch of the thread's own (L1, L2), with the
//          sum of their squares; then each branch is summed and written. Meanwhile the rows of the next token, which lie
//          anywhere in the table, are prefetched a cache line at a time.
// Traffic  reads the rows and hidden and writes out once.
#include "kernels/gather_gate/gather_gate_row_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

template <class T, bool kStream, bool kResidual>
void gate_tokens(const GatherGateParams& p, const float* w, int64_t begin, int64_t end) {
  const int64_t size = p.hidden_size, w_stride = padded_size(size), pairs = size / kPair;
  const DecodeToken decode = decoder<T>(p.table.format);
  const Scratch e(padded_size(size));
  RowLines ahead(p, 2 * pairs * p.branches);
  for (int64_t t = begin; t < end; ++t) {
    if (p.masked(t)) {
      for (int64_t m = 0; m < p.branches; ++m) {
        pass_row(p.hidden.row<const T>(t, m), kResidual, size, p.out.row<T>(t, m));
      }
      continue;
    }
    const int64_t next = next_token(p, t, end);
    const float sum_kk = decode(p, t, e.data());
    ahead.aim(p, next);
    const std::byte* const* lines = ahead.lines();
    for (int64_t m = 0; m < p.branches; ++m) {
      const T* h = p.hidden.row<const T>(t, m);
      const RowSums sums = row_sums<false>(h, e.data(), w + m * w_stride, size,
                                           [lines](int64_t i) { prefetch(lines[i / kPair]); });
      lines += pairs;
      const float gate = gate_score(p.options, size, sums.dot, sums.hh, sum_kk).gate;
      const T* next_h = m + 1 < p.branches ? p.hidden.row<const T>(t, m + 1) : next >= 0 ? p.hidden.row<const T>(next, 0) : h;
      write_row<kStream, kResidual>(h, e.data(), gate, size, p.out.row<T>(t, m), [lines, next_h](int64_t i) {
        prefetch(lines[i / kPair]);
        prefetch(next_h + i);
      });
      lines += pairs;
    }
  }
  if constexpr (kStream) finish_streams();
}

template <class T>
void gather_gate_of_type(const GatherGateParams& p, const Parallel& parallel) {
  const Scratch w(p.branches * padded_size(p.hidden_size));
  multiply_weights<T>(p.weights, p.branches, p.hidden_size, w.data());
  const bool stream = streams<T>(p.out, p.hidden, p.num_tokens * p.branches, p.hidden_size);
  const auto tokens = p.options.add_residual ? (stream ? gate_tokens<T, true, true> : gate_tokens<T, false, true>)
                                             : (stream ? gate_tokens<T, true, false> : gate_tokens<T, false, false>);
  parallel.for_range(p.num_tokens, ceil_div(kGrainElements, p.hidden_size * p.branches),
                     [&](int64_t begin, int64_t end) { tokens(p, w.data(), begin, end); });
}

}  // namespace

void gather_gate_cpu(const GatherGateParams& p, const Parallel& parallel) {
  if (p.num_tokens == 0) return;
  with_dtype(p.dtype, [&](auto* tag) { gather_gate_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gather_gate_cpu, (const GatherGateParams& p, const Parallel& parallel), (p, parallel))
