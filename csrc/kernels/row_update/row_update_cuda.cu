// CUDA kernels of row_update. Contract: row_update.h; the rules' formulas: row_update_cpu.cpp.
//
// The ids are sorted, so a row's positions lie side by side. A group of lanes takes a sorted id: a warp, or a part of one where
// rows are short. Where a new row begins, it has the row to itself; elsewhere it has nothing to do.
//   1. sums    One thread per id first looks at it: is it in range, is its row's count spent, how large is its step. Then the
//              group sums the row's gradient and its squares. What must be refused is counted and leaves a mark.
//   2. update  The group sums the gradient again and updates moments and row. Where there is a mark, nothing but NaN is written.
//              A row of eight bits is encoded block by block, a block's largest value found by shuffles. Where a row has one
//              scale, all of it is computed twice: for the largest value, and to be stored.
// Bits     those of the CPU kernel: every operation is rounded by itself, the squares are summed in the same 16 parts, which
//          travel between the lanes by shuffles. Only the payload of a NaN that a row held may differ.
// Traffic  reads the gradients twice, rows and moments once, and writes rows and moments once; one more read of all of them where
//          a row of eight bits has one scale.
// Limits   one group sums a row, even one that thousands of positions name.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/row_decode.h"
#include "common/row_encode.h"
#include "common/sum_positions_cuda.h"
#include "common/vector_cuda.h"
#include "kernels/row_update/row_update.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 4;     // elements of a lane
constexpr int kMinBlocks = 6;  // per multiprocessor: 80 registers; without it ptxas spills to reach an occupancy of its own
constexpr int kBlocksPerSm = 16;
constexpr uint32_t kNan = 0x7FC00000U;

// What the host has worked out for all rows.
struct Factors {
  float size;  // of every update, unless has_own_sizes
  float beta1, rest1, rest2, eps, grad_scale, row_dim;
  int lanes;  // of a group: a power of two
};

// Sets the mark: the call writes no row and no moment.
__device__ __forceinline__ void refuse(const RowUpdateParams& p) {
  atomicExch(p.refused, 1U);
  count_error(p.error_count);
}

__device__ __forceinline__ void look_at_id(const RowUpdateParams& p, int64_t i) {
  const int64_t row = p.row_ids[i];
  if (!begins_row(p.row_ids, p.table.num_rows, i, row)) {
    p.squares[p.positions[i]] = 0.0F;
    if (row != kNoRow && (row < 0 || row >= p.table.num_rows)) refuse(p);
    return;
  }
  if (p.rule == UpdateRule::kNone || p.steps == nullptr) return;
  const int32_t steps = p.steps[row];
  if (steps < 0 || steps == INT32_MAX) return refuse(p);
  if (has_own_sizes(p)) p.sizes[i] = step_size(p, steps + 1);
}

// g: the summed and scaled gradient of a row, kCount elements from `column` on.
template <DType kGrad, int kCount>
__device__ __forceinline__ void sum_gradient(const RowUpdateParams& p, const Factors& f, int64_t i, int64_t row, int column,
                                             float (&g)[kCount]) {
  sum_positions<kGrad, kCount>({p.grad, p.positions, p.row_ids, p.table.row_dim}, i, row, column, g);
#pragma unroll
  for (int e = 0; e < kCount; ++e) g[e] = __fmul_rn(g[e], f.grad_scale);
}

// parts[..] += the squares of this group's elements, 16 of them after the other: this lane's parts are those of its own elements.
template <int kCount>
__device__ __forceinline__ void add_squares(const Factors& f, const float (&g)[kCount], float (&parts)[kCount]) {
  constexpr int kBlock = kSquareParts / kCount;  // lanes that hold 16 elements
  const int lane = threadIdx.x % kBlock;
#pragma unroll 1
  for (int from = lane; from < f.lanes; from += kBlock) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      parts[e] = __fadd_rn(parts[e], __shfl_sync(~0U, __fmul_rn(g[e], g[e]), from, f.lanes));
    }
  }
}

