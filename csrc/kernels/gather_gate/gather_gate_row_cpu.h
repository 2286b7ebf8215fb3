// What the CPU kernels of gather_gate do with the rows of one token.
#pragma once

#include "kernels/gate/gate_row_cpu.h"
#include "kernels/gather_gate/gather_gate.h"

namespace engram_kernels::EK_ISA {

// Decodes the rows of token t into e [padded_size] and returns the sum of their squares.
using DecodeToken = float (*)(const GatherGateParams& p, int64_t t, float* e);

// One row whose elements fill whole pairs, in the pair order of Order; `squares` is added to.
template <RowFormat kFormat, class Order>
EK_LANE void decode_row(const RowSource& table, int64_t id, float* out, Pair* squares) {
  const std::byte *row = table.row(id), *scales = table.row_scales(id);
  for (int i = 0; i < table.row_dim; i += kPair) {
    const Pair x = in_pair_order<Order>({decode_lanes<kFormat>(table, row, scales, i, kLanes),
                                         decode_lanes<kFormat>(table, row, scales, i + kLanes, kLanes)});
    *squares = fma(x, x, *squares);
    store_pair(out + i, x);
  }
}

// One row of any length, in memory order.
template <RowFormat kFormat>
EK_LANE void decode_odd_row(const RowSource& table, int64_t id, float* out) {
  const std::byte *row = table.row(id), *scales = table.row_scales(id);
  for (int i = 0; i < table.row_dim; i += kLanes) {
    const int left = table.row_dim - i;
    store_upto(out + i, decode_lanes<kFormat>(table, row, scales, i, left < kLanes ? left : kLanes), left);
  }
}

template <RowFormat kFormat, class Order>
static float decode_token(const GatherGateParams& p, int64_t t, float* e) {
  const int64_t dim = p.table.row_dim, size = p.hidden_size;
  const bool whole_pairs = dim % kPair == 0;
  Pair squares = zero_pair();
  for (int64_t c = 0; c < p.columns; ++c) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) {
      std::memset(e + c * dim, 0, static_cast<size_t>(dim) * sizeof(float));
    } else if (whole_pairs) {
      decode_row<kFormat, Order>(p.table, id, e + c * dim, &squares);
    } else {
      decode_odd_row<kFormat>(p.table, id, e + c * dim);
    }
  }
  if (whole_pairs) return sum(squares);
  // pairs straddle rows: order and square them once all are there; what lies behind `size` stays zero
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair x = load_in_order<Order>(e + i);
    squares = fma(x, x, squares);
    store_pair(e + i, x);
  }
  for (; i < size; i += kLanes) squares.a = fma(load(e + i), load(e + i), squares.a);
  return sum(squares);
}

template <class T>
EK_LANE DecodeToken decoder(RowFormat format) {
  using Order = std::conditional_t<kIsEvenOdd<T>, Bf16, float>;
  DecodeToken decode = nullptr;
  with_row_format(format, [&](auto kFormat) { decode = decode_token<decltype(kFormat)::value, Order>; });
  return decode;
}

// The cache lines of the next token's rows, to be prefetched one by one between the arithmetic of this token.
class RowLines {
 public:
  // `steps`: how many lines will be asked for
  RowLines(const GatherGateParams& p, int64_t steps)
      : steps_(steps), memory_((p.columns * max_lines(p.table) + steps) * static_cast<int64_t>(sizeof(void*) / sizeof(float))),
        lines_(reinterpret_cast<const std::byte**>(memory_.data())) {}

  // Takes the lines of token t; those that exceed `steps` are prefetched here and now. t < 0: none.
  void aim(const GatherGateParams& p, int64_t t) {
    const RowSource& table = p.table;
    const int64_t scale_bytes = row_scale_bytes(table.format, table.row_dim);
    int64_t count = 0;
    for (int64_t c = 0; t >= 0 && c < p.columns; ++c) {
      const int64_t id = p.row_id(t, c);
      if (id == kNoRow) continue;
      count = append(table.row(id), row_value_bytes(table.format, table.row_dim), count);
      if (scale_bytes > 0) count = append(table.row_scales(id), scale_bytes, count);
    }
    const std::byte* repeated = count > 0 ? lines_[count - 1] : reinterpret_cast<const std::byte*>(memory_.data());
    for (; count < steps_; ++count) lines_[count] = repeated;
    for (int64_t i = steps_; i < count; ++i) prefetch(lines_[i]);
  }

  const std::byte* const* lines() const { return lines_; }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  // of a row and its scales, each of which may begin and end inside a line
  static int64_t max_lines(const RowSource& table) {
    return (row_value_bytes(table.format, table.row_dim) + row_scale_bytes(table.format, table.row_dim)) / kLine + 4;
  }

  int64_t append(const std::byte* begin, int64_t bytes, int64_t count) {
    // from the line that `begin` lies in; within the row, so that no address outside the table is formed
    const int64_t into_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % kLine);
    lines_[count++] = begin;
    for (int64_t i = kLine - into_line; i < bytes; i += kLine) lines_[count++] = begin + i;
    return count;
  }

  int64_t steps_;
  Scratch memory_;
  const std::byte** lines_;
};

// The next token after t that is not masked; -1 if there is none before `end`.
EK_LANE int64_t next_token(const GatherGateParams& p, int64_t t, int64_t end) {
  for (++t; t < end; ++t) {
    if (!p.masked(t)) return t;
  }
  return -1;
}

}  // namespace engram_kernels::EK_ISA
