// CUDA kernels of gather_rows. Contract: gather_rows.h.
//
// Mapping  a block takes a tile of rows. A group of lanes reads a row as it lies in memory, 128 bytes a time on
// 128-byte
//          lines, straight to shared memory (cp.async: nothing waits until the whole tile is on its way); then each
//          thread decodes 16 bytes of output at a time. The second kernel, element by element, takes what has no
//          alignment.
// Traffic  every sector of a row once, the output once, 4 or 8 B an id. Over PCIe the reads are whole 128-byte
// requests. Limits   tiles of rows up to kMaxStagedBytes; any row for the second kernel.
#include <type_traits>

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kLineBytes = 128;
constexpr int kLoadsInFlight = 8;  // of a thread, at least
constexpr int kMaxRowsAThread = 8;
constexpr int kMaxStagedBytes = 2048;
constexpr int64_t kOutVectorBytes = 16;

// What the launcher derives from the params.
struct Plan {
  int slot_bytes;   // of one load: 16, 8 or 4
  int passes;       // lines that a row can touch
  int rows;         // of a tile
  int row_bytes;    // read of a row
  int row_pitch;    // bytes between rows in shared memory
  int scale_bytes;  // of a row's own scales, when they lie apart
  int scale_pitch;
  int vectors;               // 16-byte pieces of an output row
  uint32_t vectors_inverse;  // 2^32 / vectors, rounded up
  int scales_at, ids_at;     // bytes into shared memory
  int shared_bytes;
};

extern __shared__ __align__(16) unsigned char shared[];

// The id of output row i, or kNoRow; counts what is out of range.
__device__ __forceinline__ int64_t checked_id(const GatherRowsParams& p, int64_t i, bool count) {
  const int64_t id = p.row_ids[i];
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(p.source.num_rows)) return id;
  if (count && id != kNoRow) count_error(p.error_count);
  return kNoRow;
}

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const std::byte* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
  }
}

template <int kBytes>
__device__ __forceinline__ void clear(unsigned char* to) {
  if constexpr (kBytes == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(0, 0);
  } else {
    *reinterpret_cast<uint32_t*>(to) = 0;
  }
}

// Starts the reads of a tile's rows. Slots before and behind the row on its first and last line are left out.
template <int kSlot>
__device__ __forceinline__ void stage_rows(const GatherRowsParams& p, const Plan& plan, int count) {
  constexpr int kLanes = kLineBytes / kSlot;
  const int64_t* ids = reinterpret_cast<const int64_t*>(shared + plan.ids_at);
  const int lane_bytes = threadIdx.x % kLanes * kSlot;
#pragma unroll 4
  for (int r = threadIdx.x / kLanes; r < count; r += kThreads / kLanes) {
    const int64_t id = ids[r];
    unsigned char* to = shared + r * plan.row_pitch;
    if (id == kNoRow) {
      for (int at = lane_bytes; at < plan.row_bytes; at += kLineBytes) clear<kSlot>(to + at);
      continue;
    }
    const std::byte* row = p.source.row(id);
    const int into_line = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kLineBytes);
    int at = lane_bytes - into_line;
    const std::byte* from = row + at;
    const uint32_t to_shared = static_cast<uint32_t>(__cvta_generic_to_shared(to)) + at;
#pragma unroll 4
    for (int pass = 0; pass < plan.passes; ++pass) {
      if (static_cast<uint32_t>(at + pass * kLineBytes) < static_cast<uint32_t>(plan.row_bytes)) {
        copy_async<kSlot>(to_shared + pass * kLineBytes, from + pass * kLineBytes);
      }
    }
  }
}

