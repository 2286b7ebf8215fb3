// CUDA kernels of gather_rows. Contract: gather_rows.h.
//
//   tiles        a block carries a tile of rows:
//                1. stage  a group of lanes reads a row as it lies in memory, one 128-byte line at a time, to shared memory;
//                          nothing waits until the whole tile is on its way
//                2. write  the block writes the tile, 16 bytes per thread: as it lies there, or decoded
//   direct       a warp takes kDirectRows fp8 rows with ue8m0 scales at a time from memory through registers to memory: no
//                barrier, and fewer instructions than in tiles
//   warps        a warp carries a row from memory to memory. A batch that fills no GPU so waits less than in tiles, whose
//                barriers take longer than a row takes from memory
//   by element   an element or byte per thread, for what has no alignment
// Traffic  every sector of a row once, the output once, 4 or 8 bytes per id. Over PCIe the reads are 128-byte requests.
// Limits   tiles of rows up to kMaxStagedBytes; longer ones take a warp per row; any row for the kernels by element.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/stored_row_cuda.h"
#include "common/vector_cuda.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 64;           // of many rows each: what a thread does once for a tile is a good part of its work
constexpr int kRowsAtOnce = 8;         // of a group of lanes, so that a thread has 8 loads in flight at least
constexpr int kBlocksPerSm = 32;       // as many as 2,048 threads allow
constexpr int kLoadsInFlight = 8;      // of a thread, at least
constexpr int kMaxLoadsInFlight = 64;  // more only costs shared memory
constexpr int64_t kMaxRowsPerThread = 32;
constexpr int kMaxStagedBytes = 2048;
constexpr int kResidentWarps = 64;  // of a multiprocessor
constexpr int kDirectThreads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kDirectRows = 4;  // of a warp at once: fp8 is decoded in steps, which take registers
#else
constexpr int kDirectRows = 8;
#endif
constexpr int kDirectBlocksPerSm = 4;

// What the launcher derives from the params. In shared memory lie the rows of a tile, each with its scales behind it,
// then the staged rows, then the ids.
struct Plan {
  int aligned_bytes;      // of rows in memory, up to 16
  int word_bytes;         // of one load: 16, 8 or 4
  int lines;              // that a row can touch
  int rows;               // of a tile
  int row_bytes;          // read of a row
  int row_pitch;          // bytes between rows in shared memory
  int scale_bytes;        // of a row's scales that lie apart in memory
  bool keeps_ids;         // for them
  int scale_lanes;        // threads that fetch them
  int vectors;            // 16-byte pieces of an output row
  int vector_lanes;       // threads that write a row
  int rows_at_once;       // that the block writes
  int lanes_inverse;      // 2^16 / vector_lanes, rounded up
  int staged_rows;        // rows, up to whole turns of stage_lines
  int staged_at, ids_at;  // bytes into shared memory
  int shared_bytes;
};

extern __shared__ __align__(16) unsigned char shared[];

__device__ __forceinline__ StagedRow* staged(const Plan& plan) { return reinterpret_cast<StagedRow*>(shared + plan.staged_at); }
__device__ __forceinline__ int64_t* staged_ids(const Plan& plan) { return reinterpret_cast<int64_t*>(shared + plan.ids_at); }
__device__ __forceinline__ bool is_absent(const Plan& plan, int r) { return static_cast<int>(staged(plan)[r].w) == kAbsent; }

__device__ __forceinline__ bool is_row(const GatherRowsParams& p, int64_t id) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(p.source.num_rows);
}

