// The pybind11 module of the CUDA kernels: importing it registers the CUDA ops with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/cuda_launch.h"
#include "prefetch/copy_engine.h"
#include "table/host_registrar.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of engram_kernels; importing this registers the CUDA ops with torch";
  m.def(
      "take_errors",
      [] {
        std::vector<std::tuple<std::string, int, uint32_t>> errors;
        for (const auto& e : engram_kernels::take_cuda_errors()) errors.emplace_back(e.op, e.device, e.count);
        return errors;
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "[(op, device index, count)] of the data errors since the last call; waits for the devices.");
  m.def("cuda_engine", &engram_kernels::make_cuda_engine, pybind11::arg("device"), "A CopyEngine of _C on a CUDA device.");
  m.def(
      "host_registrar",
      [] {
        const engram_kernels::HostRegistrar r = engram_kernels::cuda_host_registrar();
        return std::make_tuple(reinterpret_cast<uintptr_t>(r.register_host), reinterpret_cast<uintptr_t>(r.unregister_host),
                               reinterpret_cast<uintptr_t>(r.error_text), r.counts_memlock);
      },
      "cudaHostRegister, as arguments of _C.HostRegistrar.");
}
