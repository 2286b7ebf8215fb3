// Checks of gate on host memory. Compiled once, for the plainest instruction set.
#include "kernels/gate/gate.h"

#include <limits>

namespace engram_kernels {

void check_gate_options(const char* op, const GateOptions& o) {
  EK_CHECK(o.eps >= 0 && std::isfinite(o.eps), op << ": eps is " << o.eps << ", expected a finite number >= 0");
  // at 0 the derivative of sqrt is infinite; the clamp is what keeps the backward finite. Some kernels take subnormals for 0
  EK_CHECK(o.clamp >= std::numeric_limits<float>::min() && std::isfinite(o.clamp),
           op << ": clamp is " << o.clamp << ", expected a finite number of at least " << std::numeric_limits<float>::min());
}

void check_params(const GateParams& p) {
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1,
           "gate: hidden has " << p.branches << " branches of size " << p.hidden_size << ", expected at least 1 of each");
  check_gate_options("gate", p.options);
}

}  // namespace engram_kernels
