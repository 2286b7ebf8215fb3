// CUDA kernels of gather_rows. Contract: gather_rows.h.
//
// Mapping  a block takes a tile of rows. A group of lanes reads a row as it lies in memory, 128 bytes a time on
// 128-byte
//          lines, straight to shared memory (cp.async: nothing waits until the whole tile is on its way); then each
//          thread decodes 16 bytes of output at a time. The second kernel, element by element, takes what has no
//          alignment.
// Traffic  every sector of a row once, the output once, 4 or 8 B an id. Over PCIe the reads are whole 128-byte
// requests. Limits   tiles of rows up to kMaxStagedBytes; any row for the second kernel.
#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "kernels/gather_rows/gather_rows.h"
#include "kernels/gather_rows/gather_rows_stage_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kBlocksPerSm = 16;       // as many as 2,048 threads allow
constexpr int kLoadsInFlight = 8;      // of a thread, at least
constexpr int kMaxLoadsInFlight = 32;  // more only costs shared memory
constexpr int kMaxRowsAThread = 16;
constexpr int kMaxStagedBytes = 2048;
constexpr int64_t kOutVectorBytes = 16;

// kCount elements from `element` on of a row in shared memory, decoded to float.
template <RowFormat kFormat, int kCount>
__device__ __forceinline__ void decode(const RowSource& s, const unsigned char* row, const unsigned char* scales, int element,
                                       float tensor_scale, float* values) {
  if constexpr (kFormat == RowFormat::kF32) {
    load_floats<DType::kF32, kCount>(row + 4 * element, values);
  } else if constexpr (kFormat == RowFormat::kBf16) {
    load_floats<DType::kBf16, kCount>(row + 2 * element, values);
  } else if constexpr (kFormat == RowFormat::kF16) {
    load_floats<DType::kF16, kCount>(row + 2 * element, values);
  } else {
    uint32_t words[kCount / 4];
    load_words<kCount / 4>(row + element, words);
    float scale = tensor_scale;
    if constexpr (kFormat == RowFormat::kInt8Group32) scale = reinterpret_cast<const float*>(scales)[element / kScaleBlock];
    if constexpr (kFormat == RowFormat::kFp8Block32 || kFormat == RowFormat::kFp8Block32Packed) {
      scale = ue8m0_to_float(scales[element / kScaleBlock], s.zero_scale_is_zero);
    }
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      kFormat == RowFormat::kInt8Group32 ? unpack_int8(words[i], values + 4 * i) : unpack_fp8(words[i], values + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= scale;
  }
}

__device__ __forceinline__ constexpr bool is_format_of(RowFormat format, DType dtype) {
  return (format == RowFormat::kF32 && dtype == DType::kF32) || (format == RowFormat::kBf16 && dtype == DType::kBf16) ||
         (format == RowFormat::kF16 && dtype == DType::kF16);
}

// Writes a tile of stored rows: 16-byte vectors that may straddle rows, and the words that are left of the last row.
__device__ __forceinline__ void write_stored(const Plan& plan, std::byte* out, int count) {
  const int bytes = count * plan.row_bytes, whole = bytes & ~15;
#pragma unroll 4
  for (int at = threadIdx.x * 16; at < whole; at += kThreads * 16) {
    *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(shared + at);
  }
  const int at = whole + threadIdx.x * 4;
  if (at < bytes) *reinterpret_cast<uint32_t*>(out + at) = *reinterpret_cast<const uint32_t*>(shared + at);
}

// Decodes a tile; output rows are dense, so that they are one stretch of 16-byte vectors.
template <DType kOut, RowFormat kFormat>
__device__ __forceinline__ void write_decoded(const GatherRowsParams& p, const Plan& plan, std::byte* out, int count) {
  constexpr int kCount = kOut == DType::kF32 ? 4 : 8;
  const float tensor_scale = kFormat == RowFormat::kFp8Tensor ? *reinterpret_cast<const float*>(p.source.scales) : 0.0F;
  const int scales_at = kFormat == RowFormat::kFp8Block32Packed ? p.source.row_dim : plan.scales_at;
  const int scale_pitch = kFormat == RowFormat::kFp8Block32Packed ? plan.row_pitch : plan.scale_pitch;
#pragma unroll 2
  for (int i = threadIdx.x; i < count * plan.vectors; i += kThreads) {
    const int r = static_cast<int>(__umulhi(i, plan.vectors_inverse)), vector = i - r * plan.vectors;
    const unsigned char* row = shared + r * plan.row_pitch;
    if constexpr (is_format_of(kFormat, kOut)) {
      *reinterpret_cast<uint4*>(out + i * 16) = *reinterpret_cast<const uint4*>(row + vector * 16);
    } else {
      float values[kCount];
      // a scale of NaN or below zero must not touch the zeros of a row that is not there
      const bool absent = kFormat == RowFormat::kFp8Tensor && staged_ids(plan)[r] == kNoRow;
      decode<kFormat, kCount>(p.source, row, shared + scales_at + r * scale_pitch, vector * kCount, absent ? 0.0F : tensor_scale,
                              values);
      store_floats<kOut>(out + i * 16, values);
    }
  }
}

template <DType kOut>
__device__ __forceinline__ void write_any(const GatherRowsParams& p, const Plan& plan, std::byte* out, int count) {
  switch (p.source.format) {
    case RowFormat::kF32:
      return write_decoded<kOut, RowFormat::kF32>(p, plan, out, count);
    case RowFormat::kBf16:
      return write_decoded<kOut, RowFormat::kBf16>(p, plan, out, count);
    case RowFormat::kF16:
      return write_decoded<kOut, RowFormat::kF16>(p, plan, out, count);
    case RowFormat::kFp8Block32:
      return write_decoded<kOut, RowFormat::kFp8Block32>(p, plan, out, count);
    case RowFormat::kFp8Block32Packed:
      return write_decoded<kOut, RowFormat::kFp8Block32Packed>(p, plan, out, count);
    case RowFormat::kFp8Tensor:
      return write_decoded<kOut, RowFormat::kFp8Tensor>(p, plan, out, count);
    case RowFormat::kInt8Group32:
      return write_decoded<kOut, RowFormat::kInt8Group32>(p, plan, out, count);
  }
}

template <DType kOut, bool kAsStored>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const GatherRowsParams p, const Plan plan) {
  const int64_t out_row_bytes = kAsStored ? plan.row_bytes : int64_t{plan.vectors} * kOutVectorBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * plan.rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * plan.rows; first < p.row_ids.count; first += step) {
    const int count = static_cast<int>(min(static_cast<int64_t>(plan.rows), p.row_ids.count - first));
    const bool absent = __syncthreads_or(stage_ids(p, plan, first, count));
    switch (plan.slot_bytes) {
      case 16:
        stage_rows<16>(plan, count);
        break;
      case 8:
        stage_rows<8>(plan, count);
        break;
      default:
        stage_rows<4>(plan, count);
        break;
    }
    if (plan.scale_bytes > 0) stage_scales(p, plan, count);
    if (absent) clear_absent(plan, count);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if constexpr (kAsStored) {
      write_stored(plan, p.out + first * out_row_bytes, count);
    } else {
      write_any<kOut>(p, plan, p.out + first * out_row_bytes, count);
    }
    if (first + step < p.row_ids.count) __syncthreads();  // the next tile overwrites what this one reads
  }
}

