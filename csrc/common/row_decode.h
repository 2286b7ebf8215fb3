// Decodes kLanes elements of a stored row to float, for the CPU kernels that read rows.
#pragma once

#include "common/row_format.h"
#include "common/simd.h"

#include <cstring>
#include <type_traits>

namespace engram_kernels::EK_ISA {

// Elements [i, i + kLanes) of the row at `row`, with the row's scales at `scales`; i is a multiple of kLanes.
// The float formats and fp8_e4m3_tensor may end inside the lanes: `count` says how many are left (kLanes or fewer).
template <RowFormat kFormat>
EK_LANE F32 decode_lanes(const RowSource& source, const std::byte* row, const std::byte* scales, int i, int count) {
  if constexpr (kFormat == RowFormat::kF32 || kFormat == RowFormat::kBf16 || kFormat == RowFormat::kF16) {
    using Element =
        std::conditional_t<kFormat == RowFormat::kF32, float, std::conditional_t<kFormat == RowFormat::kBf16, Bf16, F16>>;
    const Element* p = reinterpret_cast<const Element*>(row) + i;
    return count == kLanes ? load(p) : load_first(p, count);
  } else if constexpr (kFormat == RowFormat::kFp8Tensor) {
    std::byte padded[kLanes] = {};
    if (count < kLanes) std::memcpy(padded, row + i, static_cast<size_t>(count));
    float scale;
    std::memcpy(&scale, source.scales, sizeof(scale));
    return mul(load_fp8_e4m3(count < kLanes ? padded : row + i), splat(scale));
  } else if constexpr (kFormat == RowFormat::kInt8Group32) {
    float scale;
    std::memcpy(&scale, scales + i / kScaleBlock * 4, sizeof(scale));
    return mul(load_int8(row + i), splat(scale));
  } else {
    const float scale = ue8m0_to_float(static_cast<uint8_t>(scales[i / kScaleBlock]), source.zero_scale_is_zero);
    return mul(load_fp8_e4m3(row + i), splat(scale));
  }
}

// Calls f with the row format as a compile-time constant: f(std::integral_constant<RowFormat, ..>{}).
template <class F>
EK_LANE void with_row_format(RowFormat format, const F& f) {
  switch (format) {
    case RowFormat::kF32:
      return f(std::integral_constant<RowFormat, RowFormat::kF32>{});
    case RowFormat::kBf16:
      return f(std::integral_constant<RowFormat, RowFormat::kBf16>{});
    case RowFormat::kF16:
      return f(std::integral_constant<RowFormat, RowFormat::kF16>{});
    case RowFormat::kFp8Block32:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32>{});
    case RowFormat::kFp8Block32Packed:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Block32Packed>{});
    case RowFormat::kFp8Tensor:
      return f(std::integral_constant<RowFormat, RowFormat::kFp8Tensor>{});
    case RowFormat::kInt8Group32:
      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});
  }
}

// Calls f with a null pointer of the element type: f(static_cast<Bf16*>(nullptr)).
template <class F>
EK_LANE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(static_cast<float*>(nullptr));
    case DType::kBf16:
      return f(static_cast<Bf16*>(nullptr));
    case DType::kF16:
      return f(static_cast<F16*>(nullptr));
  }
}

}  // namespace engram_kernels::EK_ISA