// The sum of the 16 parts, halves first; every lane gets it.
template <int kCount>
__device__ __forceinline__ float sum_parts(float (&parts)[kCount]) {
#pragma unroll
  for (int half = kSquareParts / 2; half >= kCount; half /= 2) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) parts[e] = __fadd_rn(parts[e], __shfl_xor_sync(~0U, parts[e], half / kCount));
  }
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) parts[e] = __fadd_rn(parts[e], parts[e + half]);
  }
  return parts[0];
}

// Calls each(i, row) in every lane of a warp alike: the place of its group among the sorted ids and the row that begins there,
// or kNoRow.
template <class Each>
__device__ __forceinline__ void for_rows(const RowUpdateParams& p, const Factors& f, const Each& each) {
  const int groups = kWarp / f.lanes;
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, warps = int64_t{gridDim.x} * (kThreads / kWarp);
#pragma unroll 1
  for (int64_t first = warp * groups; first < p.row_ids.count; first += warps * groups) {
    const int64_t i = first + threadIdx.x % kWarp / f.lanes;
    int64_t row = i < p.row_ids.count ? p.row_ids[i] : kNoRow;
    if (!begins_row(p.row_ids, p.table.num_rows, i, row)) row = kNoRow;
    each(i, row);
  }
}

template <DType kGrad, int kCount>
__global__ void __launch_bounds__(kThreads, kMinBlocks) row_update_sums_kernel(const RowUpdateParams p, const Factors f) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.row_ids.count; i += threads) look_at_id(p, i);
  const int lane = threadIdx.x % f.lanes;
  for_rows(p, f, [&](int64_t i, int64_t row) {
    float parts[kCount] = {};
    bool finite = true;
#pragma unroll 1
    for (int begin = 0; begin < p.table.row_dim; begin += f.lanes * kCount) {
      const int column = begin + lane * kCount;
      float g[kCount] = {};
      if (row != kNoRow && column < p.table.row_dim) sum_gradient<kGrad>(p, f, i, row, column, g);
#pragma unroll
      for (int e = 0; e < kCount; ++e) finite = finite && (__float_as_uint(g[e]) & 0x7FFFFFFFU) < kInfinityBits;
      add_squares(f, g, parts);
    }
    const float squares = sum_parts(parts);
    const uint32_t bad = __ballot_sync(~0U, !finite);
    if (row == kNoRow || lane != 0) return;
    p.squares[p.positions[i]] = squares;
    if (bad >> threadIdx.x % kWarp & (f.lanes == kWarp ? ~0U : (1U << f.lanes) - 1)) refuse(p);
  });
}

// ---- the update -----------------------------------------------------------------------------------------------------

// The bits of an element as kType, two bytes: to the nearest, or by random bits.
template <DType kType>
__device__ __forceinline__ uint32_t rounded(float value, bool stochastic, uint32_t key, int element) {
  if (!stochastic) return pack_pair<kType>(value, 0.0F) & 0xFFFF;
  const uint32_t random = random_bits(key, element);
  return kType == DType::kBf16 ? round_to_bf16(value, random) : round_to_f16(value, random);
}

template <DType kType, int kCount>
__device__ __forceinline__ void store_elements(std::byte* to, const float (&values)[kCount], bool stochastic, uint32_t key,
                                               int column) {
  uint32_t bits[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if constexpr (kType == DType::kF32) {
      bits[e] = __float_as_uint(values[e]);
    } else {
      bits[e] = rounded<kType>(values[e], stochastic, key, column + e);
    }
  }
  if constexpr (kCount == 1 && kType == DType::kF32) {
    *reinterpret_cast<uint32_t*>(to) = bits[0];
  } else if constexpr (kCount == 1) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits[0]);
  } else if constexpr (kType == DType::kF32) {
    store_words(to, bits);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
}

__device__ __forceinline__ float next_second(const RowUpdateParams& p, const Factors& f, float old, float square) {
  return __fadd_rn(old, p.rule == UpdateRule::kAdam ? __fmul_rn(__fsub_rn(square, old), f.rest2) : square);
}

