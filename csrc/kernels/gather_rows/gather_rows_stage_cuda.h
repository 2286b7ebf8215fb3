// How a tile of rows gets to shared memory: every sector once, by asynchronous copies of whole 128-byte lines.
#pragma once

#include "common/cuda_check.h"
#include "common/stored_row_cuda.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 64;    // of many rows each: what a thread does once for a tile is a good part of its work
constexpr int kRowsAtOnce = 8;  // of a group of lanes, so that a thread has 8 loads in flight at least

// What the launcher derives from the params. In shared memory lie the rows of a tile, each with its scales behind it,
// then the staged rows, then the ids.
struct Plan {
  int slot_bytes;         // of one load: 16, 8 or 4
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
template <int kSlot, int kLines>
__device__ __forceinline__ void stage_lines(const Plan& plan, int count, int first_line) {
  constexpr int kLanes = kLineBytes / kSlot, kGroups = kThreads / kLanes;
  const int lane_bytes = threadIdx.x % kLanes * kSlot + first_line * kLineBytes;
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
      // where in its row this thread's slot of the first line lies; far behind the end if the row is absent
      const int at = lane_bytes - static_cast<int>(words[n].w);
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const int end = plan.row_bytes - i * kLineBytes;
        // only the first line has slots before the row
        const bool in_row = i == 0 ? static_cast<uint32_t>(at) < static_cast<uint32_t>(end) : at < end;
        copy_async<kSlot>(to + i * kLineBytes, from + i * kLineBytes, in_row);
      }
    }
  }
}

__device__ __forceinline__ void stage_rows(const Plan& plan, int count) {
  if (plan.slot_bytes == 16 && plan.lines <= 2) return stage_lines<16, 2>(plan, count, 0);
  if (plan.slot_bytes == 8 && plan.lines <= 3) return stage_lines<8, 3>(plan, count, 0);
#pragma unroll 1
  for (int line = 0; line < plan.lines; line += 4) {
    if (plan.slot_bytes == 16) stage_lines<16, 4>(plan, count, line);
    if (plan.slot_bytes == 8) stage_lines<8, 4>(plan, count, line);
    if (plan.slot_bytes == 4) stage_lines<4, 4>(plan, count, line);
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
  constexpr int kWarp = 32;
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < count; r += kThreads / kWarp) {
    if (!is_absent(plan, r)) continue;
    auto* row = reinterpret_cast<uint32_t*>(shared + r * plan.row_pitch);
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < plan.row_pitch / 4; i += kWarp) row[i] = 0;
  }
}

}  // namespace
}  // namespace engram_kernels
