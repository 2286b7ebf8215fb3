// row_update: the contract of its kernels. Edge cases: docs/ops.md, row_update.
//
// For each row r that ids name, once, with g = grad_scale * (the sum of grad over its positions, in float32 in their order):
//   squares[first position of r] = sum g^2      0 at every other position
//   the step of the row: one more than steps[r]; m, v: its moments; a: 1 / lr, see the .cpp
// Nothing else is read or written: rows that no id names stay as they are, to the bit. Arithmetic is in float32 without
// contraction, sums of squares are taken in 16 parts whatever the instruction set: results depend on neither threads, ISA nor
// device. What all kernels must do alike to the bit, beyond float32 arithmetic, is here: random bits, rounding, step sizes; how
// rows of eight bits are encoded again is in common/row_encode.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "common/parallel.h"
#include "common/row_format.h"
#include "common/row_ids.h"

namespace engram_kernels {

enum class UpdateRule : int { kNone, kSgd, kAdagrad, kAdam };

struct RowUpdateParams {
  RowSource table;        // its rows, and scales where it has any, may be written; of a float format, or one that can_encode
  RowIds row_ids;         // -1 or [0, num_rows): check_row_ids
  const std::byte* grad;  // [row_ids.count, row_dim] of grad_dtype, dense
  DType grad_dtype;
  float* second;  // [num_rows, row_dim], or [num_rows] with second_per_row, dense; or null
  bool second_per_row;
  std::byte* first;  // [num_rows, row_dim] of first_dtype (float32 or bfloat16), dense; or null
  DType first_dtype;
  int32_t* steps;  // [num_rows]: updates that a row has had; or null
  float* squares;  // out [row_ids.count]
  UpdateRule rule;
  double lr, beta1, beta2, eps, grad_scale;
  int64_t step;  // for the bias correction of all rows alike; 0: each row's own
  bool stochastic;
  uint64_t seed;
  int64_t first_row;  // what row 0 is called when its random bits are drawn
  // CPU only: what each row is called instead, in a table that holds some rows of another; or null
  const int64_t* row_names = nullptr;
  // CUDA only: row_ids is sorted stably, and may name no row of the table; this is where each id stood
  const int64_t* positions = nullptr;
  uint32_t* refused = nullptr;      // device memory, 0 before the call; not 0 after one that wrote nothing but `squares`
  float* sizes = nullptr;           // device memory [row_ids.count] where has_own_sizes, else unused
  uint32_t* error_count = nullptr;  // device memory, counts what is wrong; or null
};

// What is wrong with the gradients, before anything is written. Positions and rows are -1 where all is well.
struct GradientFault {
  int64_t position = -1;   // the first whose gradient is NaN or infinite
  int64_t row = -1;        // the first whose summed and scaled gradient is infinite
  int64_t spent_row = -1;  // the first whose count of steps is negative or cannot grow
};

// Throws unless sizes, options and pointers fit one another. Ids and gradients are not inspected.
void check_params(const RowUpdateParams& p);
// Throws where `fault` has one: names the position, the row and the element.
void throw_fault(const RowUpdateParams& p, const GradientFault& fault);

constexpr int kSquareParts = 16;  // of a row's sum of squares: part k sums the elements k, k + 16, .. in their order

// Rows and scales of `table`, which its other users only read.
EK_INLINE std::byte* writable(const std::byte* stored) { return const_cast<std::byte*>(stored); }

// What a row is called in messages and when its random bits are drawn.
EK_INLINE int64_t name_of(const RowUpdateParams& p, int64_t row) {
  return p.row_names == nullptr || row < 0 ? p.first_row + row : p.row_names[row];
}

// Whether the factor of an update differs from row to row.
EK_INLINE bool has_own_sizes(const RowUpdateParams& p) { return p.rule == UpdateRule::kAdam && p.step == 0; }

// ---- random bits ----------------------------------------------------------------------------------------------------

EK_INLINE uint64_t splitmix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

// The key of a row at a step. Its lower half is for the row, its upper half for the first moment.
EK_INLINE uint64_t key_of(uint64_t seed, int64_t row, int64_t step) {
  return splitmix(splitmix(splitmix(seed) ^ static_cast<uint64_t>(row)) ^ static_cast<uint64_t>(step));
}

// 32 bits of an element, of half a row's key
EK_INLINE uint32_t random_bits(uint32_t key, int element) {
  uint32_t x = static_cast<uint32_t>(element) * 0x9E3779B9U + key;
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  return x ^ (x >> 16);
}

EK_INLINE uint16_t round_to_bf16(float x, uint32_t random) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + (random >> 16)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC0U : rounded);
}

EK_INLINE uint16_t round_to_f16(float x, uint32_t random) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7FFFFFFFU, sign = (bits >> 16) & 0x8000U;
  // below 2^-14 halves are multiples of 2^-24
  const float scaled = magnitude < 0x38800000U ? float_from_bits(magnitude) * 16777216.0F : 0.0F;
  const int32_t whole = static_cast<int32_t>(scaled);
  const float cut = scaled - static_cast<float>(whole), draw = static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24F;
  const uint32_t small = static_cast<uint32_t>(whole) + (draw < cut ? 1U : 0U);
  uint32_t large = (magnitude + (random >> 19) - (112U << 23)) >> 13;
  large = magnitude >= 0x47800000U ? 0x7C00U : large;
  large = magnitude > 0x7F800000U ? 0x7E00U : large;
  return static_cast<uint16_t>(sign | (magnitude < 0x38800000U ? small : large));
}

// ---- step sizes -----------------------------------------------------------------------------------------------------

// Products and differences that no compiler contracts.
EK_INLINE double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
EK_INLINE double one_minus(double x) {
#ifdef __CUDA_ARCH__
  return __dsub_rn(1.0, x);
#else
  return 1.0 - x;
#endif
}

// base^n for base in [0, 1): by squaring, since no two libraries round pow alike.
EK_INLINE double power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result = times(result, base);
    base = times(base, base);
  }
  return result;
}

// The factor of an update at a step, in the order of torch's SparseAdam.
EK_INLINE float step_size(const RowUpdateParams& p, int64_t step) {
  if (p.rule != UpdateRule::kAdam) return static_cast<float>(p.lr);
  const double rate = times(p.lr, sqrt(one_minus(power(p.beta2, step))));
  return static_cast<float>(p.first == nullptr ? rate : rate / one_minus(power(p.beta1, step)));
}

void find_gradient_fault_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel, GradientFault& fault);
void row_update_cpu(const RowUpdateParams& p, const RowOrder& order, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// An id that is out of range, a gradient that is not finite or sums up to what is not, and a count that is spent are counted;
// then nothing is written, and every element of `squares` is NaN.
void row_update_cuda(const RowUpdateParams& p, void* stream);
#endif

}  // namespace engram_kernels