// Looks the tile's ids up. Returns whether this thread met one without a row, behind the last one too.
template <bool kKeepIds>
__device__ __forceinline__ bool stage_ids(const GatherRowsParams& p, const Plan& plan, int64_t first, int count) {
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
__device__ __forceinline__ void stage_lines(const Plan& plan, int count, int first_line) {
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

__device__ __forceinline__ void stage_rows(const Plan& plan, int count) {
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
__device__ __forceinline__ void stage_scales(const GatherRowsParams& p, const Plan& plan, int count) {
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
__device__ __forceinline__ void clear_absent(const Plan& plan, int count) {
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
__device__ __forceinline__ void for_each_tile(const GatherRowsParams& p, const Plan& plan, const Write& write) {
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

// ---- direct ----------------------------------------------------------------------------------------------------------

// A vector of the output: fp8 values times a ue8m0 scale.
template <DType kOut>
__device__ __forceinline__ uint4 scale_fp8(const uint32_t (&words)[kVectorElements<kOut> / 4], uint32_t scale,
                                           bool zero_scale_is_zero) {
  constexpr int kCount = kVectorElements<kOut>;
  float values[kCount];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) unpack_fp8(words[i], values + 4 * i);
  uint32_t out[4];
  if constexpr (kOut == DType::kBf16) {
    // Values of four bits are exact in bf16, and a power of two times them is rounded once, as the float product is.
    const uint32_t bits = max(scale * 0x00800080U, zero_scale_is_zero ? 0U : 0x00400040U);
    const uint32_t factors = scale == 255 ? 0x7FC07FC0U : bits;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = pack_pair<kOut>(values[2 * i], values[2 * i + 1]);
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[i]) : "r"(pair), "r"(factors), "r"(0x80008000U));  // -0: keeps signs
    }
  } else {
    const float factor = unpack_ue8m0(scale, zero_scale_is_zero);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    if constexpr (kOut == DType::kF32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(values[i]);
    } else {
      pack_vector<kOut>(values, out);
    }
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Where a lane's part of a row lies, its values or its scale. The row's number has 32 bits, so that its place is one product.
struct LaneColumn {
  uint64_t first_row;
  uint32_t stride;

  __device__ __forceinline__ LaneColumn(const std::byte* first_row, int64_t stride)
      : first_row(__cvta_generic_to_global(first_row)), stride(static_cast<uint32_t>(stride)) {
    asm("" : "+l"(this->first_row), "+r"(this->stride));  // else its parts are added anew for every row
  }
  __device__ __forceinline__ uint64_t at(uint32_t row) const {
    uint64_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(first_row));
    return address;
  }
};

template <int kWords>
__device__ __forceinline__ void load_global(uint64_t from, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) {
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  } else {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  }
}

// fp8 rows with ue8m0 scales, packed or apart, whose output has at most a vector per lane.
template <DType kOut>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocksPerSm)
    gather_rows_direct_kernel(const GatherRowsParams p, const int vectors) {
  constexpr int kCount = kVectorElements<kOut>, kWords = kCount / 4, kWarps = kDirectThreads / kWarp;
  constexpr uint32_t kNone = ~0U;
  const RowSource& s = p.source;
  const int lane = threadIdx.x % kWarp, element = min(lane, vectors - 1) * kCount;
  const bool has_vector = lane < vectors;
  const LaneColumn values(s.rows + element, s.row_stride_bytes);
  const LaneColumn scales(s.row_scales(0) + element / kUe8m0Block,
                          is_packed(s.format) ? s.row_stride_bytes : s.scale_stride_bytes);
  const int count = static_cast<int>(p.row_ids.count), step = static_cast<int>(gridDim.x) * (kWarps * kDirectRows);
  int first = (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp) * kDirectRows;
  const auto id_at = [&](int at) { return lane < kDirectRows && at + lane < count ? p.row_ids[at + lane] : kNoRow; };
  int64_t id = id_at(first);
#pragma unroll 1
  for (; first < count; first += step) {
    const bool there = is_row(p, id);
    const bool whole = __all_sync(~0U, there || lane >= kDirectRows);
    if (!there && id != kNoRow) count_error(p.error_count);
    const uint32_t row_of_lane = there ? static_cast<uint32_t>(id) : kNone;
    id = id_at(first + step);
    auto* out = reinterpret_cast<uint4*>(p.out) + (int64_t{first} * vectors + lane);
    uint32_t words[kDirectRows][kWords], scale[kDirectRows];
    const auto load = [&](int r, uint32_t row) {
      load_global(values.at(row), words[r]);
      asm volatile("ld.global.u8 %0, [%1];" : "=r"(scale[r]) : "l"(scales.at(row)));
    };
    const auto store = [&](int r) {
      if (has_vector) out[r * vectors] = scale_fp8<kOut>(words[r], scale[r], s.zero_scale_is_zero);
    };
    if (whole) {
#pragma unroll
      for (int r = 0; r < kDirectRows; ++r) load(r, __shfl_sync(~0U, row_of_lane, r));
#pragma unroll
      for (int r = 0; r < kDirectRows; ++r) store(r);
    } else {
#pragma unroll 1
      for (int r = 0; r < min(count - first, kDirectRows); ++r) {
        const uint32_t row = __shfl_sync(~0U, row_of_lane, r);
        if (row != kNone) {
          load(0, row);
          if (has_vector) out[r * vectors] = scale_fp8<kOut>(words[0], scale[0], s.zero_scale_is_zero);
        } else if (has_vector) {
          out[r * vectors] = make_uint4(0, 0, 0, 0);
        }
      }
    }
  }
}

// ---- warps -----------------------------------------------------------------------------------------------------------

// A warp's row to the output, decoded.
template <DType kOut, RowFormat kFormat>
__device__ __forceinline__ void decode_row(const RowSource& s, const std::byte* row, const std::byte* scales, int vectors,
                                           std::byte* out) {
  constexpr int kCount = kVectorBytes / dtype_bytes(kOut);
  const float tensor_scale = tensor_scale_of<kFormat>(s);
#pragma unroll 4
  for (int v = threadIdx.x % kWarp; v < vectors; v += kWarp) {
    float values[kCount];
    decode<kFormat, kCount>(s, reinterpret_cast<const unsigned char*>(row), reinterpret_cast<const unsigned char*>(scales),
                            v * kCount, tensor_scale, values);
    store_floats<kOut>(out + v * kVectorBytes, values);
  }
}

template <class Word>
__device__ __forceinline__ void copy_row(const std::byte* row, int bytes, std::byte* out) {
#pragma unroll 4
  for (int at = threadIdx.x % kWarp * sizeof(Word); at < bytes; at += kWarp * sizeof(Word)) {
    *reinterpret_cast<Word*>(out + at) = row != nullptr ? *reinterpret_cast<const Word*>(row + at) : Word{};
  }
}

// A warp per row, nothing is staged. With `copies`, rows as they are, in words of plan.word_bytes.
template <DType kOut>
__global__ void __launch_bounds__(kThreads)
    gather_rows_warp_per_row_kernel(const GatherRowsParams p, const Plan plan, bool copies) {
  constexpr int kWarps = kThreads / kWarp;
  const RowSource& s = p.source;
  wait_for_predecessor();
#pragma unroll 1
  for (int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; r < p.row_ids.count; r += int64_t{gridDim.x} * kWarps) {
    const int64_t id = p.row_ids[r];
    const bool there = is_row(p, id);
    if (!there && id != kNoRow && threadIdx.x % kWarp == 0) count_error(p.error_count);
    const std::byte* row = there ? s.row(id) : nullptr;
    if (copies) {
      std::byte* out = p.out + r * plan.row_bytes;
      if (plan.word_bytes == 16) copy_row<uint4>(row, plan.row_bytes, out);
      if (plan.word_bytes == 8) copy_row<uint2>(row, plan.row_bytes, out);
      if (plan.word_bytes == 4) copy_row<uint32_t>(row, plan.row_bytes, out);
      continue;
    }
    std::byte* out = p.out + r * plan.vectors * kVectorBytes;
    if (!there) {
      copy_row<uint4>(nullptr, plan.vectors * kVectorBytes, out);
      continue;
    }
    const std::byte* scales = s.row_scales(id);
    with_row_decode(s.format, [&](auto format) { decode_row<kOut, decltype(format)::value>(s, row, scales, plan.vectors, out); });
  }
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

// Whether output rows are the bytes of stored rows.
bool copies(const GatherRowsParams& p) { return p.as_stored || stores(p.source.format, p.out_dtype); }

// Lays out the shared memory for tiles of so many rows per thread.
void lay_out_shared(int rows_per_thread, Plan* plan) {
  const int groups = kThreads / (kLineBytes / plan->word_bytes);
  plan->rows = groups * rows_per_thread;
  plan->staged_rows = static_cast<int>(ceil_div(rows_per_thread, kRowsAtOnce)) * kRowsAtOnce * groups;
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
bool plan_tiles(const GatherRowsParams& p, Plan* plan) {
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
  void (*kernel)(GatherRowsParams, Plan) = nullptr;
  with_row_decode(format, [&](auto constant) {  // in shared memory the scales lie behind the values
    kernel = gather_rows_decode_kernel<kOut, decltype(constant)::value>;
  });
  return kernel;
}

unsigned grid_of(const GatherRowsParams& p, int64_t blocks) {
  return static_cast<unsigned>(std::min({blocks, kMaxGridX, p.max_blocks > 0 ? p.max_blocks : kMaxGridX}));
}

// Whether there is a warp for each row at once, so that a warp per row leaves nothing to wait for.
bool fits_warps(const GatherRowsParams& p) {
  const int64_t warps = int64_t{kResidentWarps} * num_multiprocessors();
  return p.row_ids.count <= (p.max_blocks > 0 ? std::min<int64_t>(warps, p.max_blocks * (kThreads / kWarp)) : warps);
}

// Whether what a thread decodes at once is aligned.
bool decodes_from_memory(const GatherRowsParams& p, const Plan& plan) {
  if (copies(p)) return true;
  const int64_t elements = kVectorBytes / dtype_bytes(p.out_dtype);
  const int64_t load_bytes = std::min<int64_t>(value_bytes(p.source.format, elements), kVectorBytes);
  const bool scale_words = (reinterpret_cast<uintptr_t>(p.source.scales) | p.source.scale_stride_bytes) % 4 == 0;
  return load_bytes <= plan.aligned_bytes &&
         (!has_row_scales(p.source.format) || scale_bytes(p.source.format) == 1 || scale_words);
}

// Whether the kernel for fp8 rows with ue8m0 scales takes them: most of a warp's lanes have a vector, and places fit 32 bits.
bool goes_directly(const GatherRowsParams& p, const Plan& plan) {
  const RowFormatTraits traits = traits_of(p.source.format);
  return !copies(p) && p.max_blocks == 0 && traits.element == RowElement::kFp8E4m3 && traits.scale == RowScale::kBlockUe8m0 &&
         p.row_ids.count <= INT32_MAX / 2 && plan.vectors > kWarp / 2 && plan.vectors <= kWarp && decodes_from_memory(p, plan) &&
         p.source.num_rows < UINT32_MAX && p.source.row_stride_bytes <= UINT32_MAX && p.source.scale_stride_bytes <= UINT32_MAX;
}

template <DType kOut>
void launch(const GatherRowsParams& p, cudaStream_t stream) {
  Plan plan{};
  const bool aligned = plan_row(p, &plan), tiles = aligned && plan_tiles(p, &plan);
  const int64_t resident = int64_t{kBlocksPerSm} * num_multiprocessors();
  if (aligned && (fits_warps(p) || !tiles) && decodes_from_memory(p, plan)) {
    const unsigned grid = grid_of(p, std::min(ceil_div(p.row_ids.count, kThreads / kWarp), resident));
    launch_overlapping(gather_rows_warp_per_row_kernel<kOut>, grid, kThreads, stream, p, plan, copies(p));
  } else if (aligned && goes_directly(p, plan)) {
    const int64_t groups = ceil_div(p.row_ids.count, kDirectThreads / kWarp * kDirectRows);
    const unsigned grid = grid_of(p, std::min(groups, int64_t{kDirectBlocksPerSm} * num_multiprocessors()));
    gather_rows_direct_kernel<kOut><<<grid, kDirectThreads, 0, stream>>>(p, plan.vectors);
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
