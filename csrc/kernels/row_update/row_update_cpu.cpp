// CPU kernel of row_update. Contract: row_update.h.
//
// Mapping   consecutive entries of the sorted ids to each thread, cut where a row ends: a row has one thread. Its gradient is
//           summed into a buffer, and every later pass over the row is over what lies in L1.
// Rules     g: summed gradient; t: the row's step, or the call's; b1, b2: betas. All in float32 but c, which is in float64:
//             sgd       m = b1 * m + g, or m = g           row -= lr * m
//             adagrad   v += g^2                           row -= lr * (g / (sqrt(v) + eps))
//             adam      m += (g - m) * (1 - b1), or m = g  v += (g^2 - v) * (1 - b2)   row -= c * (m / (sqrt(v) + eps))
//                       c = lr * sqrt(1 - b2^t) / (1 - b1^t), without m: lr * sqrt(1 - b2^t)
//           with one v per row, g^2 is its mean over the row, and row -= (c / (sqrt(v) + eps)) * m.
//           Rows of eight bits are decoded to float32 before it and encoded behind it.
// Rounding  to nearest even, or up with the probability of the part that is cut off, by 32 bits from (seed, row, step, element).
// Traffic   reads the gradients twice (once to find what is not finite), rows and moments once; writes rows and moments once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "common/cpu_isa.h"
#include "common/row_decode.h"
#include "common/row_encode.h"
#include "common/sum_positions.h"
#include "kernels/row_update/row_update.h"

namespace engram_kernels::EK_ISA {
namespace {

constexpr int64_t kGrainEntries = 64;
constexpr int64_t kGrainPositions = 256;
// Into L2: L1 has too few places for lines that are on their way, and waits.
constexpr int64_t kPrefetchEntries = 8;
constexpr int kParts = kSquareParts;  // row buffers are padded with zeros to a multiple of it
static_assert(kParts % kLanes == 0);

EK_LANE F32 root(F32 x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  return each_lane([&](int i) { return __builtin_sqrtf(x.lane[i]); });
#endif
}

// ---- rows to and from buffers ---------------------------------------------------------------------------------------

EK_LANE void round_with(float x, uint32_t random, Bf16* out) { out->bits = round_to_bf16(x, random); }
EK_LANE void round_with(float x, uint32_t random, F16* out) { out->bits = round_to_f16(x, random); }

template <class T>
EK_LANE void round_row(const float* values, int count, bool stochastic, uint32_t key, T* out) {
  if (stochastic) {
    for (int i = 0; i < count; ++i) round_with(values[i], random_bits(key, i), out + i);
    return;
  }
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(values + i));
  if (i < count) store_first(out + i, load(values + i), count - i);
}

// values[0, count) of a row, and zeros up to the padded size
template <class T>
EK_LANE void load_row(const T* from, int count, float* values) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, load(from + i));
  if (i < count) store(values + i, load_first(from + i, count - i));
}

template <RowFormat kFormat>
using Half = std::conditional_t<stores(kFormat, DType::kBf16), Bf16, F16>;

// The largest magnitude of the elements, as its bits; of a NaN or infinity above every finite one.
EK_LANE uint32_t largest_of(const float* x, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7FFFFFFFU);
  }
  return largest;
}
template <class Half>
EK_LANE uint32_t largest_of(const Half* x, int count) {
  uint16_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint16_t>(x[i].bits & 0x7FFFU));
  return bits_from_float(to_float(Half{largest}));
}

// The values of a stored row; up to the padded size they are zeros, or NaN of a scale that is NaN.
template <RowFormat kFormat>
EK_LANE void load_stored(const RowSource& table, int64_t row, float* values) {
  const std::byte *from = table.row(row), *scales = table.row_scales(row);
  for (int i = 0; i < table.row_dim; i += kLanes) {
    store(values + i, decode_lanes<kFormat>(table, from, scales, i, std::min(kLanes, table.row_dim - i)));
  }
}

