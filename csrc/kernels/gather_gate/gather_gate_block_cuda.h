// Device code that the kernels of gather_gate share: how a block lies over a token, and how the token's rows get to it.
// Included by .cu files only.
//
// A thread holds kVectors 16-byte vectors of hidden in each of up to kGroup branches, and decodes what lies there of the
// memory vector once for all of them. A token's rows come to shared memory as they are stored, by asynchronous copies of
// whole 128-byte lines, while the token before is worked on.
#pragma once

#include <algorithm>

#include "common/stored_row_cuda.h"
#include "kernels/gate/gate_plain_cuda.h"
#include "kernels/gather_gate/gather_gate.h"

namespace engram_kernels {

// An element of the memory vector, which is key and value, for the kernels of gate_plain_cuda.h. The backward pass sees the
// same ids again: only the forward pass counts bad ones, in the first element of a row.
template <DType kType>
__device__ __forceinline__ KeyAndValue key_and_value(const GatherGateParams& p, int64_t t, int /*m*/, int i,
                                                     bool counts = false) {
  const int row = i / p.table.row_dim, element = i - row * p.table.row_dim;
  const int64_t id = p.row_id(t, row);
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(p.table.num_rows)) {
    const float e = decode_element(p.table, id, element);
    return {e, e};
  }
  if (counts && element == 0 && id != kNoRow) count_error(p.error_count);
  return {0.0F, 0.0F};
}

namespace {

constexpr int kVectors = 2;  // of a thread in a branch
constexpr int kLinesAtOnce = 4;
constexpr int kMaxWarps = 24;
constexpr int kStaticBytes = 2048;  // of shared memory, at most

extern __shared__ float4 shared[];

// What the launcher derives from the params. Dynamic shared memory: what the kernel keeps of the weights, then the rows of
// a token, each with its scales behind it, then the staged rows, then the ids.
struct Tile {
  int vectors;   // of a row of hidden
  int branches;  // of a block: of a token, or a part of them
  int tokens;
  int word_bytes;                  // of one load of a row: 16, 8 or 4
  int lines;                       // that a row can touch
  int row_bytes;                   // read of a row
  int row_pitch;                   // bytes between rows in shared memory
  int scale_bytes;                 // of a row's scales that lie apart in memory
  int scale_lanes_log2;            // of the threads that fetch them
  int partial_sums_at;             // float4 into shared memory; of the backward pass
  int rows_at, staged_at, ids_at;  // bytes into it
  int shared_bytes;
};

// Where a vector of the memory vector lies; one word, for the registers' sake.
class VectorPlace {
 public:
  VectorPlace() = default;
  __device__ __forceinline__ VectorPlace(int row, int element) : packed_(row << 16 | element) {}

  __device__ __forceinline__ bool is_there() const { return packed_ >= 0; }  // else the block is wider than hidden
  // What follows from it is computed anew behind this, not kept in a register for each of the formats over a loop.
  __device__ __forceinline__ void hide() { asm volatile("" : "+r"(packed_)); }
  __device__ __forceinline__ int row() const { return packed_ >> 16; }
  __device__ __forceinline__ int element() const { return packed_ & 0xFFFF; }

