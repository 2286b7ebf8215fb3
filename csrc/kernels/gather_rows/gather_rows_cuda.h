// What the CUDA kernels of gather_rows share. Included by .cu files only.
#pragma once

#include <algorithm>

#include "common/cuda_check.h"
#include "common/stored_row_cuda.h"
#include "common/vector_cuda.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {

// What the launcher derives from the params. In shared memory lie the rows of a tile, each with its scales behind it,
// then the staged rows, then the ids.
struct GatherRowsPlan {
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

// The same for rows that are aligned, by the kernels that stage nothing; whether they took them. `tiles`: the others would.
bool gather_rows_direct_cuda(const GatherRowsParams& p, const GatherRowsPlan& plan, bool tiles, cudaStream_t stream);

namespace {

constexpr int kThreads = 64;      // of many rows each: what a thread does once for a tile is a good part of its work
constexpr int kBlocksPerSm = 32;  // as many as 2,048 threads allow

__device__ __forceinline__ bool is_row(const GatherRowsParams& p, int64_t id) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(p.source.num_rows);
}

// Whether output rows are the bytes of stored rows.
inline bool copies(const GatherRowsParams& p) { return p.as_stored || stores(p.source.format, p.out_dtype); }

inline unsigned grid_of(const GatherRowsParams& p, int64_t blocks) {
  return static_cast<unsigned>(std::min({blocks, kMaxGridX, p.max_blocks > 0 ? p.max_blocks : kMaxGridX}));
}

// Blocks of kThreads that a device holds at once.
inline int64_t resident_blocks() { return int64_t{kBlocksPerSm} * num_multiprocessors(); }

}  // namespace
}  // namespace engram_kernels
