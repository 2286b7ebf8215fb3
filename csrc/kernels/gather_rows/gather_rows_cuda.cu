// CUDA kernels of gather_rows. Contract: gather_rows.h.
//
// Mapping  a block takes a tile of rows. A group of lanes reads a row as it lies in memory, a 128-byte line a time, to
//          shared memory (nothing waits until the whole tile is on its way). Then the block writes the tile, 16 bytes a
//          thread: as it lies there, or decoded. A batch so small that a warp a row fills no GPU waits less without the
//          tiles: a warp carries a row from memory to memory. Another kernel, by element, takes what has no alignment.
// Traffic  every sector of a row once, the output once, 4 or 8 B an id. Over PCIe the reads are 128-byte requests.
// Limits   tiles of rows up to kMaxStagedBytes, longer ones a warp a row; any row for the kernel by element.
#include <algorithm>

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "common/stored_row_cuda.h"
#include "kernels/gather_rows/gather_rows.h"
#include "kernels/gather_rows/gather_rows_stage_cuda.h"
#include "kernels/gather_rows/gather_rows_warp_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kBlocksPerSm = 32;       // as many as 2,048 threads allow
constexpr int kLoadsInFlight = 8;      // of a thread, at least
constexpr int kMaxLoadsInFlight = 64;  // more only costs shared memory
constexpr int64_t kMaxRowsAThread = 32;
constexpr int kMaxStagedBytes = 2048;
constexpr int kResidentWarps = 64;  // of a multiprocessor

// Calls write(first, count, absent) with each tile of the block in shared memory; absent: some of its rows are not there.
template <bool kScaleRows, class Write>
__device__ __forceinline__ void for_each_tile(const GatherRowsParams& p, const Plan& plan, const Write& write) {
  const int64_t step = int64_t{gridDim.x} * plan.rows;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * plan.rows; first < p.row_ids.count; first += step) {
    const int count = static_cast<int>(min(int64_t{plan.rows}, p.row_ids.count - first));
    const bool absent = __syncthreads_or(stage_ids<kScaleRows>(p, plan, first, count));
    stage_rows(plan, count);
    if (kScaleRows && plan.scale_bytes > 0) stage_scales(p, plan, count);  // of packed rows they are behind the values
    if (absent) clear_absent(plan, count);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    write(first, count, absent);
    if (first + step < p.row_ids.count) __syncthreads();  // the next tile overwrites what this one reads
  }
}

// Rows as they are. They lie in shared memory as in the output: 16-byte vectors may straddle rows, and a last one may be
// short.
__global__ void __launch_bounds__(kThreads) gather_rows_copy_kernel(const GatherRowsParams p, const Plan plan) {
  constexpr int kCopiesAtOnce = 8, kTurn = kThreads * kVectorBytes;
  for_each_tile<false>(p, plan, [&](int64_t first, int count, bool) {
    const int bytes = count * plan.row_bytes;
    int at = threadIdx.x * kVectorBytes;
    const unsigned char* from = shared + at;
    std::byte* to = p.out + first * plan.row_bytes + at;
#pragma unroll 1
    for (; at + (kCopiesAtOnce - 1) * kTurn + kVectorBytes <= bytes; at += kCopiesAtOnce * kTurn) {
      uint4 words[kCopiesAtOnce];
#pragma unroll
      for (int i = 0; i < kCopiesAtOnce; ++i) words[i] = *reinterpret_cast<const uint4*>(from + i * kTurn);
#pragma unroll
      for (int i = 0; i < kCopiesAtOnce; ++i) *reinterpret_cast<uint4*>(to + i * kTurn) = words[i];
      from += kCopiesAtOnce * kTurn;
      to += kCopiesAtOnce * kTurn;
    }
#pragma unroll 1
    for (; at + kVectorBytes <= bytes; at += kTurn, from += kTurn, to += kTurn) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
#pragma unroll 1
    for (; at < bytes; at += 4, from += 4, to += 4) {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    }
  });
}

