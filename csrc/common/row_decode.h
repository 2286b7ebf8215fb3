// The decode of stored rows to float: kLanes elements at a time on a CPU, a vector or an element on a GPU.
//
// Both go by the element and the scale of a format, not by its name.
#pragma once

#include <cstring>

#include "common/row_format.h"

#ifdef __CUDACC__
#include "common/convert_cuda.h"

namespace engram_kernels {

// What every value of the table is multiplied by; 0 where the format has no such scale.
template <RowFormat kFormat>
__device__ __forceinline__ float tensor_scale_of(const RowSource& s) {
  if constexpr (traits_of(kFormat).scale == RowScale::kTensor) return *reinterpret_cast<const float*>(s.scales);
  return has_table_scale(kFormat) ? s.table_scale : 0.0F;
}

// kCount elements from `element` on of a row in shared or global memory; `scales` are the row's.
template <RowFormat kFormat, int kCount>
__device__ __forceinline__ void decode(const RowSource& s, const unsigned char* row, const unsigned char* scales, int element,
                                       float tensor_scale, float* values) {
  constexpr RowFormatTraits kTraits = traits_of(kFormat);
  if constexpr (kTraits.scale == RowScale::kNone) {
    load_floats<kPlainDType<kFormat>, kCount>(row + value_bytes(kFormat, element), values);
  } else {
    float scale = tensor_scale;
    const int index = scale_index(kFormat, element);
    if constexpr (kTraits.scale == RowScale::kGroupF32 || kTraits.scale == RowScale::kRowF32) {
      scale = reinterpret_cast<const float*>(scales)[index];
    }
    if constexpr (kTraits.scale == RowScale::kBlockUe8m0) scale = unpack_ue8m0(scales[index], s.zero_scale_is_zero);
    if constexpr (kTraits.scale == RowScale::kBlockE4m3) scale = fp8_e4m3_to_float(scales[index]);
    if constexpr (kTraits.element == RowElement::kE2m1) {
      static_assert(kCount % 4 == 0 && kCount <= 8);
      const unsigned char* from = row + element / 2;
      unpack_e2m1<kCount>(kCount == 8 ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from),
                          values);
    } else {
      static_assert(element_bits(kFormat) == 8);
      uint32_t words[kCount / 4];
      load_words<kCount / 4>(row + element, words);
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        kTraits.element == RowElement::kInt8 ? unpack_int8(words[i], values + 4 * i) : unpack_fp8(words[i], values + 4 * i);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= scale;
    if constexpr (has_table_scale(kFormat)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] *= tensor_scale;  // the product so far is exact
    }
  }
}

template <class T>
__device__ __forceinline__ T load_bytes(const std::byte* from) {  // of any alignment
  T value;
  auto* to = reinterpret_cast<std::byte*>(&value);
#pragma unroll
  for (size_t i = 0; i < sizeof(T); ++i) to[i] = from[i];
  return value;
}

// One element of the row at `row`, of any alignment; `scales` are the row's.
template <RowFormat kFormat>
__device__ __forceinline__ float decode_one(const RowSource& s, const std::byte* row, const std::byte* scales, int element) {
  constexpr RowFormatTraits kTraits = traits_of(kFormat);
  const std::byte *from = row + value_bytes(kFormat, element),
                  *scale = scales + scale_index(kFormat, element) * scale_bytes(kFormat);
  float value = 0.0F;
  if constexpr (kTraits.element == RowElement::kF32) value = load_bytes<float>(from);
  if constexpr (kTraits.element == RowElement::kBf16) value = bf16_to_float(load_bytes<uint16_t>(from));
  if constexpr (kTraits.element == RowElement::kF16) value = f16_to_float(load_bytes<uint16_t>(from));
  if constexpr (kTraits.element == RowElement::kFp8E4m3) value = fp8_e4m3_to_float(load_bytes<uint8_t>(from));
  if constexpr (kTraits.element == RowElement::kInt8) value = static_cast<float>(load_bytes<int8_t>(from));
  if constexpr (kTraits.element == RowElement::kE2m1) value = e2m1_to_float(load_bytes<uint8_t>(from) >> element % 2 * 4);
  if constexpr (kTraits.scale == RowScale::kTensor) value *= load_bytes<float>(s.scales);
  if constexpr (kTraits.scale == RowScale::kGroupF32 || kTraits.scale == RowScale::kRowF32) value *= load_bytes<float>(scale);
  if constexpr (kTraits.scale == RowScale::kBlockUe8m0) {
    value *= ue8m0_to_float(load_bytes<uint8_t>(scale), s.zero_scale_is_zero);
  }
  if constexpr (kTraits.scale == RowScale::kBlockE4m3) value *= fp8_e4m3_to_float(load_bytes<uint8_t>(scale));
  if constexpr (has_table_scale(kFormat)) value *= s.table_scale;
  return value;
}