// The codes of count elements that share a scale; `first` is the number of the first one in its row.
template <RowFormat kFormat, bool kStochastic>
EK_LANE void encode_block(const float* values, int count, uint32_t key, int first, std::byte* codes, std::byte* scale) {
  constexpr size_t kScaleBytes = static_cast<size_t>(scale_bytes(kFormat));
  float before = 0.0F;
  if constexpr (!kHasPowerScales<kFormat>) std::memcpy(&before, scale, kScaleBytes);
  const BlockScale by = block_scale<kFormat>(largest_of(values, count), before);
  std::memcpy(scale, &by.stored, kScaleBytes);  // its first byte is its lowest
  for (int i = 0; i < count; ++i) {
    codes[i] = static_cast<std::byte>(encode<kFormat, kStochastic>(values[i], by, random_bits(key, first + i)));
  }
}

// Rounds values to what a row of halves or of eight bits stores.
template <RowFormat kFormat>
EK_LANE void store_stored(const RowSource& table, int64_t row, const float* values, bool stochastic, uint32_t key) {
  std::byte *to = writable(table.row(row)), *scales = writable(table.row_scales(row));
  if constexpr (is_plain(kFormat)) {
    round_row(values, table.row_dim, stochastic, key, reinterpret_cast<Half<kFormat>*>(to));
  } else {
    const int block = has_blocks(kFormat) ? traits_of(kFormat).block : table.row_dim;
    for (int i = 0; i < table.row_dim; i += block, scales += scale_bytes(kFormat)) {
      stochastic ? encode_block<kFormat, true>(values + i, block, key, i, to + i, scales)
                 : encode_block<kFormat, false>(values + i, block, key, i, to + i, scales);
    }
  }
}

// ---- one row --------------------------------------------------------------------------------------------------------

// Buffers of one thread, each of the padded size of a row.
struct Buffers {
  float *grad, *row, *first, *second;
  int padded;
};

// Factors of the last steps that were asked for: rows that are updated together have few.
struct StepSizes {
  static constexpr int kSlots = 64;
  int64_t steps[kSlots];
  float sizes[kSlots];
};

EK_LANE float size_at(const RowUpdateParams& p, int64_t step, StepSizes& known) {
  if (p.rule != UpdateRule::kAdam) return step_size(p, step);
  const int slot = static_cast<int>(step % StepSizes::kSlots);
  if (known.steps[slot] != step) {
    known.steps[slot] = step;
    known.sizes[slot] = step_size(p, step);
  }
  return known.sizes[slot];
}

// In kSquareParts parts, which are added by halves, as `sum` does on every instruction set.
EK_LANE float sum_of_squares(const float* values, int padded) {
  F32 parts[kParts / kLanes];
  for (F32& part : parts) part = zeros();
  for (int i = 0; i < padded; i += kParts) {
    for (int k = 0; k < kParts / kLanes; ++k) {
      const F32 x = load(values + i + k * kLanes);
      parts[k] = add(parts[k], mul(x, x));
    }
  }
  for (int k = 1; k < kParts / kLanes; ++k) parts[0] = add(parts[0], parts[k]);
  return sum(parts[0]);
}

// b.grad: the summed gradient of the entries [begin, end) of one row.
template <class Grad>
EK_LANE void sum_gradient(const RowUpdateParams& p, const RowOrder& order, int64_t begin, int64_t end, const Buffers& b) {
  const Grad* grad = reinterpret_cast<const Grad*>(p.grad);
  const F32 scale = splat(static_cast<float>(p.grad_scale));
  if (end == begin + 1) {
    const int count = p.table.row_dim;
    const Grad* from = grad + order.position(begin) * count;
    const auto scaled = [&](F32 x) __attribute__((always_inline)) { return mul(add(x, zeros()), scale); };  // a sum is never -0
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(b.grad + i, scaled(load(from + i)));
    if (i < count) store(b.grad + i, scaled(load_first(from + i, count - i)));
    return;
  }
  for (int column = 0; column < p.table.row_dim; column += kSumColumns) {
    sum_columns(grad, p.table.row_dim, order, begin, end, column, std::min(kSumColumns, p.table.row_dim - column),
                b.grad + column);
  }
  for (int i = 0; i < b.padded; i += kLanes) store(b.grad + i, mul(load(b.grad + i), scale));
}

