// CUDA kernels of gather_rows. Contract: gather_rows.h. Rows of which nothing is staged: gather_rows_direct_cuda.cu.
//
//   tiles        a block carries a tile of rows:
//                1. stage  a group of lanes reads a row as it lies in memory, one 128-byte line at a time, to shared memory;
//                          nothing waits until the whole tile is on its way
//                2. write  the block writes the tile, 16 bytes per thread: as it lies there, or decoded
//   by element   an element or byte per thread, for what has no alignment
// Traffic  every sector of a row once, the output once, 4 or 8 bytes per id. Over PCIe the reads are 128-byte requests.
// Limits   tiles of rows up to kMaxStagedBytes; longer ones take a warp per row; any row for the kernels by element.
#include "kernels/gather_rows/gather_rows_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kRowsAtOnce = 8;         // of a group of lanes, so that a thread has 8 loads in flight at least
constexpr int kLoadsInFlight = 8;      // of a thread, at least
constexpr int kMaxLoadsInFlight = 64;  // more only costs shared memory
constexpr int64_t kMaxRowsPerThread = 32;
constexpr int kMaxStagedBytes = 2048;

extern __shared__ __align__(16) unsigned char shared[];

__device__ __forceinline__ StagedRow* staged(const GatherRowsPlan& plan) {
  return reinterpret_cast<StagedRow*>(shared + plan.staged_at);
}
__device__ __forceinline__ int64_t* staged_ids(const GatherRowsPlan& plan) {
  return reinterpret_cast<int64_t*>(shared + plan.ids_at);
}
__device__ __forceinline__ bool is_absent(const GatherRowsPlan& plan, int r) {
  return static_cast<int>(staged(plan)[r].w) == kAbsent;
}

// Looks the tile's ids up. Returns whether this thread met one without a row, behind the last one too.
template <bool kKeepIds>
__device__ __forceinline__ bool stage_ids(const GatherRowsParams& p, const GatherRowsPlan& plan, int64_t first, int count) {
  bool absent = false;
#pragma unroll 1
  for (int r = threadIdx.x; r < plan.staged_rows; r += kThreads) {
    const int64_t id = r < count ? p.row_ids[first + r] : kNoRow;
    const bool there = is_row(p, id);
    if (!there && id != kNoRow) count_error(p.error_count);
    const auto row = reinterpret_cast<uint64_t>(p.source.row(id));
    const int into_line = static_cast<int>(row % kLineBytes);
    const uint64_t line = row - into_line;
    staged(plan)[r] = make_uint4(static_cast<uint32_t>(line), static_cast<uint32_t>(line >> 32), r * plan.row_pitch - into_line,
                                 there ? into_line : kAbsent);
    if constexpr (kKeepIds) staged_ids(plan)[r] = id;
    absent |= !there;
  }
  return absent;
}

__device__ __forceinline__ uint32_t shared_address() { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Starts the reads of kLines lines of every row of the tile, from line `first_line` of the row on.
template <int kWordBytes, int kLines>
__device__ __forceinline__ void stage_lines(const GatherRowsPlan& plan, int count, int first_line) {
  constexpr int kLanes = kLineBytes / kWordBytes, kGroups = kThreads / kLanes;
  const int lane_bytes = threadIdx.x % kLanes * kWordBytes + first_line * kLineBytes;
  const uint32_t base = shared_address() + lane_bytes;
  const StagedRow* next = staged(plan) + threadIdx.x / kLanes;
#pragma unroll 1
  for (int r = threadIdx.x / kLanes; r < count; r += kRowsAtOnce * kGroups, next += kRowsAtOnce * kGroups) {
    StagedRow words[kRowsAtOnce];
#pragma unroll
    for (int n = 0; n < kRowsAtOnce; ++n) words[n] = next[n * kGroups];
#pragma unroll
    for (int n = 0; n < kRowsAtOnce; ++n) {
      const auto* from = reinterpret_cast<const std::byte*>(uint64_t{words[n].y} << 32 | words[n].x) + lane_bytes;
      const uint32_t to = base + words[n].z;
      // where in its row this thread's word of the first line lies; far behind the end if the row is absent
      const int at = lane_bytes - static_cast<int>(words[n].w);
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const int end = plan.row_bytes - i * kLineBytes;
        // only the first line has words before the row
        const bool in_row = i == 0 ? static_cast<uint32_t>(at) < static_cast<uint32_t>(end) : at < end;
        copy_async<kWordBytes>(to + i * kLineBytes, from + i * kLineBytes, in_row);
      }
    }
  }
}

__device__ __forceinline__ void stage_rows(const GatherRowsPlan& plan, int count) {
  if (plan.word_bytes == 16 && plan.lines <= 2) return stage_lines<16, 2>(plan, count, 0);
  if (plan.word_bytes == 8 && plan.lines <= 3) return stage_lines<8, 3>(plan, count, 0);
#pragma unroll 1
  for (int line = 0; line < plan.lines; line += 4) {
    if (plan.word_bytes == 16) stage_lines<16, 4>(plan, count, line);
    if (plan.word_bytes == 8) stage_lines<8, 4>(plan, count, line);
    if (plan.word_bytes == 4) stage_lines<4, 4>(plan, count, line);
  }
}