 private:
  int packed_;
};
constexpr int kMaxRowDim = 1 << 16;

// What a thread knows of a token that is still to come.
struct Coming {
  int64_t id;  // of the row with the number of the thread
  bool masked;
};

__device__ __forceinline__ unsigned char* shared_bytes_at(int at) { return reinterpret_cast<unsigned char*>(shared) + at; }
__device__ __forceinline__ StagedRow* staged(const Tile& tile) {
  return reinterpret_cast<StagedRow*>(shared_bytes_at(tile.staged_at));
}
__device__ __forceinline__ int64_t* staged_ids(const Tile& tile) {
  return reinterpret_cast<int64_t*>(shared_bytes_at(tile.ids_at));
}
__device__ __forceinline__ bool is_absent(const StagedRow& row) { return static_cast<int>(row.w) == kAbsent; }

// Asks for a token's id, to be used much later. Past the last token: a masked one.
__device__ __forceinline__ Coming look_ahead(const GatherGateParams& p, const Tile& tile, int t) {
  Coming next{kNoRow, true};
  if (t >= tile.tokens) return next;
  next.masked = p.masked(t);
  if (threadIdx.x < p.columns) next.id = p.row_id(t, threadIdx.x);
  return next;
}

// Says where the rows of a token are: a thread per row.
__device__ __forceinline__ void describe_rows(const GatherGateParams& p, const Tile& tile, const Coming& next) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= p.columns) return;
  const int64_t id = next.masked ? kNoRow : next.id;
  const bool there = static_cast<uint64_t>(id) < static_cast<uint64_t>(p.table.num_rows);
  if (!there && id != kNoRow && blockIdx.y == 0) count_error(p.error_count);
  const auto row = reinterpret_cast<uint64_t>(p.table.row(id));
  const int into_line = static_cast<int>(row % kLineBytes);
  const uint64_t line = row - into_line;
  staged(tile)[r] = make_uint4(static_cast<uint32_t>(line), static_cast<uint32_t>(line >> 32), r * tile.row_pitch - into_line,
                               there ? into_line : kAbsent);
  if (tile.scale_bytes > 0) staged_ids(tile)[r] = id;
}

// Starts the reads of the rows described: kWordBytes bytes per lane, a line per group of lanes. A row that is not there
// becomes zeros.
template <int kWordBytes>
__device__ __forceinline__ void stage_lines(const Tile& tile, int columns) {
  constexpr int kLanes = kLineBytes / kWordBytes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, lane_bytes = lane * kWordBytes;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes_at(tile.rows_at))) + lane_bytes;
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) / kLanes; r < columns; r += static_cast<int>(blockDim.x) / kLanes) {
    const StagedRow row = staged(tile)[r];
    if (is_absent(row)) {
      auto* to = reinterpret_cast<uint4*>(shared_bytes_at(tile.rows_at + r * tile.row_pitch));
#pragma unroll 1
      for (int i = lane; i < tile.row_pitch / 16; i += kLanes) to[i] = make_uint4(0, 0, 0, 0);
      continue;
    }
    const auto* from = reinterpret_cast<const std::byte*>(uint64_t{row.y} << 32 | row.x) + lane_bytes;
    uint32_t to = base + row.z;
    int at = lane_bytes - static_cast<int>(row.w);  // in the row
#pragma unroll 1
    for (int line = 0; line < tile.lines; line += kLinesAtOnce) {
#pragma unroll
      for (int i = 0; i < kLinesAtOnce; ++i) {  // behind the row's end nothing is copied
        copy_async<kWordBytes>(to + i * kLineBytes, from + i * kLineBytes,
                               static_cast<uint32_t>(at + i * kLineBytes) < static_cast<uint32_t>(tile.row_bytes));
      }
      at += kLinesAtOnce * kLineBytes, from += kLinesAtOnce * kLineBytes, to += kLinesAtOnce * kLineBytes;
    }
  }
}

// Copies scales that lie apart from the rows to shared memory: by words where they are aligned, else by bytes.
__device__ __forceinline__ void stage_scales(const RowSource& s, const Tile& tile, int columns) {
  const bool words = (reinterpret_cast<uintptr_t>(s.scales) | s.scale_stride_bytes | tile.scale_bytes) % 4 == 0;
  const int thread = static_cast<int>(threadIdx.x), lanes = 1 << tile.scale_lanes_log2;
  const int step = words ? 4 : 1, lane = thread & (lanes - 1);
#pragma unroll 1
  for (int r = thread >> tile.scale_lanes_log2; r < columns; r += static_cast<int>(blockDim.x) >> tile.scale_lanes_log2) {
    if (is_absent(staged(tile)[r])) continue;
    const std::byte* from = s.scales + staged_ids(tile)[r] * s.scale_stride_bytes;
    unsigned char* to = shared_bytes_at(tile.rows_at + r * tile.row_pitch + tile.row_bytes);
#pragma unroll 1
    for (int at = lane * step; at < tile.scale_bytes; at += lanes * step) {
      if (words) {
        copy_async<4>(static_cast<uint32_t>(__cvta_generic_to_shared(to + at)), from + at, true);
      } else {
        to[at] = static_cast<unsigned char>(from[at]);
      }
    }
  }
}

