// Checks of gate on host memory. Compiled once, for the plainest instruction set.
#include <limits>

#include "kernels/gate/gate.h"

namespace engram_kernels {

void check_gate_options(const char* op, double eps, double clamp) {
  constexpr double kMin = std::numeric_limits<float>::min(), kMax = std::numeric_limits<float>::max();
  EK_CHECK(eps >= 0 && eps <= kMax, op << ": eps is " << eps << ", expected a finite number >= 0");
  // at 0 the derivative of sqrt is infinite; the clamp is what keeps the backward finite, and a GPU takes a subnormal for 0
  EK_CHECK(clamp >= kMin && clamp <= kMax, op << ": clamp is " << clamp << ", expected a number from " << kMin << " to " << kMax);
}

void check_params(const GateParams& p) {
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1,
           "gate: hidden has " << p.branches << " branches of size " << p.hidden_size << ", expected at least 1 of each");
  check_gate_options("gate", p.options.eps, p.options.clamp);
}

}  // namespace engram_kernels