// Zeros for the rows that are not there, over what the block has written of the tile.
__device__ __forceinline__ void clear_output(const Plan& plan, std::byte* tile, int count) {
  __syncthreads();
#pragma unroll 1
  for (int r = 0; r < count; ++r) {
    if (!is_absent(plan, r)) continue;
    auto* row = reinterpret_cast<uint4*>(tile) + r * plan.vectors;
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.vectors; i += kThreads) row[i] = make_uint4(0, 0, 0, 0);
  }
}

// Decoded rows. A thread keeps its place in the row and walks the rows of the tile.
template <DType kOut, RowFormat kFormat>
__global__ void __launch_bounds__(kThreads) gather_rows_decode_kernel(const GatherRowsParams p, const Plan plan) {
  constexpr int kCount = kVectorBytes / dtype_bytes(kOut);
  constexpr bool kTensor = kFormat == RowFormat::kFp8Tensor;
  const float tensor_scale = kTensor ? *reinterpret_cast<const float*>(p.source.scales) : 0.0F;
  const int first_row = static_cast<int>(threadIdx.x) * plan.lanes_inverse >> 16;
  const int lane = threadIdx.x - first_row * plan.vector_lanes, rows_at_once = plan.rows_at_once;
  for_each_tile<has_blocks(kFormat)>(p, plan, [&](int64_t first, int count, bool absent) {
    std::byte* tile = p.out + first * plan.vectors * kVectorBytes;
#pragma unroll 1
    for (int vector = lane; vector < plan.vectors; vector += plan.vector_lanes) {
      const unsigned char* row = shared + first_row * plan.row_pitch;
      std::byte* out = tile + (first_row * plan.vectors + vector) * kVectorBytes;
      const auto write = [&] {
        float values[kCount];
        decode<kFormat, kCount>(p.source, row, row + p.source.row_dim, vector * kCount, tensor_scale, values);
        store_floats<kOut>(out, values);
        row += rows_at_once * plan.row_pitch;
        out += rows_at_once * plan.vectors * kVectorBytes;
      };
      int left = first_row < rows_at_once ? count - first_row : 0;
#pragma unroll 1
      for (; left > 3 * rows_at_once; left -= 4 * rows_at_once) {
#pragma unroll
        for (int i = 0; i < 4; ++i) write();
      }
#pragma unroll 1
      for (; left > 0; left -= rows_at_once) write();
    }
    // a scale of NaN or below zero must not touch the zeros of a row that is not there
    if (kTensor && absent) clear_output(plan, tile, count);
  });
}

// One block a row, one element a thread at a time.
template <DType kOut>
__global__ void __launch_bounds__(kThreads) gather_rows_by_element_kernel(const GatherRowsParams p) {
  const int elements = p.source.row_dim;
  for (int64_t i = blockIdx.x; i < p.row_ids.count; i += gridDim.x) {
    const int64_t id = p.row_ids[i];
    const bool there = is_row(p, id);
    if (!there && id != kNoRow && threadIdx.x == 0) count_error(p.error_count);
    for (int e = threadIdx.x; e < elements; e += kThreads) {
      const float value = there ? decode_element(p.source, id, e) : 0.0F;
      if constexpr (kOut == DType::kF32) {
        reinterpret_cast<float*>(p.out)[i * elements + e] = value;
      } else {
        reinterpret_cast<uint16_t*>(p.out)[i * elements + e] = static_cast<uint16_t>(pack_pair<kOut>(value, 0.0F));
      }
    }
  }
}

// The same for rows as they are, a byte a thread.
__global__ void __launch_bounds__(kThreads) gather_rows_by_byte_kernel(const GatherRowsParams p, int row_bytes) {
  for (int64_t i = blockIdx.x; i < p.row_ids.count; i += gridDim.x) {
    const int64_t id = p.row_ids[i];
    const bool there = is_row(p, id);
    if (!there && id != kNoRow && threadIdx.x == 0) count_error(p.error_count);
    for (int e = threadIdx.x; e < row_bytes; e += kThreads) {
      p.out[i * row_bytes + e] = there ? p.source.row(id)[e] : std::byte{0};
    }
  }
}

// Whether output rows are the bytes of stored rows.
bool copies(const GatherRowsParams& p) {
  const RowFormat as_out = p.out_dtype == DType::kF32    ? RowFormat::kF32
                           : p.out_dtype == DType::kBf16 ? RowFormat::kBf16
                                                         : RowFormat::kF16;
  return p.as_stored || p.source.format == as_out;
}

