#pragma once

#include <pybind11/pybind11.h>

namespace engram_kernels {

void bind_probes(pybind11::module_& m);  // the loops of csrc/probes

}  // namespace engram_kernels