// The same for scales that lie apart: words where they are aligned, else bytes.
__device__ __forceinline__ void stage_scales(const GatherRowsParams& p, const GatherRowsPlan& plan, int count) {
  const RowSource& s = p.source;
  const bool words = (reinterpret_cast<uintptr_t>(s.scales) | s.scale_stride_bytes | plan.scale_bytes) % 4 == 0;
  const int step = words ? 4 : 1, lane = threadIdx.x & (plan.scale_lanes - 1);
#pragma unroll 1
  for (int r = threadIdx.x / plan.scale_lanes; r < count; r += kThreads / plan.scale_lanes) {
    if (is_absent(plan, r)) continue;
    const std::byte* from = s.scales + staged_ids(plan)[r] * s.scale_stride_bytes;
    const int to = r * plan.row_pitch + plan.row_bytes;
#pragma unroll 1
    for (int at = lane * step; at < plan.scale_bytes; at += plan.scale_lanes * step) {
      if (words) {
        copy_async<4>(shared_address() + to + at, from + at, true);
      } else {
        shared[to + at] = static_cast<unsigned char>(from[at]);
      }
    }
  }
}

// Zeros for the rows that are not there, values and scales.
__device__ __forceinline__ void clear_absent(const GatherRowsPlan& plan, int count) {
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < count; r += kThreads / kWarp) {
    if (!is_absent(plan, r)) continue;
    auto* row = reinterpret_cast<uint32_t*>(shared + r * plan.row_pitch);
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < plan.row_pitch / 4; i += kWarp) row[i] = 0;
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Calls write(first, count, absent) with each tile of the block in shared memory; absent: some of its rows are not there.
template <bool kScaleRows, class Write>
__device__ __forceinline__ void for_each_tile(const GatherRowsParams& p, const GatherRowsPlan& plan, const Write& write) {
  const int64_t step = int64_t{gridDim.x} * plan.rows;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * plan.rows; first < p.row_ids.count; first += step) {
    const int count = static_cast<int>(min(int64_t{plan.rows}, p.row_ids.count - first));
    const bool absent = __syncthreads_or(stage_ids<kScaleRows>(p, plan, first, count));
    stage_rows(plan, count);
    if (kScaleRows && plan.scale_bytes > 0) stage_scales(p, plan, count);  // of packed rows they are behind the values
    if (absent) clear_absent(plan, count);
    wait_for_copies();
    __syncthreads();
    write(first, count, absent);
    if (first + step < p.row_ids.count) __syncthreads();  // the next tile overwrites what this one reads
  }
}

