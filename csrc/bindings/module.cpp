// The pybind11 module: importing it registers the CPU ops with torch; it holds what is no tensor op.
#include <pybind11/pybind11.h>

#include "bindings/module.h"
#include "common/cpu_isa.h"
#include "common/output_pool.h"

namespace ek = engram_kernels;

PYBIND11_MODULE(_C, m) {
  m.doc() = "compiled kernels of engram_kernels; importing this registers the CPU ops with torch";
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
#ifdef EK_SIMDE
  m.attr("emulates_avx512") = true;
#else
  m.attr("emulates_avx512") = false;
#endif
  m.def("cpu_isa", [] { return ek::cpu_isa_name(ek::cpu_isa()); }, "Instruction set in use: portable, avx2 or avx512.");
  m.def("best_cpu_isa", [] { return ek::cpu_isa_name(ek::best_cpu_isa()); }, "Best instruction set of this machine.");
  m.def(
      "set_cpu_isa", [](const char* name) { ek::set_cpu_isa(ek::cpu_isa_from_name(name)); }, pybind11::arg("name"),
      "Chooses the instruction set (tests and benchmarks). ValueError when the machine cannot run it.");
  m.def("kept_output_bytes", &ek::kept_output_bytes, "Memory of large outputs that are gone, kept for the next ones.");
  ek::bind_table(m);
  ek::bind_client_tier(m);
  ek::bind_prefetcher(m);
  ek::bind_host_memory(m);
  ek::bind_probes(m);
}
