#pragma once

#include <pybind11/pybind11.h>

namespace engram_kernels {

void bind_table(pybind11::module_& m);  // the classes of csrc/table
void bind_host_memory(pybind11::module_& m);

}  // namespace engram_kernels
