// Moves rows inside one array: what puts staged rows into the slots of a cache, on the device that holds both.
//
//   rows[places[i].to] = rows[places[i].from], and the same of scales where there are some
//
// No row is both read and written, and none is written twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/parallel.h"

namespace engram_kernels {

struct RowPlace {
  int32_t from, to;
};

struct PlaceRowsParams {
  std::byte* rows = nullptr;    // row r is the row_bytes from rows + r * row_bytes on
  std::byte* scales = nullptr;  // and its scales those from scales + r * scale_bytes on; null where scale_bytes is 0
  int64_t row_bytes = 0, scale_bytes = 0;
  int64_t num_rows = 0;              // a place outside of [0, num_rows) is left out
  const RowPlace* places = nullptr;  // [count]
  int64_t count = 0;
  int max_blocks = 0;  // CUDA only: blocks to run; 0: as many as there is work for
};

void check_params(const PlaceRowsParams& p);  // throws unless sizes and pointers agree
void place_rows_cpu(const PlaceRowsParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
void place_rows_cuda(const PlaceRowsParams& p, void* stream);
#endif

}  // namespace engram_kernels
