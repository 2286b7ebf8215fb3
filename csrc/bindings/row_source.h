// A table's tensors as the kernels see them, for the bindings of every op that reads rows.
#pragma once

#include <limits>
#include <string>

#include "bindings/backend.h"
#include "common/row_format.h"
#include "common/row_ids.h"

namespace engram_kernels {

inline DType dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      EK_THROW_AS(std::invalid_argument,
                  op << ": " << name << " is " << torch::headeronly::toString(type) << ", expected Float, BFloat16 or Half");
  }
}

// Throws unless the kernels can read the table from the device of `like`. A GPU also reads pinned host memory.
inline void expect_table_readable(const char* op, const Tensor& rows, const std::optional<Tensor>& scales, const Tensor& like) {
  for (const auto& [name, x] : {std::pair{"rows", &rows}, std::pair{"scales", or_null(scales)}}) {
    if (x == nullptr) continue;
#ifdef EK_WITH_CUDA
    expect_readable(op, name, *x, like.get_device_index());
#else
    expect_on_device(op, name, *x, like.get_device_index());
#endif
  }
}

// Dtype and width of the tensors are checked here, sizes against the format by check_row_source.
inline RowSource row_source_of(const char* op, const Tensor& rows, const std::optional<Tensor>& scales,
                               const std::string& row_format, int64_t row_dim, bool zero_scale_is_zero) {
  RowSource s{};
  s.format = row_format_from_name(op, row_format.c_str());
  const bool is_float = s.format == RowFormat::kF32 || s.format == RowFormat::kBf16 || s.format == RowFormat::kF16;
  EK_CHECK(row_dim >= 1 && row_dim <= std::numeric_limits<int>::max(), op << ": row_dim is " << row_dim);
  expect_dtype(op, "rows", rows,
               {s.format == RowFormat::kF32           ? ScalarType::Float
                : s.format == RowFormat::kBf16        ? ScalarType::BFloat16
                : s.format == RowFormat::kF16         ? ScalarType::Half
                : s.format == RowFormat::kInt8Group32 ? ScalarType::Char
                                                      : ScalarType::Byte});
  const int64_t element = is_float ? (s.format == RowFormat::kF32 ? 4 : 2) : 1;
  const bool packed = s.format == RowFormat::kFp8Block32Packed;
  expect_shape(op, "rows", rows, {kAnySize, packed ? kAnySize : row_dim}, 1);
  EK_CHECK(!packed || rows.size(1) >= row_value_bytes(s.format, row_dim),
           op << ": rows are " << rows.size(1) << " bytes wide, expected at least " << row_value_bytes(s.format, row_dim));
  s.rows = static_cast<const std::byte*>(rows.const_data_ptr());
  s.num_rows = rows.size(0);
  // the stride of a single row means nothing
  s.row_stride_bytes = s.num_rows > 1 ? rows.stride(0) * element : rows.size(1) * element;
  s.row_dim = static_cast<int>(row_dim);
  s.zero_scale_is_zero = zero_scale_is_zero;
  const bool wants_scales =
      s.format == RowFormat::kFp8Block32 || s.format == RowFormat::kFp8Tensor || s.format == RowFormat::kInt8Group32;
  EK_CHECK(scales.has_value() == wants_scales,
           op << ": row format " << row_format << (wants_scales ? " needs" : " has no") << " scales");
  if (!wants_scales) return s;
  expect_dtype(op, "scales", *scales, {s.format == RowFormat::kFp8Block32 ? ScalarType::Byte : ScalarType::Float});
  s.scales = static_cast<const std::byte*>(scales->const_data_ptr());
  if (s.format == RowFormat::kFp8Tensor) {
    expect_shape(op, "scales", *scales, {1}, 0);
    return s;
  }
  expect_shape(op, "scales", *scales, {s.num_rows, row_dim / kScaleBlock}, 1);
  const int64_t scale_element = s.format == RowFormat::kFp8Block32 ? 1 : 4;
  s.scale_stride_bytes = (s.num_rows > 1 ? scales->stride(0) : scales->size(1)) * scale_element;
  return s;
}

// Row ids of any shape, dense.
inline RowIds row_ids_of(const char* op, const Tensor& row_ids) {
  expect_dtype(op, "row_ids", row_ids, {ScalarType::Int, ScalarType::Long});
  EK_CHECK(row_ids.is_contiguous(), op << ": row_ids is not contiguous");
  return {row_ids.const_data_ptr(), row_ids.numel(), row_ids.scalar_type() == ScalarType::Long};
}

// Throws IndexError unless every id names a row or is -1.
inline void check_row_ids_of(const char* op, const Tensor& row_ids, const RowIds& ids, int64_t num_rows) {
  std::vector<int64_t> sizes(static_cast<size_t>(row_ids.dim()));
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = row_ids.size(static_cast<int64_t>(d));
  check_row_ids(op, ids, num_rows, sizes.data(), static_cast<int>(sizes.size()));
}

}  // namespace engram_kernels
