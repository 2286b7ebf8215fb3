#include "prefetch/place_rows.h"

#include <cstring>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int64_t kGrainRows = 256;

}  // namespace

void check_params(const PlaceRowsParams& p) {
  EK_CHECK(p.count >= 0 && p.num_rows >= 0, "place_rows: " << p.count << " places among " << p.num_rows << " rows");
  EK_CHECK(p.row_bytes >= 1 && p.scale_bytes >= 0,
           "place_rows: rows have " << p.row_bytes << " bytes and scales of " << p.scale_bytes);
  EK_CHECK(p.count == 0 || (p.rows != nullptr && p.places != nullptr && (p.scale_bytes == 0 || p.scales != nullptr)),
           "place_rows: an array is missing");
  EK_CHECK(p.max_blocks >= 0, "place_rows: max_blocks is " << p.max_blocks << ", expected at least 0");
}

void place_rows_cpu(const PlaceRowsParams& p, const Parallel& parallel) {
  check_params(p);
  const auto inside = [&](int32_t row) { return row >= 0 && row < p.num_rows; };
  const auto place = [](std::byte* rows, int64_t bytes, const RowPlace& at) {
    std::memcpy(rows + at.to * bytes, rows + at.from * bytes, static_cast<size_t>(bytes));
  };
  parallel.for_range(p.count, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowPlace at = p.places[i];
      if (!inside(at.from) || !inside(at.to)) continue;
      place(p.rows, p.row_bytes, at);
      if (p.scale_bytes > 0) place(p.scales, p.scale_bytes, at);
    }
  });
}

}  // namespace engram_kernels