// kCount elements of a row and of its moments, after an update and not yet rounded.
template <int kCount>
struct Updated {
  float values[kCount], first[kCount], second[kCount];
};

// A row and what its update needs. size: lr and bias correction, and the root where a row has one second moment.
struct RowStep {
  int64_t place, row;  // among the sorted ids; kNoRow: this group has none
  float size;
  uint64_t key;
};

template <RowFormat kFormat, int kCount>
__device__ __forceinline__ void load_values(const RowSource& table, int64_t row, int column, float (&values)[kCount]) {
  const std::byte *from = table.row(row), *scales = table.row_scales(row);
  if constexpr (is_plain(kFormat)) {
    load_elements<kPlainDType<kFormat>>(from + value_bytes(kFormat, column), values);
  } else if constexpr (kCount == 1) {
    values[0] = decode_one<kFormat>(table, from, scales, column);
  } else {
    decode<kFormat, kCount>(table, reinterpret_cast<const unsigned char*>(from), reinterpret_cast<const unsigned char*>(scales),
                            column, 0.0F, values);
  }
}

// Elements from `column` on: nothing is written.
template <RowFormat kFormat, DType kGrad, int kCount>
__device__ __forceinline__ void update_elements(const RowUpdateParams& p, const Factors& f, const RowStep& r, int column,
                                                Updated<kCount>& u) {
  const int64_t at = r.row * p.table.row_dim + column;
  const bool has_seconds = p.second != nullptr && !p.second_per_row, first_is_f32 = p.first_dtype == DType::kF32;
  float g[kCount] = {};
  load_values<kFormat>(p.table, r.row, column, u.values);  // all that is loaded, before anything is needed
  if (p.first != nullptr) {
    first_is_f32 ? load_elements<DType::kF32>(p.first + at * 4, u.first) : load_elements<DType::kBf16>(p.first + at * 2, u.first);
  }
  if (has_seconds) load_elements<DType::kF32>(reinterpret_cast<const std::byte*>(p.second + at), u.second);
  sum_gradient<kGrad>(p, f, r.place, r.row, column, g);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (has_seconds) u.second[e] = next_second(p, f, u.second[e], __fmul_rn(g[e], g[e]));
    if (p.first != nullptr) {
      u.first[e] = p.rule == UpdateRule::kAdam ? __fadd_rn(u.first[e], __fmul_rn(__fsub_rn(g[e], u.first[e]), f.rest1))
                                               : __fadd_rn(__fmul_rn(u.first[e], f.beta1), g[e]);
      g[e] = u.first[e];
    }
    const float step = has_seconds ? __fdiv_rn(g[e], __fadd_rn(__fsqrt_rn(u.second[e]), f.eps)) : g[e];
    u.values[e] = __fsub_rn(u.values[e], __fmul_rn(r.size, step));
  }
}

template <int kCount>
__device__ __forceinline__ void store_moments(const RowUpdateParams& p, const RowStep& r, int column, const Updated<kCount>& u) {
  const int64_t at = r.row * p.table.row_dim + column;
  if (p.second != nullptr && !p.second_per_row) {
    store_elements<DType::kF32>(reinterpret_cast<std::byte*>(p.second + at), u.second, false, 0, column);
  }
  if (p.first == nullptr) return;
  const auto upper = static_cast<uint32_t>(r.key >> 32);
  p.first_dtype == DType::kF32 ? store_elements<DType::kF32>(p.first + at * 4, u.first, false, 0, column)
                               : store_elements<DType::kBf16>(p.first + at * 2, u.first, p.stochastic, upper, column);
}

template <RowFormat kFormat, int kCount>
__device__ __forceinline__ void store_codes(const RowUpdateParams& p, const RowStep& r, int column, const Updated<kCount>& u,
                                            const BlockScale& scale) {
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const uint32_t random = p.stochastic ? random_bits(static_cast<uint32_t>(r.key), column + e) : 0;
    const uint32_t code =
        p.stochastic ? encode<kFormat, true>(u.values[e], scale, random) : encode<kFormat, false>(u.values[e], scale, random);
    word |= (code & 0xFFU) << 8 * e;
  }
  std::byte* to = writable(p.table.row(r.row)) + column;
  if constexpr (kCount == 1) {
    *to = static_cast<std::byte>(word);
  } else {
    static_assert(kCount == 4);
    *reinterpret_cast<uint32_t*>(to) = word;
  }
}

