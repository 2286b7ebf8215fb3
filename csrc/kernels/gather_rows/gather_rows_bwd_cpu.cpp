// CPU kernel of the backward pass of gather_rows: a dense gradient of the rows. Contract: gather_rows.h.
//
// Mapping   consecutive rows to each thread, so every output row is written once, by one thread: zeros, or the sum over
//           its positions in fp32 registers, kSumColumns columns at a time.
// Traffic   reads the gradient once (in the order of the rows), writes the output once.
#include <algorithm>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/row_decode.h"
#include "common/sum_positions.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels::EK_ISA {
namespace {

constexpr int64_t kGrainRows = 1024;
constexpr int64_t kPrefetchPositions = 8;

template <class Grad, class Out>
void sum_rows(const GatherRowsBwdParams& p, const RowOrder& order, int64_t begin, int64_t end) {
  Out* out = reinterpret_cast<Out*>(p.grad_rows);
  const auto zero_rows = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    std::memset(static_cast<void*>(out + first * p.row_dim), 0, static_cast<size_t>((last - first) * p.row_dim) * sizeof(Out));
  };
  int64_t next = begin;  // rows before it are written
  const int64_t stop = order.first_at_or_after(end);
  for (int64_t e = order.first_at_or_after(begin); e < stop;) {
    const int64_t row = order.row(e);
    int64_t last = e + 1;
    while (last < stop && order.row(last) == row) ++last;
    if (last + kPrefetchPositions < stop) {
      const Grad* ahead = reinterpret_cast<const Grad*>(p.grad) + order.position(last + kPrefetchPositions - 1) * p.row_dim;
      for (int i = 0; i < p.row_dim; i += 64 / static_cast<int>(sizeof(Grad))) __builtin_prefetch(ahead + i);
    }
    zero_rows(next, row);
    for (int column = 0; column < p.row_dim; column += kSumColumns) {
      sum_columns(reinterpret_cast<const Grad*>(p.grad), p.row_dim, order, e, last, column,
                  std::min(kSumColumns, p.row_dim - column), out + row * p.row_dim + column);
    }
    next = row + 1;
    e = last;
  }
  zero_rows(next, end);
}

}  // namespace

void gather_rows_bwd_cpu(const GatherRowsBwdParams& p, const RowOrder& order, const Parallel& parallel) {
  parallel.for_range(p.num_rows, kGrainRows, [&](int64_t begin, int64_t end) {
    with_dtype(p.grad_dtype, [&](auto* grad) __attribute__((always_inline)) {
      with_dtype(p.out_dtype, [&](auto* out) __attribute__((always_inline)) {
        sum_rows<std::remove_pointer_t<decltype(grad)>, std::remove_pointer_t<decltype(out)>>(p, order, begin, end);
      });
    });
  });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gather_rows_bwd_cpu, (const GatherRowsBwdParams& p, const RowOrder& order, const Parallel& parallel),
                (p, order, parallel))
