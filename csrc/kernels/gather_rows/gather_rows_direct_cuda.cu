// CUDA kernels of gather_rows that stage nothing: rows go from memory through registers to memory. Contract: gather_rows.h.
//
//   direct   a warp takes kDirectRows fp8 rows with ue8m0 scales at a time: no barrier, and fewer instructions than in tiles
//   warps    a warp carries a row. A batch that fills no GPU so waits less than in tiles, whose barriers take longer than a row
//            takes from memory; and rows that are too long for a tile
// Traffic  every sector of a row once, the output once, 4 or 8 bytes per id.
// Limits   16-byte aligned output, rows aligned for what a thread decodes at once.
#include "kernels/gather_rows/gather_rows_cuda.h"

namespace engram_kernels {
namespace {

constexpr int kResidentWarps = 64;  // of a multiprocessor
constexpr int kDirectThreads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kDirectRows = 4;  // of a warp at once: fp8 is decoded in steps, which take registers
#else
constexpr int kDirectRows = 8;
#endif
constexpr int kDirectBlocksPerSm = 4;

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
    gather_rows_warp_per_row_kernel(const GatherRowsParams p, const GatherRowsPlan plan, bool copies) {
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

// Whether there is a warp for each row at once, so that a warp per row leaves nothing to wait for.
bool fits_warps(const GatherRowsParams& p) {
  const int64_t warps = int64_t{kResidentWarps} * num_multiprocessors();
  return p.row_ids.count <= (p.max_blocks > 0 ? std::min<int64_t>(warps, p.max_blocks * (kThreads / kWarp)) : warps);
}

// Whether what a thread decodes at once is aligned.
bool decodes_from_memory(const GatherRowsParams& p, const GatherRowsPlan& plan) {
  if (copies(p)) return true;
  const int64_t elements = kVectorBytes / dtype_bytes(p.out_dtype);
  const int64_t load_bytes = std::min<int64_t>(value_bytes(p.source.format, elements), kVectorBytes);
  const bool scale_words = (reinterpret_cast<uintptr_t>(p.source.scales) | p.source.scale_stride_bytes) % 4 == 0;
  return load_bytes <= plan.aligned_bytes &&
         (!has_row_scales(p.source.format) || scale_bytes(p.source.format) == 1 || scale_words);
}

// Whether the kernel for fp8 rows with ue8m0 scales takes them: most of a warp's lanes have a vector, and places fit 32 bits.
bool goes_directly(const GatherRowsParams& p, const GatherRowsPlan& plan) {
  const RowFormatTraits traits = traits_of(p.source.format);
  return !copies(p) && p.max_blocks == 0 && traits.element == RowElement::kFp8E4m3 && traits.scale == RowScale::kBlockUe8m0 &&
         p.row_ids.count <= INT32_MAX / 2 && plan.vectors > kWarp / 2 && plan.vectors <= kWarp && decodes_from_memory(p, plan) &&
         p.source.num_rows < UINT32_MAX && p.source.row_stride_bytes <= UINT32_MAX && p.source.scale_stride_bytes <= UINT32_MAX;
}

template <DType kOut>
bool launch_direct(const GatherRowsParams& p, const GatherRowsPlan& plan, bool tiles, cudaStream_t stream) {
  if ((fits_warps(p) || !tiles) && decodes_from_memory(p, plan)) {
    const unsigned grid = grid_of(p, std::min(ceil_div(p.row_ids.count, kThreads / kWarp), resident_blocks()));
    launch_overlapping(gather_rows_warp_per_row_kernel<kOut>, grid, kThreads, stream, p, plan, copies(p));
    return true;
  }
  if (!goes_directly(p, plan)) return false;
  const int64_t groups = ceil_div(p.row_ids.count, kDirectThreads / kWarp * kDirectRows);
  const unsigned grid = grid_of(p, std::min(groups, int64_t{kDirectBlocksPerSm} * num_multiprocessors()));
  gather_rows_direct_kernel<kOut><<<grid, kDirectThreads, 0, stream>>>(p, plan.vectors);
  EK_CUDA_CHECK(cudaGetLastError());
  return true;
}

}  // namespace

bool gather_rows_direct_cuda(const GatherRowsParams& p, const GatherRowsPlan& plan, bool tiles, cudaStream_t stream) {
  bool took = false;
  dispatch_dtype(p.out_dtype, [&](auto type) { took = launch_direct<type.value>(p, plan, tiles, stream); });
  return took;
}

}  // namespace engram_kernels
