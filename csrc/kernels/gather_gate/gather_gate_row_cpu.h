// What the CPU kernels of gather_gate do with the rows of one token.
#pragma once

#include "kernels/gate/gate_cpu.h"
#include "kernels/gather_gate/gather_gate.h"
#include "kernels/gather_rows/fp8_to_bf16_cpu.h"

namespace engram_kernels::EK_ISA {

constexpr int64_t kLineBytes = 64;

// The lines of [begin, begin + bytes) but the first; no address outside the table is formed.
EK_LANE void prefetch_rest(const std::byte* begin, int64_t bytes) {
  const int64_t into_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % kLineBytes);
  for (int64_t i = kLineBytes - into_line; i < bytes; i += kLineBytes) prefetch(begin + i);
}

// Asks for all rows of token t at once, first one line of each: a prefetch waits for its page to be found, and the
// searches of many rows overlap (measured: 40 ns per row so, 95 where the prefetches are spread over the arithmetic of a
// token). t < 0: nothing.
EK_LANE void prefetch_rows(const GatherGateParams& p, int64_t t) {
  if (t < 0) return;
  const RowSource& table = p.table;
  const int64_t value_bytes = row_value_bytes(table.format, table.row_dim);
  const int64_t scale_bytes = row_scale_bytes(table.format, table.row_dim);
  for (int64_t c = 0; c < p.columns; ++c) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) continue;
    prefetch(table.row(id));
    if (scale_bytes > 0) prefetch(table.row_scales(id));
  }
  for (int64_t c = 0; c < p.columns; ++c) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) continue;
    prefetch_rest(table.row(id), value_bytes);
    if (scale_bytes > 0) prefetch_rest(table.row_scales(id), scale_bytes);
  }
}

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
using Kept = std::conditional_t<stores(kFormat, kDType<T>), T, float>;

// Brings the rows of token t into e [padded_size of Kept], while it computes the sums of one branch (that of h and w).
using DecodeAndSum = RowSums (*)(const GatherGateParams& p, int64_t t, const void* h, const float* w, void* e);

// kPair elements of a row, from a multiple of kPair, in the pair order of T; also written to e
template <RowFormat kFormat, class T>
EK_LANE Pair decode_pair(const RowSource& table, const std::byte* row, const std::byte* scales, int i, Kept<kFormat, T>* e) {
  if constexpr (std::is_same_v<Kept<kFormat, T>, T> && !std::is_same_v<T, float>) {
    std::memcpy(e + i, row + int64_t{i} * sizeof(T), kPair * sizeof(T));
    return load_pair(e + i);
  } else if constexpr (traits_of(kFormat).element == RowElement::kFp8E4m3 && kIsEvenOdd<T> && kBlocksWriteNan &&
                       kPair == kTableBlock) {
    Bf16 words[kTableBlock];  // an unscaled e4m3 is exact in bf16, and there it is in order already
    NanLanes nans;
    fp8_block_to_bf16<false>(row + i, fp8_table(std::byte{127}), words, &nans);
    const Pair x = mul(load_pair(words), splat(scale_at<kFormat>(table, scales, i)));
    store_pair(e + i, x);
    return x;
  } else {
    const Pair x = in_pair_order<T>(
        {decode_lanes<kFormat>(table, row, scales, i, kLanes), decode_lanes<kFormat>(table, row, scales, i + kLanes, kLanes)});
    store_pair(e + i, x);
    return x;
  }
}

// The rows of token t, of any length, in memory order.
template <RowFormat kFormat, class K>
__attribute__((noinline)) static void decode_rows(const GatherGateParams& p, int64_t t, K* e) {
  const int dim = p.table.row_dim;
  for (int64_t c = 0; c < p.columns; ++c, e += dim) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) {
      std::memset(e, 0, static_cast<size_t>(dim) * sizeof(K));
    } else if constexpr (!std::is_same_v<K, float>) {
      std::memcpy(e, p.table.row(id), static_cast<size_t>(dim) * sizeof(K));
    } else {
      const std::byte *row = p.table.row(id), *scales = p.table.row_scales(id);
      for (int i = 0; i < dim; i += kLanes) {
        const int left = dim - i;
        store_upto(e + i, decode_lanes<kFormat>(p.table, row, scales, i, left < kLanes ? left : kLanes), left);
      }
    }
  }
}

// The sums of rows that decode_rows brought, which are put into the pair order of T first.
template <class T, class K>
__attribute__((noinline)) static RowSums order_and_sum(const T* h, const float* w, K* e, int64_t size) {
  if constexpr (std::is_same_v<K, float> && kIsEvenOdd<T>) {
    for (int64_t i = 0; i + kPair <= size; i += kPair) store_pair(e + i, load_in_order<T>(e + i));
  }
  return row_sums<true>(h, e, w, size, [](int64_t) {});
}

// decode_rows and order_and_sum in one pass, for rows that fill whole pairs.
template <RowFormat kFormat, class T>
EK_LANE RowSums decode_and_sum_pairs(const GatherGateParams& p, int64_t t, const T* h, const float* w, Kept<kFormat, T>* e) {
  const int dim = p.table.row_dim;
  Pair dot = zero_pair(), hh = zero_pair(), kk = zero_pair();
  for (int64_t c = 0; c < p.columns; ++c, h += dim, w += dim, e += dim) {
    const int64_t id = p.row_id(t, c);
    if (id == kNoRow) {
      std::memset(e, 0, static_cast<size_t>(dim) * sizeof(*e));
      for (int i = 0; i < dim; i += kPair) {
        const Pair x = load_pair(h + i);
        hh = fma(x, x, hh);
      }
      continue;
    }
    const std::byte *row = p.table.row(id), *scales = p.table.row_scales(id);
    for (int i = 0; i < dim; i += kPair) {
      const Pair x = load_pair(h + i), y = decode_pair<kFormat, T>(p.table, row, scales, i, e);
      dot = fma(mul(x, y), load_pair(w + i), dot);
      hh = fma(x, x, hh);
      kk = fma(y, y, kk);
    }
  }
  return {sum(dot), sum(hh), sum(kk)};
}

template <RowFormat kFormat, class T>
static RowSums decode_and_sum(const GatherGateParams& p, int64_t t, const void* hidden, const float* w, void* memory) {
  using K = Kept<kFormat, T>;
  const T* h = static_cast<const T*>(hidden);
  K* e = static_cast<K*>(memory);
  if constexpr (kHasPairs) {  // elsewhere one pass saves nothing, and 21 instantiations cost a compiler minutes
    if (p.table.row_dim % kPair == 0) return decode_and_sum_pairs<kFormat, T>(p, t, h, w, e);
  }
  decode_rows<kFormat, K>(p, t, e);
  return order_and_sum(h, w, e, p.hidden_size);
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