template <class T>
__device__ __forceinline__ T load_bytes(const std::byte* from) {  // of any alignment
  T value;
  auto* to = reinterpret_cast<std::byte*>(&value);
#pragma unroll
  for (size_t i = 0; i < sizeof(T); ++i) to[i] = from[i];
  return value;
}

__device__ float decode_element(const RowSource& s, int64_t id, int element) {
  const std::byte *row = s.row(id), *scales = s.row_scales(id);
  const auto byte = [&](const std::byte* from) { return static_cast<uint8_t>(*from); };
  switch (s.format) {
    case RowFormat::kF32:
      return load_bytes<float>(row + 4 * element);
    case RowFormat::kBf16:
      return bf16_to_float(load_bytes<uint16_t>(row + 2 * element));
    case RowFormat::kF16:
      return f16_to_float(load_bytes<uint16_t>(row + 2 * element));
    case RowFormat::kFp8Tensor:
      return fp8_e4m3_to_float(byte(row + element)) * load_bytes<float>(s.scales);
    case RowFormat::kInt8Group32:
      return static_cast<float>(static_cast<int8_t>(byte(row + element))) * load_bytes<float>(scales + element / kScaleBlock * 4);
    default:
      break;
  }
  return fp8_e4m3_to_float(byte(row + element)) * ue8m0_to_float(byte(scales + element / kScaleBlock), s.zero_scale_is_zero);
}

