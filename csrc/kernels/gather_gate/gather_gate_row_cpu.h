// What the CPU kernels of gather_gate do with the rows of one token.
#pragma once

#include "kernels/gate/gate_row_cpu.h"
#include "kernels/gather_gate/gather_gate.h"

namespace engram_kernels::EK_ISA {

// The cache lines of the next token's rows, to be prefetched one by one, evenly, between the arithmetic of this token: a
// core has some twenty lines in flight at most, and what is asked for beyond that stalls it.
class RowLines {
 public:
  // `steps`: how many times a token will call prefetch_at
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
    if (count == 0) lines_[count++] = reinterpret_cast<const std::byte*>(memory_.data());
    for (int64_t i = steps_; i < count; ++i) prefetch(lines_[i]);
    shift_ = 0;  // each line for 2^shift steps, the last one for the rest
    while (count << (shift_ + 1) <= steps_) ++shift_;
    for (; count << shift_ < steps_; ++count) lines_[count] = lines_[count - 1];
  }

  // The lines from a step on, for a loop.
  struct Cursor {
    const std::byte* const* lines;
    int64_t step;
    int shift;
    EK_INLINE void prefetch_at(int64_t i) const { prefetch(lines[(step + i) >> shift]); }
  };
  Cursor from(int64_t step) const { return {lines_, step, shift_}; }

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
  int shift_ = 0;
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

// How a token's rows are kept between the passes: as they are stored where their element is that of hidden, which takes
// half the room of floats and no rounding; else as float in the pair order of T.
template <RowFormat kFormat, class T>
using Kept = std::conditional_t<(kFormat == RowFormat::kBf16 && std::is_same_v<T, Bf16>) ||
                                    (kFormat == RowFormat::kF16 && std::is_same_v<T, F16>),
                                T, float>;

// Brings the rows of token t into e [padded_size of Kept], while it computes the sums of one branch (that of h and w).
// Between pairs, what comes next is prefetched.
using DecodeAndSum = RowSums (*)(const GatherGateParams& p, int64_t t, const void* h, const float* w, void* e,
                                 RowLines::Cursor ahead);

// kPair elements of a row, from a multiple of kPair, in the pair order of T; also written to e
template <RowFormat kFormat, class T>
EK_LANE Pair decode_pair(const RowSource& table, const std::byte* row, const std::byte* scales, int i, Kept<kFormat, T>* e) {
  if constexpr (std::is_same_v<Kept<kFormat, T>, T> && !std::is_same_v<T, float>) {
    std::memcpy(e + i, row + int64_t{i} * sizeof(T), kPair * sizeof(T));
    return load_pair(e + i);
  } else {
    const Pair x = in_pair_order<T>({decode_lanes<kFormat>(table, row, scales, i, kLanes),
                                     decode_lanes<kFormat>(table, row, scales, i + kLanes, kLanes)});
    store_pair(e + i, x);
    return x;
  }
}

// Rows whose length is no multiple of kPair: all of them first, then their order, then the sums.
template <RowFormat kFormat, class T>
static RowSums decode_odd_and_sum(const GatherGateParams& p, int64_t t, const T* h, const float* w, Kept<kFormat, T>* e) {
  using K = Kept<kFormat, T>;
  const int dim = p.table.row_dim;
  for (int64_t c = 0; c < p.columns; ++c) {
    K* out = e + c * dim;
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) {
      std::memset(out, 0, static_cast<size_t>(dim) * sizeof(K));
      continue;
    }
    const std::byte *row = p.table.row(id), *scales = p.table.row_scales(id);
    for (int i = 0; i < dim; i += kLanes) {
      const int left = dim - i;
      store_upto(out + i, decode_lanes<kFormat>(p.table, row, scales, i, left < kLanes ? left : kLanes), left);
    }
  }
  if constexpr (std::is_same_v<K, float>) {
    for (int64_t i = 0; i + kPair <= p.hidden_size; i += kPair) store_pair(e + i, load_in_order<T>(e + i));
  }
  return row_sums<true>(h, e, w, p.hidden_size, [](int64_t) {});
}

template <RowFormat kFormat, class T>
static RowSums decode_and_sum(const GatherGateParams& p, int64_t t, const void* hidden, const float* w, void* memory,
                              RowLines::Cursor ahead) {
  using K = Kept<kFormat, T>;
  const T* h = static_cast<const T*>(hidden);
  K* e = static_cast<K*>(memory);
  const int dim = p.table.row_dim;
  if (dim % kPair != 0) return decode_odd_and_sum<kFormat, T>(p, t, h, w, e);
  Pair dot = zero_pair(), hh = zero_pair(), kk = zero_pair();
  int64_t step = 0;
  for (int64_t c = 0; c < p.columns; ++c, h += dim, w += dim, e += dim) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) {
      std::memset(e, 0, static_cast<size_t>(dim) * sizeof(K));
      for (int i = 0; i < dim; i += kPair) {
        const Pair x = load_pair(h + i);
        hh = fma(x, x, hh);
        ahead.prefetch_at(step++);
      }
      continue;
    }
    const std::byte *row = p.table.row(id), *scales = p.table.row_scales(id);
    for (int i = 0; i < dim; i += kPair) {
      const Pair x = load_pair(h + i), y = decode_pair<kFormat, T>(p.table, row, scales, i, e);
      dot = fma(mul(x, y), load_pair(w + i), dot);
      hh = fma(x, x, hh);
      kk = fma(y, y, kk);
      ahead.prefetch_at(step++);
    }
  }
  return {sum(dot), sum(hh), sum(kk)};
}

template <class T>
EK_LANE DecodeAndSum decoder(RowFormat format) {
  DecodeAndSum decode = nullptr;
  with_row_format(format, [&](auto kFormat) { decode = decode_and_sum<decltype(kFormat)::value, T>; });
  return decode;
}

// Calls f with a null pointer of Kept<format, T>.
template <class T, class F>
EK_LANE void with_kept(RowFormat format, const F& f) {
  with_row_format(format, [&](auto kFormat) { f(static_cast<Kept<decltype(kFormat)::value, T>*>(nullptr)); });
}

}  // namespace engram_kernels::EK_ISA
