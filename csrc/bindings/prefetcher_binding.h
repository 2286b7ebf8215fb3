#pragma once

#include <pybind11/pybind11.h>

namespace engram_kernels {

void bind_prefetcher(pybind11::module_& m);  // after bind_table: a file table is a FileTier

}  // namespace engram_kernels