// Where `count` stored floats are worked on: in place where they are whole parts, else in `buffer`, and then put back.
EK_LANE float* take_row(float* stored, int count, int padded, float* buffer) {
  if (count == padded) return stored;
  load_row(stored, count, buffer);
  return buffer;
}
EK_LANE void put_back(const float* row, int count, float* stored) {
  if (row != stored) std::memcpy(stored, row, static_cast<size_t>(count) * sizeof(float));
}

// first[0, padded) after an update by the gradient
EK_LANE void move_first(const RowUpdateParams& p, const float* grad, int padded, float* first) {
  const F32 beta1 = splat(static_cast<float>(p.beta1)), rest = splat(static_cast<float>(1.0 - p.beta1));
  const bool adam = p.rule == UpdateRule::kAdam;
  for (int i = 0; i < padded; i += kLanes) {
    const F32 g = load(grad + i), m = load(first + i);
    store(first + i, adam ? add(m, mul(sub(g, m), rest)) : add(mul(m, beta1), g));
  }
}

// The first moment of a row after this update, with zeros up to the padded size; b.grad where there is none.
EK_LANE const float* update_first(const RowUpdateParams& p, int64_t row, uint32_t key, const Buffers& b) {
  if (p.first == nullptr) return b.grad;
  const int count = p.table.row_dim;
  if (p.first_dtype == DType::kF32) {
    float* stored = reinterpret_cast<float*>(p.first) + row * count;
    float* first = take_row(stored, count, b.padded, b.first);
    move_first(p, b.grad, b.padded, first);
    put_back(first, count, stored);
    return first;
  }
  Bf16* stored = reinterpret_cast<Bf16*>(p.first) + row * count;
  load_row(stored, count, b.first);
  move_first(p, b.grad, b.padded, b.first);
  round_row(b.first, count, p.stochastic, key, stored);
  return b.first;
}

// to[i] -= factor * by[i]
EK_LANE void subtract(float factor, const float* by, int padded, float* to) {
  const F32 factors = splat(factor);
  for (int i = 0; i < padded; i += kLanes) store(to + i, sub(load(to + i), mul(factors, load(by + i))));
}

// Subtracts size * moment / (sqrt(v) + eps) from `values`, v updated by b.grad; one v for each element, or for the row.
EK_LANE void descend(const RowUpdateParams& p, int64_t row, float size, float squares, const float* moment, const Buffers& b,
                     float* values) {
  if (p.second == nullptr) return subtract(size, moment, b.padded, values);
  const bool adam = p.rule == UpdateRule::kAdam;
  const float rest = static_cast<float>(1.0 - p.beta2), eps = static_cast<float>(p.eps);
  if (p.second_per_row) {
    const float mean = squares / static_cast<float>(p.table.row_dim);
    float& v = p.second[row];
    v += adam ? (mean - v) * rest : mean;
    return subtract(size / (__builtin_sqrtf(v) + eps), moment, b.padded, values);
  }
  float* stored = p.second + row * p.table.row_dim;
  float* second = take_row(stored, p.table.row_dim, b.padded, b.second);
  const F32 epses = splat(eps), rests = splat(rest), sizes = splat(size);
  for (int i = 0; i < b.padded; i += kLanes) {
    const F32 g = load(b.grad + i), old = load(second + i), square = mul(g, g);
    const F32 v = adam ? add(old, mul(sub(square, old), rests)) : add(old, square);
    store(second + i, v);
    // a padded element has m = 0, and with eps = 0 also v = 0: its NaN stays in the buffer
    store(values + i, sub(load(values + i), mul(sizes, divide(load(moment + i), add(root(v), epses)))));
  }
  put_back(second, p.table.row_dim, stored);
}

