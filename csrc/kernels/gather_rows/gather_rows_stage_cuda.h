// How the rows of a tile of gather_rows get to shared memory: every sector once, by asynchronous copies of whole lines.
#pragma once

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kLineBytes = 128;

// What the launcher derives from the params.
struct Plan {
  int slot_bytes;   // of one load: 16, 8 or 4
  int passes;       // lines that a row can touch
  int rows;         // of a tile
  int row_bytes;    // read of a row
  int row_pitch;    // bytes between rows in shared memory
  int scale_bytes;  // of a row's own scales, when they lie apart
  int scale_pitch;
  int vectors;                       // 16-byte pieces of an output row
  uint32_t vectors_inverse;          // 2^32 / vectors, rounded up
  int scales_at, staged_at, ids_at;  // bytes into shared memory
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

// Volatile: once, not in every turn of a loop.
__device__ __forceinline__ uint32_t shared_address() {
  uint32_t address;
  asm volatile("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(shared));
  return address;
}

// Starts a copy of kBytes to shared memory if 0 <= at < end.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const std::byte* from, int at, int end) {
  if constexpr (kBytes == 16) {
    asm volatile("{.reg .pred p; setp.lt.u32 p, %2, %3; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(from),
                 "r"(at), "r"(end)
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.lt.u32 p, %2, %3; @p cp.async.ca.shared.global [%0], [%1], %4;}" ::"r"(to), "l"(from),
                 "r"(at), "r"(end), "n"(kBytes)
                 : "memory");
  }
}

__device__ __forceinline__ void clear_word(unsigned char* to) { *reinterpret_cast<uint32_t*>(to) = 0; }

// Where a row of the tile comes from and goes to, as one 16-byte word of shared memory.
struct __align__(16) StagedRow {
  const std::byte* line;  // the 128-byte line in which the row begins
  int to;                 // bytes into shared memory, minus into_line
  int into_line;          // kAbsent: nothing is read
};
constexpr int kAbsent = 1 << 30;

__device__ __forceinline__ StagedRow* staged_rows(const Plan& plan) {
  return reinterpret_cast<StagedRow*>(shared + plan.staged_at);
}
__device__ __forceinline__ int64_t* staged_ids(const Plan& plan) { return reinterpret_cast<int64_t*>(shared + plan.ids_at); }

// Looks the tile's ids up. Returns whether this thread met one without a row.
__device__ __forceinline__ bool stage_ids(const GatherRowsParams& p, const Plan& plan, int64_t first, int count) {
  bool absent = false;
#pragma unroll 1
  for (int r = threadIdx.x; r < count; r += kThreads) {
    const int64_t id = checked_id(p, first + r, true);
    const std::byte* row = p.source.row(id);
    const int into_line = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kLineBytes);
    staged_rows(plan)[r] = {row - into_line, r * plan.row_pitch - into_line, id == kNoRow ? kAbsent : into_line};
    staged_ids(plan)[r] = id;
    absent = absent || id == kNoRow;
  }
  return absent;
}

// Starts the reads of a tile's rows. Slots before and behind the row on its first and last line are left out.
template <int kSlot, int kPasses>
__device__ __forceinline__ void stage_rows_of(const Plan& plan, int count) {
  constexpr int kLanes = kLineBytes / kSlot;
  const int lane_bytes = threadIdx.x % kLanes * kSlot;
  const uint32_t base = shared_address() + lane_bytes;
#pragma unroll(kPasses > 0 ? 4 : 1)
  for (int r = threadIdx.x / kLanes; r < count; r += kThreads / kLanes) {
    uint4 words;
    load_words<4>(staged_rows(plan) + r, &words.x);
    const StagedRow row = {reinterpret_cast<const std::byte*>(static_cast<uint64_t>(words.y) << 32 | words.x),
                           static_cast<int>(words.z), static_cast<int>(words.w)};
    const std::byte* from = row.line + lane_bytes;
    const uint32_t to = base + row.to;
    const int at = lane_bytes - row.into_line;
    if constexpr (kPasses > 0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        copy_async<kSlot>(to + i * kLineBytes, from + i * kLineBytes, at + i * kLineBytes, plan.row_bytes);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < plan.passes; ++i) {
        copy_async<kSlot>(to + i * kLineBytes, from + i * kLineBytes, at + i * kLineBytes, plan.row_bytes);
      }
    }
  }
}

template <int kSlot>
__device__ __forceinline__ void stage_rows(const Plan& plan, int count) {
  switch (plan.passes) {
    case 2:
      return stage_rows_of<kSlot, 2>(plan, count);
    case 3:
      return stage_rows_of<kSlot, 3>(plan, count);
    case 4:
      return stage_rows_of<kSlot, 4>(plan, count);
    default:
      return stage_rows_of<kSlot, 0>(plan, count);
  }
}

// Zeros for the rows that are not there.
__device__ __forceinline__ void clear_absent(const Plan& plan, int count) {
#pragma unroll 1
  for (int r = 0; r < count; ++r) {
    if (staged_rows(plan)[r].into_line != kAbsent) continue;
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < plan.row_bytes; at += kThreads * 4) clear_word(shared + r * plan.row_pitch + at);
    for (int at = threadIdx.x; at < plan.scale_bytes; at += kThreads) shared[plan.scales_at + r * plan.scale_pitch + at] = 0;
  }
}

// The same for scales that lie apart: a word a lane where the words are whole, else a byte; eight lanes a row.
__device__ __forceinline__ void stage_scales(const GatherRowsParams& p, const Plan& plan, int count) {
  constexpr int kLanes = 8;
  const RowSource& s = p.source;
  const bool words = (reinterpret_cast<uintptr_t>(s.scales) | s.scale_stride_bytes | plan.scale_bytes) % 4 == 0;
  const int step = words ? 4 : 1;
#pragma unroll 1
  for (int r = threadIdx.x / kLanes; r < count; r += kThreads / kLanes) {
    const int64_t id = staged_ids(plan)[r];
    if (id == kNoRow) continue;
    const std::byte* from = s.scales + id * s.scale_stride_bytes;
    unsigned char* to = shared + plan.scales_at + r * plan.scale_pitch;
    const uint32_t to_shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#pragma unroll 1
    for (int at = threadIdx.x % kLanes * step; at < plan.scale_bytes; at += kLanes * step) {
      if (words) {
        copy_async<4>(to_shared + at, from + at, at, plan.scale_bytes);
      } else {
        to[at] = static_cast<unsigned char>(from[at]);
      }
    }
  }
}

}  // namespace
}  // namespace engram_kernels