__device__ __forceinline__ void stage_rows(const GatherGateParams& p, const Tile& tile) {
  const int columns = static_cast<int>(p.columns);
  if (tile.word_bytes == 16) stage_lines<16>(tile, columns);
  if (tile.word_bytes == 8) stage_lines<8>(tile, columns);
  if (tile.word_bytes == 4) stage_lines<4>(tile, columns);
  if (tile.scale_bytes > 0) stage_scales(p.table, tile, columns);
}

// The vectors of this thread.
template <int kElements>
__device__ __forceinline__ void find_places(const GatherGateParams& p, const Tile& tile, VectorPlace (&places)[kVectors]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first_vector<kVectors>() + j * kWarp, row = i * kElements / p.table.row_dim;
    places[j] = i < tile.vectors ? VectorPlace(row, i * kElements - row * p.table.row_dim) : VectorPlace(-1, 0);
  }
}

// A thread's part of the memory vector, out of shared memory; zeros where it has none. kWhole: it has all its vectors.
template <RowFormat kFormat, bool kWhole, int kElements>
__device__ __forceinline__ void decode_places(const GatherGateParams& p, const Tile& tile, const VectorPlace (&places)[kVectors],
                                              float (&e)[kVectors][kElements]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    VectorPlace place = places[j];
    place.hide();
#pragma unroll
    for (int i = 0; i < kElements; ++i) e[j][i] = 0.0F;
    if (!kWhole && !place.is_there()) continue;
    const unsigned char* row = shared_bytes_at(tile.rows_at + place.row() * tile.row_pitch);
    float scale = 0.0F;
    if constexpr (traits_of(kFormat).scale == RowScale::kTensor || has_table_scale(kFormat)) {
      // it may be NaN, or below zero: an absent row's zeros are multiplied by 0
      if (!is_absent(staged(tile)[place.row()])) scale = tensor_scale_of<kFormat>(p.table);
    }
    if constexpr (stores(kFormat, DType::kF32) && kElements == 8) {
      // half of the lanes begin with the upper half, so that neighbours read from other banks
      const int swap = threadIdx.x / 4 % 2;
      const auto* halves = reinterpret_cast<const float4*>(row + 4 * place.element());
      const float4 a = halves[swap], b = halves[1 - swap], low = swap ? b : a, high = swap ? a : b;
      e[j][0] = low.x, e[j][1] = low.y, e[j][2] = low.z, e[j][3] = low.w;
      e[j][4] = high.x, e[j][5] = high.y, e[j][6] = high.z, e[j][7] = high.w;
    } else {
      decode<kFormat, kElements>(p.table, row, row + value_bytes(kFormat, p.table.row_dim), place.element(), scale, e[j]);
    }
  }
}

template <bool kWhole, int kElements>
__device__ __forceinline__ void decode_memory(const GatherGateParams& p, const Tile& tile, const VectorPlace (&places)[kVectors],
                                              float (&e)[kVectors][kElements]) {
  with_row_decode(p.table.format, [&](auto format) {  // in shared memory the scales lie behind the values
    decode_places<decltype(format)::value, kWhole>(p, tile, places, e);
  });
}

// The products of the two weights of this thread's vectors, one branch after the other: from the block's shared memory, or
// from memory. A vector that is not there has those of another one. kWhole: all are there.
template <int kElements, bool kStaged, bool kWhole>
class Products {
 public:
  __device__ __forceinline__ Products(const GatherGateParams& p, const Tile& tile, int branch,
                                      const VectorPlace (&places)[kVectors])
      : weights_(p.weights), size_(static_cast<int>(p.hidden_size)), plane_(tile.vectors), first_(branch * size_) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) at_[j] = kWhole || places[j].is_there() ? first_vector<kVectors>() + j * kWarp : 0;
    planes_ = shared + branch * (kElements / 4) * plane_ + at_[0];
  }

  __device__ __forceinline__ void next_branch() { planes_ += (kElements / 4) * plane_, first_ += size_; }

  // Four of vector j.
  __device__ __forceinline__ void load(int j, int quad, float (&values)[4]) const {
    if constexpr (kStaged) {
      load_planes<4>(planes_ + quad * plane_, 0, kWhole ? j * kWarp : at_[j] - at_[0], values);
      return;
    }
    float of_key[4];
    int element = first_ + at_[j] * kElements + quad * 4;
    asm volatile("" : "+r"(element));  // no address for each vector and dtype is kept in registers over the loop
    load_weights<4>(weights_.w_hidden, weights_.dtype, element, values);
    load_weights<4>(weights_.w_key, weights_.dtype, element, of_key);
#pragma unroll
    for (int n = 0; n < 4; ++n) values[n] *= of_key[n];
  }

 private:
  const GateWeights& weights_;
  const float4* planes_;
  int size_, plane_, first_;
  int at_[kVectors];
};