// The same for scales that lie apart: a word a thread where the words are whole, else a byte.
__device__ __forceinline__ void stage_scales(const GatherRowsParams& p, const Plan& plan, int count) {
  const int64_t* ids = reinterpret_cast<const int64_t*>(shared + plan.ids_at);
  const RowSource& s = p.source;
  const bool words = (reinterpret_cast<uintptr_t>(s.scales) | s.scale_stride_bytes | plan.scale_bytes) % 4 == 0;
  const int step = words ? 4 : 1, lanes = words ? plan.scale_bytes / 4 : plan.scale_bytes;
  // a row has at most 64 words of scales: rows go over warps, words over lanes
  for (int r = threadIdx.x / 8; r < count; r += kThreads / 8) {
    const int64_t id = ids[r];
    unsigned char* to = shared + plan.scales_at + r * plan.scale_pitch;
    for (int lane = threadIdx.x % 8; lane < lanes; lane += 8) {
      const std::byte* from = s.scales + id * s.scale_stride_bytes + lane * step;
      if (!words) {
        to[lane] = id == kNoRow ? 0 : static_cast<unsigned char>(*from);
      } else if (id == kNoRow) {
        clear<4>(to + lane * 4);
      } else {
        copy_async<4>(static_cast<uint32_t>(__cvta_generic_to_shared(to)) + lane * 4, from);
      }
    }
  }
}

// kCount elements from `element` on of a row in shared memory, decoded to float.
template <int kCount>
__device__ __forceinline__ void decode(const RowSource& s, const unsigned char* row, const unsigned char* scales,
                                       int element, float tensor_scale, float* values) {
  switch (s.format) {
    case RowFormat::kF32:
      return load_floats<DType::kF32, kCount>(row + 4 * element, values);
    case RowFormat::kBf16:
      return load_floats<DType::kBf16, kCount>(row + 2 * element, values);
    case RowFormat::kF16:
      return load_floats<DType::kF16, kCount>(row + 2 * element, values);
    default:
      break;
  }
  uint32_t words[kCount / 4];
  load_words<kCount / 4>(row + element, words);
  float scale = tensor_scale;
  if (s.format == RowFormat::kInt8Group32) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) unpack_int8(words[i], values + 4 * i);
    scale = reinterpret_cast<const float*>(scales)[element / kScaleBlock];
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) unpack_fp8(words[i], values + 4 * i);
    if (s.format != RowFormat::kFp8Tensor) scale = ue8m0_to_float(scales[element / kScaleBlock], s.zero_scale_is_zero);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] *= scale;
}

__device__ __forceinline__ bool is_format_of(RowFormat format, DType dtype) {
  return (format == RowFormat::kF32 && dtype == DType::kF32) || (format == RowFormat::kBf16 && dtype == DType::kBf16) ||
         (format == RowFormat::kF16 && dtype == DType::kF16);
}

// Writes a tile of stored rows: 16-byte vectors that may straddle rows, and what is left of the last one word by word.
__device__ __forceinline__ void write_stored(const Plan& plan, std::byte* out, int count) {
  const int bytes = count * plan.row_bytes;
  for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16) {
    if (at + 16 <= bytes) {
      *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(shared + at);
    } else {
      for (int i = at; i < bytes; i += 4)
        *reinterpret_cast<uint32_t*>(out + i) = *reinterpret_cast<const uint32_t*>(shared + i);
    }
  }
}

// Decodes a tile; output rows are dense, so that they are one stretch of 16-byte vectors.
template <DType kOut>
__device__ __forceinline__ void write_decoded(const GatherRowsParams& p, const Plan& plan, std::byte* out, int count) {
  constexpr int kCount = kOut == DType::kF32 ? 4 : 8;
  const RowSource& s = p.source;
  const bool copy = is_format_of(s.format, kOut), packed = s.format == RowFormat::kFp8Block32Packed;
  const float tensor_scale = s.format == RowFormat::kFp8Tensor ? *reinterpret_cast<const float*>(s.scales) : 0;
  const int64_t* ids = reinterpret_cast<const int64_t*>(shared + plan.ids_at);
  for (int i = threadIdx.x; i < count * plan.vectors; i += kThreads) {
    const int r = static_cast<int>(__umulhi(i, plan.vectors_inverse)), vector = i - r * plan.vectors;
    const unsigned char* row = shared + r * plan.row_pitch;
    if (copy) {
      *reinterpret_cast<uint4*>(out + i * 16) = *reinterpret_cast<const uint4*>(row + vector * 16);
      continue;
    }
    const unsigned char* scales = packed ? row + s.row_dim : shared + plan.scales_at + r * plan.scale_pitch;
    float values[kCount];
    // a scale of NaN or below zero must not touch the zeros of a row that is not there
    decode<kCount>(s, row, scales, vector * kCount, ids[r] == kNoRow ? 0.0F : tensor_scale, values);
    store_floats<kOut>(out + i * 16, values);
  }
}