template <RowFormat kFormat>
EK_LANE void update_row(const RowUpdateParams& p, int64_t row, float squares, StepSizes& sizes, const Buffers& b) {
  int64_t step = p.step;
  uint64_t key = 0;
  if (p.steps != nullptr) {
    const int64_t own = ++p.steps[row];
    if (step == 0) step = own;
    if (p.stochastic) key = key_of(p.seed, name_of(p, row), own);
  }
  const float* moment = update_first(p, row, static_cast<uint32_t>(key >> 32), b);
  const float size = size_at(p, step, sizes);
  if constexpr (stores(kFormat, DType::kF32)) {
    float* stored = reinterpret_cast<float*>(writable(p.table.row(row)));
    float* values = take_row(stored, p.table.row_dim, b.padded, b.row);
    descend(p, row, size, squares, moment, b, values);
    put_back(values, p.table.row_dim, stored);
  } else {
    load_stored<kFormat>(p.table, row, b.row);
    descend(p, row, size, squares, moment, b, b.row);
    store_stored<kFormat>(p.table, row, b.row, p.stochastic, static_cast<uint32_t>(key));
  }
}

template <RowFormat kFormat>
EK_LANE void prefetch_row(const RowUpdateParams& p, const RowOrder& order, int64_t entry, int grad_bytes) {
  const int64_t row = order.row(entry);
  const auto lines = [](const void* from, int64_t bytes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const std::byte*>(from) + i, 0, 2);
  };
  const int64_t grad_row = static_cast<int64_t>(p.table.row_dim) * grad_bytes;
  lines(p.grad + order.position(entry) * grad_row, grad_row);
  if (p.rule == UpdateRule::kNone) return;
  lines(p.table.row(row), value_bytes(kFormat, int64_t{p.table.row_dim}));
  if constexpr (!is_plain(kFormat)) __builtin_prefetch(p.table.row_scales(row));
  if (p.second != nullptr)
    p.second_per_row ? lines(p.second + row, 4) : lines(p.second + row * p.table.row_dim, p.table.row_dim * 4);
  const int first_bytes = p.first_dtype == DType::kF32 ? 4 : 2;
  if (p.first != nullptr) lines(p.first + row * p.table.row_dim * first_bytes, p.table.row_dim * first_bytes);
  if (p.steps != nullptr) __builtin_prefetch(p.steps + row);
}

// ---- all rows -------------------------------------------------------------------------------------------------------

// Calls each(row, first entry, entry after the last) for the rows that begin in the entries [begin, end).
template <class Each>
EK_LANE void for_rows(const RowOrder& order, int64_t begin, int64_t end, const Each& each) {
  while (begin > 0 && begin < end && order.row(begin) == order.row(begin - 1)) ++begin;
  while (begin < end) {
    const int64_t row = order.row(begin);
    int64_t last = begin + 1;
    while (last < order.count() && order.row(last) == row) ++last;
    each(row, begin, last);
    begin = last;
  }
}

// Calls f with buffers for rows of p.table.row_dim elements, all zero.
template <class F>
EK_LANE void with_buffers(const RowUpdateParams& p, const F& f) {
  const int64_t padded = ceil_div(p.table.row_dim, kParts) * kParts;
  const size_t bytes = static_cast<size_t>(4 * padded) * sizeof(float);
  float* memory = static_cast<float*>(::operator new(bytes, std::align_val_t{64}));
  std::memset(memory, 0, bytes);
  f(Buffers{memory, memory + padded, memory + 2 * padded, memory + 3 * padded, static_cast<int>(padded)});
  ::operator delete(memory, std::align_val_t{64});
}

template <RowFormat kFormat, class Grad>
void update_rows(const RowUpdateParams& p, const RowOrder& order, int64_t begin, int64_t end) {
  StepSizes sizes{};  // no step is 0
  with_buffers(p, [&](const Buffers& b) __attribute__((always_inline)) {
    for_rows(order, begin, end, [&](int64_t row, int64_t first, int64_t last) __attribute__((always_inline)) {
      if (last + kPrefetchEntries <= order.count()) {
        prefetch_row<kFormat>(p, order, last + kPrefetchEntries - 1, static_cast<int>(sizeof(Grad)));
      }
      sum_gradient<Grad>(p, order, first, last, b);
      const float squares = sum_of_squares(b.grad, b.padded);
      p.squares[order.position(first)] = squares;
      if (p.rule != UpdateRule::kNone) update_row<kFormat>(p, row, squares, sizes, b);
    });
  });
}