template <DType kOut>
__device__ __forceinline__ void write_element(const GatherRowsParams& p, int64_t i, int64_t id, int element) {
  const int64_t at = i * p.source.row_dim + element;
  if constexpr (kOut == DType::kF32) {
    reinterpret_cast<float*>(p.out)[at] = id == kNoRow ? 0.0F : decode_element(p.source, id, element);
  } else {
    uint16_t* out = reinterpret_cast<uint16_t*>(p.out) + at;
    if (id == kNoRow) {
      *out = 0;
    } else if (is_format_of(p.source.format, kOut)) {
      *out = load_bytes<uint16_t>(p.source.row(id) + 2 * element);
    } else {
      *out = static_cast<uint16_t>(pack_pair<kOut>(decode_element(p.source, id, element), 0.0F));
    }
  }
}

// One block a row, one element (or stored byte) at a time.
template <DType kOut, bool kAsStored>
__global__ void __launch_bounds__(kThreads) gather_rows_by_element_kernel(const GatherRowsParams p, const Plan plan) {
  for (int64_t i = blockIdx.x; i < p.row_ids.count; i += gridDim.x) {
    const int64_t id = checked_id(p, i, threadIdx.x == 0);
    const int elements = kAsStored ? plan.row_bytes : p.source.row_dim;
    for (int e = threadIdx.x; e < elements; e += kThreads) {
      if constexpr (kAsStored) {
        p.out[i * elements + e] = id == kNoRow ? std::byte{0} : p.source.row(id)[e];
      } else {
        write_element<kOut>(p, i, id, e);
      }
    }
  }
}

int lowest_bit(uint64_t x) { return x == 0 ? 1 << 30 : static_cast<int>(x & (~x + 1) & 0x3FFFFFFF); }

void place(int rows, Plan* plan) {
  plan->rows = rows;
  plan->scales_at = static_cast<int>(ceil_div(int64_t{rows} * plan->row_pitch, 16) * 16);
  plan->staged_at = static_cast<int>(plan->scales_at + ceil_div(int64_t{rows} * plan->scale_pitch, 16) * 16);
  plan->ids_at = plan->staged_at + rows * static_cast<int>(sizeof(StagedRow));
  plan->shared_bytes = plan->ids_at + rows * 8;
}