template <int kCount>
__device__ __forceinline__ uint32_t larger(uint32_t largest, const float (&values)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) largest = max(largest, __float_as_uint(values[e]) & 0x7FFFFFFFU);
  return largest;
}

// The largest of `lanes` lanes side by side, a power of two.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t largest, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(~0U, largest, offset));
  return largest;
}

// A row of eight bits; every lane of the warp comes here alike, with a row or without.
template <RowFormat kFormat, DType kGrad, int kCount>
__device__ __forceinline__ void update_encoded(const RowUpdateParams& p, const Factors& f, const RowStep& r) {
  constexpr bool kBlocks = has_blocks(kFormat);
  constexpr int kBlockLanes = kBlocks ? traits_of(kFormat).block / kCount : 1;
  static_assert(kBlockLanes <= kWarp);
  const int lane = threadIdx.x % f.lanes, across = f.lanes * kCount;
  std::byte* scales = r.row == kNoRow ? nullptr : writable(p.table.row_scales(r.row));
  uint32_t largest = 0;
  if constexpr (!kBlocks) {
#pragma unroll 1
    for (int column = lane * kCount; r.row != kNoRow && column < p.table.row_dim; column += across) {
      Updated<kCount> u;
      update_elements<kFormat, kGrad>(p, f, r, column, u);
      largest = larger(largest, u.values);
    }
    __syncwarp();
    largest = largest_of_lanes(largest, f.lanes);
  }
#pragma unroll 1
  for (int begin = 0; begin < p.table.row_dim; begin += across) {
    const int column = begin + lane * kCount;
    const bool there = r.row != kNoRow && column < p.table.row_dim;
    Updated<kCount> u = {};
    float before = 0.0F;
    std::byte* scale = there ? scales + scale_index(kFormat, column) * scale_bytes(kFormat) : nullptr;
    if (there) {
      update_elements<kFormat, kGrad>(p, f, r, column, u);
      if constexpr (!kHasPowerScales<kFormat>) before = *reinterpret_cast<const float*>(scale);
    }
    if constexpr (kBlocks) largest = largest_of_lanes(larger(0U, u.values), kBlockLanes);
    __syncwarp();  // the scales were read
    if (!there) continue;
    const BlockScale by = block_scale<kFormat>(largest, before);
    store_codes<kFormat>(p, r, column, u, by);
    store_moments(p, r, column, u);
    const bool is_last = begin + across >= p.table.row_dim;  // a row's one scale is read until then
    if (kBlocks ? column % traits_of(kFormat).block != 0 : lane != 0 || !is_last) continue;
    if constexpr (kHasPowerScales<kFormat>) {
      *scale = static_cast<std::byte>(by.stored);
    } else {
      *reinterpret_cast<uint32_t*>(scale) = by.stored;
    }
  }
}