template <DType kOut, bool kAsStored>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const GatherRowsParams p, const Plan plan) {
  const int64_t out_row_bytes = kAsStored ? plan.row_bytes : int64_t{plan.vectors} * kOutVectorBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * plan.rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * plan.rows; first < p.row_ids.count; first += step) {
    const int count = static_cast<int>(min(static_cast<int64_t>(plan.rows), p.row_ids.count - first));
    for (int r = threadIdx.x; r < count; r += kThreads) {
      reinterpret_cast<int64_t*>(shared + plan.ids_at)[r] = checked_id(p, first + r, true);
    }
    __syncthreads();
    switch (plan.slot_bytes) {
      case 16:
        stage_rows<16>(p, plan, count);
        break;
      case 8:
        stage_rows<8>(p, plan, count);
        break;
      default:
        stage_rows<4>(p, plan, count);
        break;
    }
    if (plan.scale_bytes > 0) stage_scales(p, plan, count);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if constexpr (kAsStored) {
      write_stored(plan, p.out + first * out_row_bytes, count);
    } else {
      write_decoded<kOut>(p, plan, p.out + first * out_row_bytes, count);
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
      return static_cast<float>(static_cast<int8_t>(byte(row + element))) *
             load_bytes<float>(scales + element / kScaleBlock * 4);
    default:
      break;
  }
  return fp8_e4m3_to_float(byte(row + element)) *
         ue8m0_to_float(byte(scales + element / kScaleBlock), s.zero_scale_is_zero);
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
  const int rows_a_thread = static_cast<int>(ceil_div(kLoadsInFlight * kLineBytes, row_bytes));
  plan->rows = groups * (rows_a_thread < kMaxRowsAThread ? rows_a_thread : kMaxRowsAThread);
  // stored rows stay dense, and whole 16-byte vectors long in sum, so that the output is one stretch
  plan->row_pitch = p.as_stored ? plan->row_bytes : static_cast<int>(ceil_div(row_bytes, 16) * 16);
  plan->scale_bytes = packed ? 0 : static_cast<int>(row_scale_bytes(s.format, s.row_dim));
  plan->scale_pitch = static_cast<int>(ceil_div(plan->scale_bytes, 4) * 4);
  plan->vectors = static_cast<int>(out_bytes / kOutVectorBytes);
  plan->vectors_inverse =
      plan->vectors == 0 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + plan->vectors - 1) / plan->vectors);
  plan->scales_at = static_cast<int>(ceil_div(int64_t{plan->rows} * plan->row_pitch, 16) * 16);
  plan->ids_at = static_cast<int>(plan->scales_at + ceil_div(int64_t{plan->rows} * plan->scale_pitch, 16) * 16);
  plan->shared_bytes = plan->ids_at + plan->rows * 8;
  // a tile of stored rows must begin on a 16-byte boundary of the output
  return plan->shared_bytes <= kMaxSharedBytes && (!p.as_stored || int64_t{plan->rows} * row_bytes % 16 == 0);
}

template <DType kOut, bool kAsStored>
void launch(const GatherRowsParams& p, cudaStream_t stream) {
  Plan plan{};
  const bool staged = make_plan(p, &plan);
  int64_t blocks = staged ? ceil_div(p.row_ids.count, plan.rows) : p.row_ids.count;
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
