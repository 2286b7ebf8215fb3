// CUDA kernel of place_rows. Contract: place_rows.h.
//
// Mapping  a warp takes some places and walks the bytes of their rows, one row behind the other, as widely as rows are
//          aligned (16 bytes; 8 for rows of 264); then those of their scales.
// Traffic  each row read once, most likely from the cache that its copy and gather left it in, and written once; 8 B a place.
// Limits   every access is as wide as the lowest bit of row_bytes and of the array's address.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/math.h"
#include "prefetch/place_rows.h"

namespace engram_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kPlacesAWarp = 8;           // so that rows of 33 vectors leave few lanes idle
constexpr int kLoadsAtOnce = 4;           // of a thread
constexpr int64_t kBlocksPerSm = 8;       // as many as 2,048 threads allow
constexpr int64_t kMaxVectors = 1 << 12;  // of a row, where a warp takes several: so far the quotient is exact

// One of the two arrays.
struct Plane {
  std::byte* rows;
  int64_t row_bytes;
  int vectors, vector_bytes;  // of a row
  uint64_t inverse;           // ceil(2^32 / vectors)
};

struct Plan {
  Plane rows, scales;
  int places_a_warp;
};

template <class Vector>
__device__ __forceinline__ void place(const PlaceRowsParams& p, const Plane& plane, int64_t first, int count) {
  const int total = count * plane.vectors, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int begin = lane; begin < total; begin += kWarp * kLoadsAtOnce) {
    Vector values[kLoadsAtOnce];
    std::byte* to[kLoadsAtOnce];
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {  // independent loads first
      const int i = begin + n * kWarp;
      to[n] = nullptr;
      if (i >= total) continue;
      const int row = count == 1 ? 0 : static_cast<int>(static_cast<uint64_t>(i) * plane.inverse >> 32);
      const auto at = *reinterpret_cast<const int2*>(p.places + first + row);
      if (at.x < 0 || at.x >= p.num_rows || at.y < 0 || at.y >= p.num_rows) continue;
      const int64_t within = static_cast<int64_t>(i - row * plane.vectors) * sizeof(Vector);
      values[n] = *reinterpret_cast<const Vector*>(plane.rows + at.x * plane.row_bytes + within);
      to[n] = plane.rows + at.y * plane.row_bytes + within;
    }
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      if (to[n] != nullptr) *reinterpret_cast<Vector*>(to[n]) = values[n];
    }
  }
}

__device__ __forceinline__ void place_plane(const PlaceRowsParams& p, const Plane& plane, int64_t first, int count) {
  switch (plane.vector_bytes) {
    case 16:
      return place<uint4>(p, plane, first, count);
    case 8:
      return place<uint2>(p, plane, first, count);
    case 4:
      return place<uint32_t>(p, plane, first, count);
    case 2:
      return place<uint16_t>(p, plane, first, count);
    default:
      return place<uint8_t>(p, plane, first, count);
  }
}

__global__ void __launch_bounds__(kThreads) place_rows_kernel(const PlaceRowsParams p, const Plan plan) {
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp) * plan.places_a_warp;
  int64_t first = (int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp) * plan.places_a_warp;
#pragma unroll 1
  for (; first < p.count; first += step) {
    const int count = static_cast<int>(min(int64_t{plan.places_a_warp}, p.count - first));
    place_plane(p, plan.rows, first, count);
    if (plan.scales.vectors > 0) place_plane(p, plan.scales, first, count);
  }
}

Plane plane_of(std::byte* rows, int64_t row_bytes) {
  if (row_bytes == 0) return {};
  const uint64_t bits = reinterpret_cast<uintptr_t>(rows) | static_cast<uint64_t>(row_bytes) | 16;
  const auto vector_bytes = static_cast<int>(bits & -bits);
  const int64_t vectors = row_bytes / vector_bytes;
  EK_CHECK(vectors <= 1 << 30, "place_rows: rows have " << row_bytes << " bytes");
  return {rows, row_bytes, static_cast<int>(vectors), vector_bytes, ((uint64_t{1} << 32) + vectors - 1) / vectors};
}

}  // namespace

void place_rows_cuda(const PlaceRowsParams& p, void* stream) {
  check_params(p);
  if (p.count == 0) return;
  Plan plan{plane_of(p.rows, p.row_bytes), plane_of(p.scales, p.scale_bytes), 1};
  const int64_t warps = kThreads / kWarp, resident = num_multiprocessors() * kBlocksPerSm;
  // a small batch goes over many warps rather than deep into few
  if (p.count > resident * warps && std::max(plan.rows.vectors, plan.scales.vectors) <= kMaxVectors) {
    plan.places_a_warp = kPlacesAWarp;
  }
  int64_t blocks = std::min(ceil_div(p.count, warps * plan.places_a_warp), resident);
  if (p.max_blocks > 0) blocks = std::min<int64_t>(blocks, p.max_blocks);
  place_rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, plan);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace engram_kernels