// Lays out the shared memory for tiles of so many rows a thread.
void place(int rows_a_thread, Plan* plan) {
  const int groups = kThreads / (kLineBytes / plan->slot_bytes);
  plan->rows = groups * rows_a_thread;
  plan->staged_rows = static_cast<int>(ceil_div(rows_a_thread, kRowsAtOnce)) * kRowsAtOnce * groups;
  plan->staged_at = static_cast<int>(ceil_div(int64_t{plan->rows} * plan->row_pitch, 16)) * 16;
  plan->ids_at = plan->staged_at + plan->staged_rows * static_cast<int>(sizeof(StagedRow));
  plan->shared_bytes = plan->ids_at + (plan->keeps_ids ? plan->staged_rows * 8 : 0);
}

// Whether rows and output are aligned for more than a byte or element at a time, and what follows for a row.
bool plan_row(const GatherRowsParams& p, Plan* plan) {
  const RowSource& s = p.source;
  const int64_t row_bytes = row_value_bytes(s.format, s.row_dim), scale_bytes = row_scale_bytes(s.format, s.row_dim);
  const int64_t out_bytes = copies(p) ? row_bytes : int64_t{s.row_dim} * dtype_bytes(p.out_dtype);
  const int aligned = lowest_bit(reinterpret_cast<uintptr_t>(s.rows) | static_cast<uint64_t>(s.row_stride_bytes));
  plan->slot_bytes = std::min({aligned, lowest_bit(static_cast<uint64_t>(row_bytes)), 16});
  if (plan->slot_bytes < 4 || row_bytes > INT32_MAX || reinterpret_cast<uintptr_t>(p.out) % kVectorBytes != 0) return false;
  if (!copies(p) && out_bytes % kVectorBytes != 0) return false;
  const int64_t lead = aligned >= kLineBytes ? 0 : kLineBytes - aligned;  // of a row into its first line, at most
  plan->aligned_bytes = std::min(aligned, kVectorBytes);
  plan->lines = static_cast<int>(ceil_div(lead + row_bytes, kLineBytes));
  plan->row_bytes = static_cast<int>(row_bytes);
  plan->scale_bytes = static_cast<int>(scale_bytes);
  plan->keeps_ids = has_blocks(s.format) && !copies(p);
  plan->scale_lanes = scale_bytes % 32 == 0 ? 8 : 2;
  plan->row_pitch = static_cast<int>(copies(p) ? row_bytes : ceil_div(row_bytes + scale_bytes, 16) * 16);
  plan->vectors = static_cast<int>(out_bytes / kVectorBytes);
  plan->vector_lanes = std::clamp(plan->vectors, 1, kThreads);
  plan->rows_at_once = kThreads / plan->vector_lanes;
  plan->lanes_inverse = static_cast<int>(ceil_div(1 << 16, plan->vector_lanes));
  return true;
}

// Whether tiles of such rows can be staged, and how.
bool plan_tiles(const GatherRowsParams& p, Plan* plan) {
  const int64_t row_bytes = plan->row_bytes, out_bytes = copies(p) ? row_bytes : int64_t{plan->vectors} * kVectorBytes;
  if (row_bytes > kMaxStagedBytes) return false;
  const int groups = kThreads / (kLineBytes / plan->slot_bytes);
  int rows_a_thread = static_cast<int>(std::min(ceil_div(kMaxLoadsInFlight * kLineBytes, row_bytes), kMaxRowsAThread));
  // a small batch goes over many blocks rather than deep into few, as long as a thread has 8 loads in flight
  while (rows_a_thread > 1 && ceil_div(p.row_ids.count, groups * rows_a_thread) < 2 * int64_t{num_multiprocessors()} &&
         rows_a_thread / 2 * plan->lines >= kLoadsInFlight) {
    rows_a_thread /= 2;
  }
  for (place(rows_a_thread, plan); plan->shared_bytes > kMaxSharedBytes && rows_a_thread > 1;) place(rows_a_thread /= 2, plan);
  // a tile of copied rows must begin on a 16-byte boundary of the output
  return plan->shared_bytes <= kMaxSharedBytes && int64_t{plan->rows} * out_bytes % kVectorBytes == 0;
}