EK_LANE void keep_smallest(int64_t value, int64_t* smallest) {
  int64_t old = __atomic_load_n(smallest, __ATOMIC_RELAXED);
  while ((old < 0 || value < old) &&
         !__atomic_compare_exchange_n(smallest, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

EK_LANE void keep_largest(uint32_t value, uint32_t* largest) {
  uint32_t old = __atomic_load_n(largest, __ATOMIC_RELAXED);
  while (value > old && !__atomic_compare_exchange_n(largest, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <class Grad>
void scan_gradients(const RowUpdateParams& p, int64_t begin, int64_t end, int64_t* bad, uint32_t* largest) {
  const Grad* grad = reinterpret_cast<const Grad*>(p.grad);
  uint32_t here = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (p.row_ids[i] == kNoRow) continue;
    const uint32_t of_row = largest_of(grad + i * p.table.row_dim, p.table.row_dim);
    if (of_row >= kInfinityBits) return keep_smallest(i, bad);
    here = std::max(here, of_row);
  }
  keep_largest(here, largest);
}

template <class Grad>
void scan_rows(const RowUpdateParams& p, const RowOrder& order, int64_t begin, int64_t end, bool sums, GradientFault& fault) {
  with_buffers(p, [&](const Buffers& b) __attribute__((always_inline)) {
    for_rows(order, begin, end, [&](int64_t row, int64_t first, int64_t last) __attribute__((always_inline)) {
      if (p.rule != UpdateRule::kNone && p.steps != nullptr && (p.steps[row] < 0 || p.steps[row] == INT32_MAX)) {
        keep_smallest(row, &fault.spent_row);
      }
      if (!sums) return;
      sum_gradient<Grad>(p, order, first, last, b);
      if (largest_of(b.grad, p.table.row_dim) >= kInfinityBits) keep_smallest(row, &fault.row);
    });
  });
}

}  // namespace

void find_gradient_fault_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel, GradientFault& fault) {
  with_dtype(p.grad_dtype, [&](auto* grad) __attribute__((always_inline)) {
    using Grad = std::remove_pointer_t<decltype(grad)>;
    uint32_t largest = 0;
    parallel.for_range(p.row_ids.count, kGrainPositions,
                       [&](int64_t begin, int64_t end) { scan_gradients<Grad>(p, begin, end, &fault.position, &largest); });
    if (fault.position >= 0) return;
    // no sum can overflow where all of the largest together would not
    const double bound = static_cast<double>(float_from_bits(largest)) * static_cast<double>(order.count()) *
                         std::max(1.0, std::fabs(p.grad_scale));
    const bool sums = bound > 3.4e38;
    if (!sums && (p.steps == nullptr || p.rule == UpdateRule::kNone)) return;
    parallel.for_range(order.count(), kGrainEntries,
                       [&](int64_t begin, int64_t end) { scan_rows<Grad>(p, order, begin, end, sums, fault); });
  });
}

void row_update_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel) {
  if (p.row_ids.count == 0) return;  // then squares may be null
  std::memset(p.squares, 0, static_cast<size_t>(p.row_ids.count) * sizeof(float));
  with_row_decode(p.table.format, [&](auto format) __attribute__((always_inline)) {
    if constexpr (is_plain(format.value) || can_encode(format.value)) {
      with_dtype(p.grad_dtype, [&](auto* grad) __attribute__((always_inline)) {
        parallel.for_range(order.count(), kGrainEntries, [&](int64_t begin, int64_t end) {
          update_rows<format.value, std::remove_pointer_t<decltype(grad)>>(p, order, begin, end);
        });
      });
    }
  });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(find_gradient_fault_cpu,
                (const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel, GradientFault& fault),
                (p, order, parallel, fault))
EK_DISPATCH_CPU(row_update_cpu, (const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel), (p, order, parallel))