// One element of row `id`, of any alignment.
__device__ inline float decode_element(const RowSource& s, int64_t id, int element) {
  float value = 0.0F;
  with_row_decode(s.format,
                  [&](auto format) { value = decode_one<decltype(format)::value>(s, s.row(id), s.row_scales(id), element); });
  return value;
}

}  // namespace engram_kernels

#else
#include "common/simd.h"

namespace engram_kernels::EK_ISA {

// The scale of element i of a row whose scales lie at `scales`.
template <RowFormat kFormat>
EK_LANE float scale_at(const RowSource& source, const std::byte* scales, int i) {
  constexpr RowScale kScale = traits_of(kFormat).scale;
  const std::byte* at = kScale == RowScale::kTensor ? source.scales : scales + scale_index(kFormat, i) * scale_bytes(kFormat);
  if constexpr (kScale == RowScale::kBlockUe8m0) return ue8m0_to_float(static_cast<uint8_t>(*at), source.zero_scale_is_zero);
  if constexpr (kScale == RowScale::kBlockE4m3) return fp8_e4m3_to_float(static_cast<uint8_t>(*at));
  float scale;
  std::memcpy(&scale, at, sizeof(scale));
  return scale;
}

// kLanes elements of one or half a byte each, as float, times nothing.
template <RowElement kElement>
EK_LANE F32 load_small(const std::byte* from) {
  if constexpr (kElement == RowElement::kInt8) return load_int8(from);
  if constexpr (kElement == RowElement::kE2m1) return load_e2m1(from);
  return load_fp8_e4m3(from);
}

// Elements [i, i + kLanes) of the row at `row`, with the row's scales at `scales`; i is a multiple of kLanes.
// A row without blocks may end inside the lanes: `count` says how many elements are left (kLanes or fewer).
template <RowFormat kFormat>
EK_LANE F32 decode_lanes(const RowSource& source, const std::byte* row, const std::byte* scales, int i, int count) {
  constexpr RowFormatTraits kTraits = traits_of(kFormat);
  if constexpr (kTraits.scale == RowScale::kNone) {
    using Element = std::conditional_t<kTraits.element == RowElement::kF32, float,
                                       std::conditional_t<kTraits.element == RowElement::kBf16, Bf16, F16> >;
    const Element* p = reinterpret_cast<const Element*>(row) + i;
    return count == kLanes ? load(p) : load_first(p, count);
  } else {
    static_assert(element_bits(kFormat) <= 8 && (!has_blocks(kFormat) || kTraits.block % kLanes == 0));
    const std::byte* from = row + value_bytes(kFormat, i);
    std::byte padded[kLanes] = {};
    if constexpr (!has_blocks(kFormat)) {
      if (count < kLanes) {
        std::memcpy(padded, from, static_cast<size_t>(count));
        from = padded;
      }
    }
    const float scale = scale_at<kFormat>(source, scales, i);
    if (scale != scale) return splat(scale);  // of two NaNs, the compiler would choose which one comes out
    const F32 scaled = mul(load_small<kTraits.element>(from), splat(scale));
    if constexpr (has_table_scale(kFormat)) return mul(scaled, splat(source.table_scale));  // the first product is exact
    return scaled;
  }
}

// The dtype of an element type.
template <class T>
constexpr DType kDType = std::is_same_v<T, float>  ? DType::kF32
                         : std::is_same_v<T, Bf16> ? DType::kBf16
                                                   : DType::kF16;

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
#endif  // __CUDACC__
