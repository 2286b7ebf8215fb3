// CPU kernel of engram_forward. Contract: engram_forward.h.
//
// Mapping  tile by tile of tokens: the rows of a tile are gathered, multiplied by the caller's product, and gated, by the
//          kernels of those ops, which share their work among the threads. Between the steps a tile stays in a cache.
// Traffic  reads rows and hidden and writes out once; reads w_kv once per tile.
#include <algorithm>

#include "common/cpu_isa.h"
#include "kernels/engram_forward/engram_forward.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels::EK_ISA {
namespace {

BranchRows from_token(const BranchRows& rows, int64_t t, int64_t element_bytes) {
  return {static_cast<std::byte*>(rows.data) + t * rows.token_stride * element_bytes, rows.token_stride, rows.branch_stride};
}

}  // namespace

void engram_forward_cpu(const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel) {
  const int64_t element_bytes = dtype_bytes(p.dtype), kv_size = (p.branches + 1) * p.hidden_size;
  for (int64_t first = 0; first < p.num_tokens; first += product.tokens) {
    const int64_t count = std::min(product.tokens, p.num_tokens - first);
    for (int64_t i = 0; i < count * p.columns; ++i) {
      const int64_t t = first + i / p.columns;
      product.row_ids[i] = p.masked(t) ? kNoRow : p.row_id(t, i % p.columns);
    }
    GatherRowsParams gather{};
    gather.source = p.table;
    gather.row_ids = {product.row_ids, count * p.columns, true};
    gather.out = static_cast<std::byte*>(product.memory);
    gather.out_dtype = p.dtype;
    gather_rows_cpu(gather, parallel);
    product.run(count, product.context);
    GateParams gate{};
    gate.hidden = from_token(p.hidden, first, element_bytes);
    gate.key = {product.kv, kv_size, p.hidden_size};
    gate.value = static_cast<std::byte*>(product.kv) + p.branches * p.hidden_size * element_bytes;
    gate.value_stride = kv_size;
    gate.weights = p.weights;
    gate.mask = p.mask == nullptr ? nullptr : p.mask + first;
    gate.out = from_token(p.out, first, element_bytes);
    gate.num_tokens = count;
    gate.branches = p.branches;
    gate.hidden_size = p.hidden_size;
    gate.dtype = p.dtype;
    gate.options = p.options;
    gate_cpu(gate, parallel);
  }
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(engram_forward_cpu, (const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel),
                (p, product, parallel))