// Where this thread's first vector of a branch lies.
template <DType kType>
__device__ __forceinline__ std::byte* first_vector_at(const BranchRows& rows, int t, int branch) {
  return reinterpret_cast<std::byte*>(vector_at<uint4>(rows, kType, t, branch, first_vector<kVectors>()));
}

// kWhole: this thread has all its vectors.
template <bool kWhole = false>
__device__ __forceinline__ void load_vectors(const std::byte* from, const VectorPlace (&places)[kVectors],
                                             uint4 (&to)[kVectors]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (kWhole || places[j].is_there()) to[j] = reinterpret_cast<const uint4*>(from)[j * kWarp];
  }
}

__device__ __forceinline__ void store_vectors(std::byte* to, const VectorPlace (&places)[kVectors],
                                              const uint4 (&from)[kVectors]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (places[j].is_there()) reinterpret_cast<uint4*>(to)[j * kWarp] = from[j];
  }
}

// Loads the vectors of `count` branches; `from` is the first one's. Vectors that are not there stay as they are.
template <DType kType, int kGroup>
__device__ __forceinline__ void load_group(const BranchRows& rows, const std::byte* from, int count,
                                           const VectorPlace (&places)[kVectors], uint4 (&held)[kGroup][kVectors]) {
#pragma unroll
  for (int m = 0; m < kGroup; ++m, from += rows.branch_stride * dtype_bytes(kType)) {
    if (m >= count) break;
    load_vectors(from, places, held[m]);
  }
}

// Lays out a token's rows in shared memory from `at` bytes on. Returns whether the kernels of one block per token take them.
inline bool lay_out(const GatherGateParams& p, int elements, int at, Tile* tile) {
  const RowSource& s = p.table;
  const int64_t row_bytes = row_value_bytes(s.format, s.row_dim), scale_bytes = row_scale_bytes(s.format, s.row_dim);
  const int aligned = lowest_bit(reinterpret_cast<uintptr_t>(s.rows) | static_cast<uint64_t>(s.row_stride_bytes));
  tile->word_bytes = std::min({aligned, lowest_bit(static_cast<uint64_t>(row_bytes)), kVectorBytes});
  if (tile->word_bytes < 4 || s.row_dim % elements != 0 || s.row_dim > kMaxRowDim) return false;
  const int64_t lead = aligned >= kLineBytes ? 0 : kLineBytes - aligned;  // of a row into its first line, at most
  tile->lines = static_cast<int>(ceil_div(lead + row_bytes, kLineBytes));
  tile->row_bytes = static_cast<int>(row_bytes);
  tile->scale_bytes = static_cast<int>(scale_bytes);
  tile->scale_lanes_log2 = scale_bytes % 32 == 0 ? 3 : scale_bytes % 16 == 0 ? 2 : 1;
  tile->row_pitch = static_cast<int>(ceil_div(row_bytes + scale_bytes, kVectorBytes) * kVectorBytes);
  const int64_t rows = p.columns * tile->row_pitch, ids = scale_bytes > 0 ? p.columns * 8 : 0;
  const int64_t bytes = at + rows + p.columns * static_cast<int64_t>(sizeof(StagedRow)) + ids;
  if (bytes > max_shared_bytes() - kStaticBytes) return false;
  tile->rows_at = at;
  tile->staged_at = static_cast<int>(at + rows);
  tile->ids_at = tile->staged_at + static_cast<int>(p.columns * static_cast<int64_t>(sizeof(StagedRow)));
  tile->shared_bytes = static_cast<int>(bytes);
  return true;
}

}  // namespace
}  // namespace engram_kernels