// Rows as they are. They lie in shared memory as in the output: 16-byte vectors may straddle rows, and a last one may be
// short.
__global__ void __launch_bounds__(kThreads) gather_rows_copy_kernel(const GatherRowsParams p, const GatherRowsPlan plan) {
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
__device__ __forceinline__ void clear_output(const GatherRowsPlan& plan, std::byte* tile, int count) {
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
__global__ void __launch_bounds__(kThreads) gather_rows_decode_kernel(const GatherRowsParams p, const GatherRowsPlan plan) {
  constexpr int kCount = kVectorBytes / dtype_bytes(kOut);
  constexpr bool kTensor = traits_of(kFormat).scale == RowScale::kTensor;
  const float tensor_scale = tensor_scale_of<kFormat>(p.source);
  const int values_bytes = static_cast<int>(value_bytes(kFormat, p.source.row_dim));
  const int first_row = static_cast<int>(threadIdx.x) * plan.lanes_inverse >> 16;
  const int lane = threadIdx.x - first_row * plan.vector_lanes, rows_at_once = plan.rows_at_once;
  for_each_tile<has_row_scales(kFormat)>(p, plan, [&](int64_t first, int count, bool absent) {
    std::byte* tile = p.out + first * plan.vectors * kVectorBytes;
#pragma unroll 1
    for (int vector = lane; vector < plan.vectors; vector += plan.vector_lanes) {
      const unsigned char* row = shared + first_row * plan.row_pitch;
      std::byte* out = tile + (first_row * plan.vectors + vector) * kVectorBytes;
      const auto write = [&] {
        float values[kCount];
        decode<kFormat, kCount>(p.source, row, row + values_bytes, vector * kCount, tensor_scale, values);
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
    if ((kTensor || has_table_scale(kFormat)) && absent) clear_output(plan, tile, count);
  });
}

// ---- by element ------------------------------------------------------------------------------------------------------

// A block per row, an element per thread at a time.
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

// Rows as they are: a block per row, a byte per thread at a time.
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

// Lays out the shared memory for tiles of so many rows per thread.
void lay_out_shared(int rows_per_thread, GatherRowsPlan* plan) {
  const int groups = kThreads / (kLineBytes / plan->word_bytes);
  plan->rows = groups * rows_per_thread;
  plan->staged_rows = static_cast<int>(ceil_div(rows_per_thread, kRowsAtOnce)) * kRowsAtOnce * groups;
  plan->staged_at = static_cast<int>(ceil_div(int64_t{plan->rows} * plan->row_pitch, 16)) * 16;
  plan->ids_at = plan->staged_at + plan->staged_rows * static_cast<int>(sizeof(StagedRow));
  plan->shared_bytes = plan->ids_at + (plan->keeps_ids ? plan->staged_rows * 8 : 0);
}

// Whether rows and output are aligned for more than a byte or element at a time, and what follows for a row.
bool plan_row(const GatherRowsParams& p, GatherRowsPlan* plan) {
  const RowSource& s = p.source;
  const int64_t row_bytes = row_value_bytes(s.format, s.row_dim), scale_bytes = row_scale_bytes(s.format, s.row_dim);
  const int64_t out_bytes = copies(p) ? row_bytes : int64_t{s.row_dim} * dtype_bytes(p.out_dtype);
  const int aligned = lowest_bit(reinterpret_cast<uintptr_t>(s.rows) | static_cast<uint64_t>(s.row_stride_bytes));
  plan->word_bytes = std::min({aligned, lowest_bit(static_cast<uint64_t>(row_bytes)), 16});
  if (plan->word_bytes < 4 || row_bytes > INT32_MAX || reinterpret_cast<uintptr_t>(p.out) % kVectorBytes != 0) return false;
  if (!copies(p) && out_bytes % kVectorBytes != 0) return false;
  const int64_t lead = aligned >= kLineBytes ? 0 : kLineBytes - aligned;  // of a row into its first line, at most
  plan->aligned_bytes = std::min(aligned, kVectorBytes);
  plan->lines = static_cast<int>(ceil_div(lead + row_bytes, kLineBytes));
  plan->row_bytes = static_cast<int>(row_bytes);
  plan->scale_bytes = static_cast<int>(scale_bytes);
  plan->keeps_ids = has_row_scales(s.format) && !copies(p);
  plan->scale_lanes = scale_bytes % 32 == 0 ? 8 : scale_bytes % 16 == 0 ? 4 : 2;
  plan->row_pitch = static_cast<int>(copies(p) ? row_bytes : ceil_div(row_bytes + scale_bytes, 16) * 16);
  plan->vectors = static_cast<int>(out_bytes / kVectorBytes);
  plan->vector_lanes = std::clamp(plan->vectors, 1, kThreads);
  plan->rows_at_once = kThreads / plan->vector_lanes;
  plan->lanes_inverse = static_cast<int>(ceil_div(1 << 16, plan->vector_lanes));
  return true;
}

// Whether tiles of such rows can be staged, and how.
bool plan_tiles(const GatherRowsParams& p, GatherRowsPlan* plan) {
  const int64_t row_bytes = plan->row_bytes, out_bytes = copies(p) ? row_bytes : int64_t{plan->vectors} * kVectorBytes;
  if (row_bytes > kMaxStagedBytes) return false;
  const int groups = kThreads / (kLineBytes / plan->word_bytes);
  int rows_per_thread = static_cast<int>(std::min(ceil_div(kMaxLoadsInFlight * kLineBytes, row_bytes), kMaxRowsPerThread));
  // a small batch goes over many blocks rather than deep into few, as long as a thread has 8 loads in flight
  while (rows_per_thread > 1 && ceil_div(p.row_ids.count, groups * rows_per_thread) < 2 * int64_t{num_multiprocessors()} &&
         rows_per_thread / 2 * plan->lines >= kLoadsInFlight) {
    rows_per_thread /= 2;
  }
  for (lay_out_shared(rows_per_thread, plan); plan->shared_bytes > kMaxSharedBytes && rows_per_thread > 1;)
    lay_out_shared(rows_per_thread /= 2, plan);
  // a tile of copied rows must begin on a 16-byte boundary of the output
  return plan->shared_bytes <= kMaxSharedBytes && int64_t{plan->rows} * out_bytes % kVectorBytes == 0;
}

template <DType kOut>
auto decode_kernel(RowFormat format) {
  void (*kernel)(GatherRowsParams, GatherRowsPlan) = nullptr;
  with_row_decode(format, [&](auto constant) {  // in shared memory the scales lie behind the values
    kernel = gather_rows_decode_kernel<kOut, decltype(constant)::value>;
  });
  return kernel;
}

template <DType kOut>
void launch(const GatherRowsParams& p, cudaStream_t stream) {
  GatherRowsPlan plan{};
  const bool aligned = plan_row(p, &plan), tiles = aligned && plan_tiles(p, &plan);
  if (aligned && gather_rows_direct_cuda(p, plan, tiles, stream)) return;
  if (tiles) {
    // each block walks several tiles and sets up once
    const unsigned grid = grid_of(p, std::min(ceil_div(p.row_ids.count, plan.rows), resident_blocks()));
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