// Whether tiles can be staged, and how.
bool make_plan(const GatherRowsParams& p, Plan* plan) {
  const RowSource& s = p.source;
  const bool packed = s.format == RowFormat::kFp8Block32Packed;
  const int64_t row_bytes = row_value_bytes(s.format, s.row_dim),
                out_bytes = p.as_stored ? row_bytes : int64_t{s.row_dim} * dtype_bytes(p.out_dtype);
  plan->row_bytes = static_cast<int>(row_bytes);
  const int aligned = lowest_bit(reinterpret_cast<uintptr_t>(s.rows) | static_cast<uint64_t>(s.row_stride_bytes));
  const int slot = lowest_bit(static_cast<uint64_t>(aligned) | static_cast<uint64_t>(row_bytes));
  plan->slot_bytes = slot < 16 ? slot : 16;
  if (plan->slot_bytes < 4 || row_bytes > kMaxStagedBytes || reinterpret_cast<uintptr_t>(p.out) % 16 != 0) return false;
  // of one vector there is no 32-bit inverse
  if (!p.as_stored && (out_bytes % kOutVectorBytes != 0 || out_bytes == kOutVectorBytes)) return false;
  const int64_t lead = aligned >= kLineBytes ? 0 : kLineBytes - aligned;  // of a row into its first line, at most
  plan->passes = static_cast<int>(ceil_div(lead + row_bytes, kLineBytes));
  const int groups = kThreads / (kLineBytes / plan->slot_bytes);
  int rows_a_thread = static_cast<int>(ceil_div(kMaxLoadsInFlight * kLineBytes, row_bytes));
  rows_a_thread = rows_a_thread < kMaxRowsAThread ? rows_a_thread : kMaxRowsAThread;
  // a small batch goes over many blocks rather than deep into few
  const int64_t enough_rows = ceil_div(kLoadsInFlight * kLineBytes, row_bytes);
  const int64_t enough_tiles = 2 * int64_t{num_multiprocessors()};
  while (rows_a_thread > 1 && ceil_div(p.row_ids.count, groups * rows_a_thread) < enough_tiles &&
         rows_a_thread / 2 >= enough_rows) {
    rows_a_thread /= 2;
  }
  plan->scale_bytes = packed ? 0 : static_cast<int>(row_scale_bytes(s.format, s.row_dim));
  // stored rows stay dense, so that the output is one stretch
  plan->row_pitch = p.as_stored ? plan->row_bytes : static_cast<int>(ceil_div(row_bytes, 16) * 16);
  plan->scale_pitch = static_cast<int>(ceil_div(plan->scale_bytes, 4) * 4);
  plan->vectors = static_cast<int>(out_bytes / kOutVectorBytes);
  if (!p.as_stored) plan->vectors_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + plan->vectors - 1) / plan->vectors);
  for (place(groups * rows_a_thread, plan); plan->shared_bytes > kMaxSharedBytes && rows_a_thread > 1;) {
    place(groups * (rows_a_thread /= 2), plan);
  }
  // a tile of stored rows must begin on a 16-byte boundary of the output
  return plan->shared_bytes <= kMaxSharedBytes && (!p.as_stored || int64_t{plan->rows} * row_bytes % 16 == 0);
}

template <DType kOut, bool kAsStored>
void launch(const GatherRowsParams& p, cudaStream_t stream) {
  Plan plan{};
  const bool staged = make_plan(p, &plan);
  int64_t blocks = staged ? ceil_div(p.row_ids.count, plan.rows) : p.row_ids.count;
  const int64_t resident = int64_t{kBlocksPerSm} * num_multiprocessors();
  if (staged && blocks > resident) blocks = resident;  // each walks several tiles and sets up once
  if (p.max_blocks > 0 && blocks > p.max_blocks) blocks = p.max_blocks;
  const unsigned grid = static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX);
  if (staged) {
    gather_rows_kernel<kOut, kAsStored><<<grid, kThreads, plan.shared_bytes, stream>>>(p, plan);
  } else {
    gather_rows_by_element_kernel<kOut, kAsStored><<<grid, kThreads, 0, stream>>>(p, plan);
  }
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void gather_rows_cuda(const GatherRowsParams& p, void* stream) {
  check_params(p);
  if (p.row_ids.count == 0) return;  // an empty grid is a launch error, an empty batch is not
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (p.as_stored) return launch<DType::kF32, true>(p, on);
  switch (p.out_dtype) {
    case DType::kF32:
      return launch<DType::kF32, false>(p, on);
    case DType::kBf16:
      return launch<DType::kBf16, false>(p, on);
    case DType::kF16:
      return launch<DType::kF16, false>(p, on);
  }
}

}  // namespace engram_kernels
