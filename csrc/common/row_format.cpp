#include "common/row_format.h"

#include <cstring>

namespace engram_kernels {

RowFormat row_format_from_name(const char* op, const char* name) {
  for (int i = 0; i < kNumRowFormats; ++i) {
    if (std::strcmp(name, traits_of(static_cast<RowFormat>(i)).name) == 0) return static_cast<RowFormat>(i);
  }
  EK_THROW_AS(std::invalid_argument, op << ": row_format is '" << name << "', which is no row format");
}

void check_row_source(const char* op, const RowSource& s) {
  EK_CHECK(s.row_dim >= 1, op << ": row_dim is " << s.row_dim << ", expected at least 1");
  const int block = traits_of(s.format).block;
  EK_CHECK(block == 0 || s.row_dim % block == 0,
           op << ": row_dim is " << s.row_dim << ", expected a multiple of " << block << " for this row format");
  EK_CHECK(s.num_rows >= 0, op << ": num_rows is " << s.num_rows);
  EK_CHECK(s.row_stride_bytes >= row_value_bytes(s.format, s.row_dim), op << ": rows are " << s.row_stride_bytes
                                                                          << " bytes apart, expected at least "
                                                                          << row_value_bytes(s.format, s.row_dim));
  EK_CHECK(s.scale_stride_bytes >= row_scale_bytes(s.format, s.row_dim), op << ": scales are " << s.scale_stride_bytes
                                                                            << " bytes apart, expected at least "
                                                                            << row_scale_bytes(s.format, s.row_dim));
  EK_CHECK(!has_scales(s.format) || s.scales != nullptr || s.num_rows == 0, op << ": scales are missing");
}

}  // namespace engram_kernels
