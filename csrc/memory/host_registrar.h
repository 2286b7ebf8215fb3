// The seam between host memory and whatever device wants to read it: three functions, so that memory made in one library can be
// registered by another.
#pragma once

#include <cstddef>

namespace engram_kernels {

struct HostRegistrar {
  // Makes [ptr, ptr + bytes), whole pages, readable by the device under the same address. 0, or an error number.
  int (*register_host)(void* ptr, size_t bytes);
  int (*unregister_host)(void* ptr);     // of a pointer that was registered
  const char* (*error_text)(int error);  // static text; may be null
  bool counts_memlock;                   // whether what is registered counts against RLIMIT_MEMLOCK
};

// Without a device nothing is registered: memory is read where it is, and no page is locked.
inline int register_nothing(void*, size_t) { return 0; }
inline int unregister_nothing(void*) { return 0; }
inline HostRegistrar cpu_host_registrar() { return {register_nothing, unregister_nothing, nullptr, false}; }

// cudaHostRegister; in the CUDA library only (host_registrar_cuda.cu). Its driver pins pages without regard to RLIMIT_MEMLOCK.
HostRegistrar cuda_host_registrar();

}  // namespace engram_kernels
