#pragma once

#include <pybind11/pybind11.h>

namespace engram_kernels {

void bind_memory(pybind11::module_& m);  // the classes of csrc/memory

}  // namespace engram_kernels
