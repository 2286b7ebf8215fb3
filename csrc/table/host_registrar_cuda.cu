// Host memory registered with CUDA: page-locked where it is, mapped for every device under its own address.
#include <cuda_runtime.h>

#include "table/host_registrar.h"

namespace engram_kernels {
namespace {

// the last error is taken, or the next kernel launch would report it
int registered(cudaError_t error) {
  (void)cudaGetLastError();
  return static_cast<int>(error);
}

int register_host(void* ptr, size_t bytes) {
  return registered(cudaHostRegister(ptr, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
}

int unregister_host(void* ptr) { return registered(cudaHostUnregister(ptr)); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace

HostRegistrar cuda_host_registrar() { return {register_host, unregister_host, error_text, false}; }

}  // namespace engram_kernels
