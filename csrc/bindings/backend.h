// Which device a binding serves. Each binding is compiled twice: for _C, which runs the CPU kernels, and with EK_WITH_CUDA
// for _C_cuda, which launches the CUDA kernels on torch's current stream.
#pragma once

#include "bindings/stable_tensor.h"

#ifdef EK_WITH_CUDA
#include "bindings/cuda_launch.h"
#define EK_DISPATCH_KEY CUDA
#else
#define EK_DISPATCH_KEY CPU
#endif

namespace engram_kernels {

inline void expect_on_device(const char* op, const char* name, const Tensor& x, int32_t device_index) {
#ifdef EK_WITH_CUDA
  EK_CHECK(x.is_cuda() && x.get_device_index() == device_index,
           op << ": " << name << " is not on cuda:" << device_index << ", where the other tensors are");
#else
  EK_CHECK(x.is_cpu(), op << ": " << name << " is not on the CPU, where the other tensors are");
  (void)device_index;
#endif
}

// Throws unless all of them (null: not given) are on one device of this library's kind: a pointer says nothing of where it leads.
inline void expect_one_device(const char* op, NamedTensors tensors) {
  int32_t device_index = -1;
  for (const auto& [name, x] : tensors) {
    if (x == nullptr) continue;
    if (device_index < 0) device_index = x->get_device_index();
    expect_on_device(op, name, *x, device_index);
  }
}

}  // namespace engram_kernels
