// CUDA kernels of the backward pass of gather_rows: a dense gradient of the rows. Contract: gather_rows.h.
//
//   1. rows       A warp looks at a position of the sorted ids. Where a new row begins, it sums the row's positions in their
//                 order, in fp32 registers, a chunk of columns at a time; elsewhere it has nothing to do.
//   2. long rows  A row that very many positions name is left to blocks of a second kernel, 32 of its columns each. Their warps
//                 load different positions at once, and add them to the sum in turn.
// So every element has one writer, which adds in the order of the positions: its bits do not depend on the grid.
// Traffic  reads the gradient once and 12 to 16 bytes per id of the sort, and writes each row that is named once; the caller
//          has zeroed the others.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/sum_positions_cuda.h"
#include "common/vector_cuda.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // elements of a lane
constexpr int kBlocksPerSm = 16;
constexpr int kLong = 256;                          // a row with as many positions may be long, one with twice as many is
constexpr int kLongWarps = 8, kLongPositions = 32;  // of a warp at once
constexpr int kLongBlocksPerSm = 3;  // by registers; without it ptxas spills on sm_80 to reach an occupancy of its own

template <DType kOut, int kCount>
__device__ __forceinline__ void store_sums(const GatherRowsBwdParams& p, int64_t id, int column, const float* sums) {
  std::byte* to = p.grad_rows + (id * p.row_dim + column) * dtype_bytes(kOut);
  if constexpr (kCount > 1) {
    constexpr int kStored = 16 / dtype_bytes(kOut);
#pragma unroll
    for (int e = 0; e < kCount; e += kStored) store_floats<kOut>(to + e * dtype_bytes(kOut), sums + e);
  } else if constexpr (kOut == DType::kF32) {
    *reinterpret_cast<float*>(to) = sums[0];
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack_pair<kOut>(sums[0], 0.0F));
  }
}

// Whether the run of `id` that contains place i, a multiple of kLong, has another such place behind it.
__device__ __forceinline__ bool goes_on(const RowIds& sorted, int64_t i, int64_t id) {
  return i + kLong < sorted.count && sorted[i + kLong] == id;
}

// Whether the run of `id` that begins at place i is the second kernel's.
__device__ __forceinline__ bool is_long(const RowIds& sorted, int64_t i, int64_t id) {
  return goes_on(sorted, (i + kLong - 1) / kLong * kLong, id);
}

template <DType kGrad, DType kOut, int kCount>
__global__ void __launch_bounds__(kThreads) gather_rows_bwd_kernel(const GatherRowsBwdParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp);
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < p.row_ids.count; i += step) {
    const int64_t id = p.row_ids[i];
    if (!begins_row(p.row_ids, p.num_rows, i, id) || is_long(p.row_ids, i, id)) continue;
    const SortedGradients gradients{p.grad, p.positions, p.row_ids, p.row_dim};
#pragma unroll 1
    for (int column = lane * kCount; column < p.row_dim; column += kWarp * kCount) {
      float sums[kCount] = {};
      sum_positions<kGrad, kCount>(gradients, i, id, column, sums);
      store_sums<kOut, kCount>(p, id, column, sums);
    }
  }
}

// The first place in [begin, end) from which on the sorted ids are above `id`; with kOrEqual, or equal to it.
template <bool kOrEqual>
__device__ __forceinline__ int64_t first_above(const RowIds& sorted, int64_t begin, int64_t end, int64_t id) {
#pragma unroll 1
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2, at = sorted[middle];
    (kOrEqual ? at >= id : at > id) ? end = middle : begin = middle + 1;
  }
  return begin;
}

// The elements of one column at the kLongPositions places from `first` on; zeros from `end` on. All lanes of a warp.
template <DType kGrad>
__device__ __forceinline__ void load_places(const GatherRowsBwdParams& p, int64_t first, int64_t end, int column,
                                            float (&values)[kLongPositions]) {
  const int64_t place = first + threadIdx.x % kWarp, position = place < end ? p.positions[place] : -1;
#pragma unroll
  for (int n = 0; n < kLongPositions; ++n) {
    const int64_t at = __shfl_sync(~0U, position, n);
    float value[1] = {0};
    if (at >= 0 && column < p.row_dim) {
      load_elements<kGrad>(p.grad + (at * p.row_dim + column) * dtype_bytes(kGrad), value);
    }
    values[n] = value[0];
  }
}