template <DType kOut>
auto decode_kernel(RowFormat format) {
  switch (format) {
    case RowFormat::kF32:
      return gather_rows_decode_kernel<kOut, RowFormat::kF32>;
    case RowFormat::kBf16:
      return gather_rows_decode_kernel<kOut, RowFormat::kBf16>;
    case RowFormat::kF16:
      return gather_rows_decode_kernel<kOut, RowFormat::kF16>;
    case RowFormat::kFp8Tensor:
      return gather_rows_decode_kernel<kOut, RowFormat::kFp8Tensor>;
    case RowFormat::kInt8Group32:
      return gather_rows_decode_kernel<kOut, RowFormat::kInt8Group32>;
    default:  // in shared memory the scales lie behind the values
      return gather_rows_decode_kernel<kOut, RowFormat::kFp8Block32Packed>;
  }
}

unsigned grid_of(const GatherRowsParams& p, int64_t blocks) {
  return static_cast<unsigned>(std::min({blocks, kMaxGridX, p.max_blocks > 0 ? p.max_blocks : kMaxGridX}));
}

// Whether there is a warp for each row at once, so that a row a warp leaves nothing to wait for.
bool fits_warps(const GatherRowsParams& p) {
  const int64_t warps = int64_t{kResidentWarps} * num_multiprocessors();
  return p.row_ids.count <= (p.max_blocks > 0 ? std::min<int64_t>(warps, p.max_blocks * (kThreads / kWarp)) : warps);
}

// Whether what a thread decodes at once is aligned.
bool decodes_from_memory(const GatherRowsParams& p, const Plan& plan) {
  if (copies(p)) return true;
  const int64_t elements = kVectorBytes / dtype_bytes(p.out_dtype);
  const int64_t load_bytes =
      std::min<int64_t>(elements * row_value_bytes(p.source.format, kScaleBlock) / kScaleBlock, kVectorBytes);
  const bool scale_words = (reinterpret_cast<uintptr_t>(p.source.scales) | p.source.scale_stride_bytes) % 4 == 0;
  return load_bytes <= plan.aligned_bytes && (p.source.format != RowFormat::kInt8Group32 || scale_words);
}

template <DType kOut>
void launch(const GatherRowsParams& p, cudaStream_t stream) {
  Plan plan{};
  const bool aligned = plan_row(p, &plan), tiles = aligned && plan_tiles(p, &plan);
  const int64_t resident = int64_t{kBlocksPerSm} * num_multiprocessors();
  if (aligned && (fits_warps(p) || !tiles) && decodes_from_memory(p, plan)) {
    const unsigned grid = grid_of(p, std::min(ceil_div(p.row_ids.count, kThreads / kWarp), resident));
    gather_rows_warp_per_row_kernel<kOut><<<grid, kThreads, 0, stream>>>(p, plan, copies(p));
  } else if (tiles) {
    // each block walks several tiles and sets up once
    const unsigned grid = grid_of(p, std::min(ceil_div(p.row_ids.count, plan.rows), resident));
    const auto kernel = copies(p) ? gather_rows_copy_kernel : decode_kernel<kOut>(p.source.format);
    kernel<<<grid, kThreads, plan.shared_bytes, stream>>>(p, plan);
  } else if (copies(p)) {
    const int row_bytes = static_cast<int>(row_value_bytes(p.source.format, p.source.row_dim));
    gather_rows_by_byte_kernel<<<grid_of(p, p.row_ids.count), kThreads, 0, stream>>>(p, row_bytes);
  } else {
    gather_rows_by_element_kernel<kOut><<<grid_of(p, p.row_ids.count), kThreads, 0, stream>>>(p);
  }
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void gather_rows_cuda(const GatherRowsParams& p, void* stream) {
  check_params(p);
  if (p.row_ids.count == 0) return;  // an empty grid is a launch error, an empty batch is not
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.out_dtype, [&](auto type) { launch<type.value>(p, on); });
}

}  // namespace engram_kernels