template <RowFormat kFormat, DType kGrad, int kCount>
__global__ void __launch_bounds__(kThreads, kMinBlocks) row_update_kernel(const RowUpdateParams p, const Factors f) {
  if (*p.refused != 0) {
    const int64_t threads = int64_t{gridDim.x} * kThreads;
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (; i < p.row_ids.count; i += threads) p.squares[i] = __uint_as_float(kNan);
    return;
  }
  if (p.rule == UpdateRule::kNone) return;
  const int lane = threadIdx.x % f.lanes;
  for_rows(p, f, [&](int64_t i, int64_t row) {
    // what the row has once is read by all lanes of the group before one of them writes it
    const int32_t own = row != kNoRow && p.steps != nullptr ? p.steps[row] + 1 : 0;
    const float old = row != kNoRow && p.second_per_row ? p.second[row] : 0.0F;
    __syncwarp();
    if (is_plain(kFormat) && row == kNoRow) return;
    RowStep r{i, row, f.size, 0};
    if (row != kNoRow) {
      if (has_own_sizes(p)) r.size = p.sizes[i];
      if (p.second_per_row) {
        const float second = next_second(p, f, old, __fdiv_rn(p.squares[p.positions[i]], f.row_dim));
        r.size = __fdiv_rn(r.size, __fadd_rn(__fsqrt_rn(second), f.eps));
        if (lane == 0) p.second[row] = second;
      }
      if (lane == 0 && p.steps != nullptr) p.steps[row] = own;
      if (p.stochastic && p.steps != nullptr) r.key = key_of(p.seed, p.first_row + row, own);
    }
    if constexpr (is_plain(kFormat)) {
#pragma unroll 1
      for (int column = lane * kCount; column < p.table.row_dim; column += f.lanes * kCount) {
        Updated<kCount> u;
        update_elements<kFormat, kGrad>(p, f, r, column, u);
        store_moments(p, r, column, u);
        store_elements<kPlainDType<kFormat>>(writable(p.table.row(row)) + value_bytes(kFormat, column), u.values, p.stochastic,
                                             static_cast<uint32_t>(r.key), column);
      }
    } else {
      update_encoded<kFormat, kGrad, kCount>(p, f, r);
    }
  });
}

// ---- launches -------------------------------------------------------------------------------------------------------

Factors factors_of(const RowUpdateParams& p, int elements) {
  Factors f{};
  f.size = has_own_sizes(p) ? 0.0F : step_size(p, p.step);
  f.beta1 = static_cast<float>(p.beta1);
  f.rest1 = static_cast<float>(1.0 - p.beta1);
  f.rest2 = static_cast<float>(1.0 - p.beta2);
  f.eps = static_cast<float>(p.eps);
  f.grad_scale = static_cast<float>(p.grad_scale);
  f.row_dim = static_cast<float>(p.table.row_dim);
  f.lanes = kSquareParts / elements;
  while (f.lanes < kWarp && f.lanes * elements < p.table.row_dim) f.lanes *= 2;
  return f;
}

template <DType kGrad, int kCount>
void launch(const RowUpdateParams& p, cudaStream_t stream) {
  const Factors f = factors_of(p, kCount);
  const int64_t wanted = ceil_div(p.row_ids.count * f.lanes, int64_t{kThreads});
  const auto blocks = static_cast<unsigned>(std::min(wanted, int64_t{num_multiprocessors()} * kBlocksPerSm));
  row_update_sums_kernel<kGrad, kCount><<<blocks, kThreads, 0, stream>>>(p, f);
  EK_CUDA_CHECK(cudaGetLastError());
  with_row_decode(p.table.format, [&](auto format) {
    constexpr RowFormat kFormat = decltype(format)::value;
    if constexpr (is_plain(kFormat) || can_encode(kFormat)) {
      row_update_kernel<kFormat, kGrad, kCount><<<blocks, kThreads, 0, stream>>>(p, f);
    }
  });
  EK_CUDA_CHECK(cudaGetLastError());
}

// Whether every vector of every array is aligned to its size.
bool are_vectors_aligned(const RowUpdateParams& p) {
  const auto aligned = [](const void* data, int64_t vector_bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(vector_bytes)) == 0;
  };
  const int64_t stored = kVector * element_bits(p.table.format) / 8;
  return p.table.row_dim % kVector == 0 && p.table.row_stride_bytes % stored == 0 && aligned(p.table.rows, stored) &&
         aligned(p.grad, kVector * dtype_bytes(p.grad_dtype)) && aligned(p.first, kVector * dtype_bytes(p.first_dtype)) &&
         (p.second_per_row || aligned(p.second, kVector * 4));
}

}  // namespace

void row_update_cuda(const RowUpdateParams& p, void* stream) {
  check_params(p);
  if (p.row_ids.count == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  const bool vectors = are_vectors_aligned(p);
  dispatch_dtype(p.grad_dtype, [&](auto type) { vectors ? launch<type.value, kVector>(p, on) : launch<type.value, 1>(p, on); });
}

}  // namespace engram_kernels
