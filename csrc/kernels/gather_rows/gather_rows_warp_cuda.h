// Rows of small batches: a warp carries a row from memory to memory.
// The way through a tile, with its barriers, is longer than a row takes from memory.
#pragma once

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "common/stored_row_cuda.h"
#include "kernels/gather_rows/gather_rows.h"
#include "kernels/gather_rows/gather_rows_stage_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kVectorBytes = 16;

// A warp's row to the output, decoded; null: zeros.
template <DType kOut, RowFormat kFormat>
__device__ __forceinline__ void decode_row(const RowSource& s, const std::byte* row, const std::byte* scales, int vectors,
                                           std::byte* out) {
  constexpr int kCount = kVectorBytes / dtype_bytes(kOut);
  const float tensor_scale =
      kFormat == RowFormat::kFp8Tensor && row != nullptr ? *reinterpret_cast<const float*>(s.scales) : 0.0F;
#pragma unroll 4
  for (int v = threadIdx.x % kWarp; v < vectors; v += kWarp) {
    float values[kCount] = {};
    if (row != nullptr) {
      decode<kFormat, kCount>(s, reinterpret_cast<const unsigned char*>(row), reinterpret_cast<const unsigned char*>(scales),
                              v * kCount, tensor_scale, values);
    }
    store_floats<kOut>(out + v * kVectorBytes, values);
  }
}

template <class Slot>
__device__ __forceinline__ void copy_row(const std::byte* row, int bytes, std::byte* out) {
#pragma unroll 4
  for (int at = threadIdx.x % kWarp * sizeof(Slot); at < bytes; at += kWarp * sizeof(Slot)) {
    *reinterpret_cast<Slot*>(out + at) = row != nullptr ? *reinterpret_cast<const Slot*>(row + at) : Slot{};
  }
}

// Small batches: a warp a row, nothing is staged. With copies, rows as they are, in slots of plan.slot_bytes.
template <DType kOut>
__global__ void __launch_bounds__(kThreads)
    gather_rows_warp_per_row_kernel(const GatherRowsParams p, const Plan plan, bool copies) {
  constexpr int kWarps = kThreads / kWarp;
  const RowSource& s = p.source;
#pragma unroll 1
  for (int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; r < p.row_ids.count; r += int64_t{gridDim.x} * kWarps) {
    const int64_t id = p.row_ids[r];
    const bool there = is_row(p, id);
    if (!there && id != kNoRow && threadIdx.x % kWarp == 0) count_error(p.error_count);
    const std::byte* row = there ? s.row(id) : nullptr;
    if (copies) {
      std::byte* out = p.out + r * plan.row_bytes;
      if (plan.slot_bytes == 16) copy_row<uint4>(row, plan.row_bytes, out);
      if (plan.slot_bytes == 8) copy_row<uint2>(row, plan.row_bytes, out);
      if (plan.slot_bytes == 4) copy_row<uint32_t>(row, plan.row_bytes, out);
      continue;
    }
    const std::byte* scales = s.row_scales(there ? id : 0);
    std::byte* out = p.out + r * plan.vectors * kVectorBytes;
    switch (s.format) {
      case RowFormat::kF32:
        decode_row<kOut, RowFormat::kF32>(s, row, scales, plan.vectors, out);
        break;
      case RowFormat::kBf16:
        decode_row<kOut, RowFormat::kBf16>(s, row, scales, plan.vectors, out);
        break;
      case RowFormat::kF16:
        decode_row<kOut, RowFormat::kF16>(s, row, scales, plan.vectors, out);
        break;
      case RowFormat::kFp8Tensor:
        decode_row<kOut, RowFormat::kFp8Tensor>(s, row, scales, plan.vectors, out);
        break;
      case RowFormat::kInt8Group32:
        decode_row<kOut, RowFormat::kInt8Group32>(s, row, scales, plan.vectors, out);
        break;
      default:
        decode_row<kOut, RowFormat::kFp8Block32Packed>(s, row, scales, plan.vectors, out);
    }
  }
}

}  // namespace
}  // namespace engram_kernels