// gridDim = (places at multiples of kLong, or fewer, slices of kWarp columns). The first such place of a run stands for it.
template <DType kGrad, DType kOut>
__global__ void __launch_bounds__(kLongWarps* kWarp, kLongBlocksPerSm) gather_rows_bwd_long_kernel(const GatherRowsBwdParams p) {
  __shared__ float sums[kWarp];
  const RowIds& ids = p.row_ids;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, column = static_cast<int>(blockIdx.y) * kWarp + lane;
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kLong; i < ids.count; i += int64_t{gridDim.x} * kLong) {
    const int64_t id = ids[i];
    if (id < 0 || id >= p.num_rows || (i > 0 && ids[i - kLong] == id) || !goes_on(ids, i, id)) continue;
    const int64_t begin = first_above<true>(ids, i > 0 ? i - kLong : 0, i, id), end = first_above<false>(ids, i, ids.count, id);
    if (warp == 0) sums[lane] = 0.0F;
    float values[kLongPositions];
    load_places<kGrad>(p, begin + warp * kLongPositions, end, column, values);
#pragma unroll 1
    for (int64_t at = begin; at < end; at += kLongWarps * kLongPositions) {
#pragma unroll 1
      for (int turn = 0; turn < kLongWarps; ++turn) {
        __syncthreads();
        if (turn != warp) continue;
        float sum = sums[lane];
#pragma unroll
        for (int n = 0; n < kLongPositions; ++n) sum += values[n];
        sums[lane] = sum;
        load_places<kGrad>(p, at + (kLongWarps + warp) * kLongPositions, end, column, values);
      }
    }
    __syncthreads();
    if (warp == 0 && column < p.row_dim) store_sums<kOut, 1>(p, id, column, &sums[lane]);
    __syncthreads();
  }
}

template <DType kGrad, DType kOut>
void launch(const GatherRowsBwdParams& p, bool vectors, cudaStream_t stream) {
  const int64_t wanted = ceil_div(p.row_ids.count, int64_t{kThreads / kWarp});
  const auto blocks = static_cast<unsigned>(std::min(wanted, int64_t{num_multiprocessors()} * kBlocksPerSm));
  if (vectors) {
    gather_rows_bwd_kernel<kGrad, kOut, kVector><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    gather_rows_bwd_kernel<kGrad, kOut, 1><<<blocks, kThreads, 0, stream>>>(p);
  }
  EK_CUDA_CHECK(cudaGetLastError());
  if (p.row_ids.count <= kLong) return;
  const int64_t places = ceil_div(p.row_ids.count, int64_t{kLong}), slices = ceil_div(int64_t{p.row_dim}, int64_t{kWarp});
  EK_CHECK(slices <= kMaxGridY, "gather_rows_bwd: row_dim is " << p.row_dim << ", expected at most " << kMaxGridY * kWarp);
  const dim3 grid(static_cast<unsigned>(std::min(places, int64_t{num_multiprocessors()} * kLongBlocksPerSm)),
                  static_cast<unsigned>(slices));
  gather_rows_bwd_long_kernel<kGrad, kOut><<<grid, kLongWarps * kWarp, 0, stream>>>(p);
  EK_CUDA_CHECK(cudaGetLastError());
}

template <DType kGrad>
void launch_to(const GatherRowsBwdParams& p, bool vectors, cudaStream_t stream) {
  dispatch_dtype(p.out_dtype, [&](auto type) { launch<kGrad, type.value>(p, vectors, stream); });
}

}  // namespace

void gather_rows_bwd_cuda(const GatherRowsBwdParams& p, void* stream) {
  check_params(p);
  if (p.row_ids.count == 0 || p.num_rows == 0) return;
  const bool vectors =
      p.row_dim % kVector == 0 && (reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.grad_rows)) % 16 == 0;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_dtype(p.grad_dtype, [&](auto type) { launch_to<type.value>(p, vectors, on); });
}

}  // namespace engram_kernels
