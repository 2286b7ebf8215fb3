// The seam between host memory and whatever device wants to read it: three functions, so that memory made in one library can be
// registered by another.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

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

struct HostRegistrationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A range that is registered, chunk by chunk, since one call for a whole table can fail for want of one large range of bus
// addresses. A copy must not cross from one chunk into the next, kernels may. After a fork the child leaves it to its parent.
class HostRegistration {
 public:
  static constexpr int64_t kChunkBytes = int64_t{1} << 30;

  HostRegistration() = default;  // of nothing
  // [begin, begin + bytes), whole pages. HostRegistrationError: none of them stays registered.
  HostRegistration(const HostRegistrar& registrar, std::byte* begin, int64_t bytes, int64_t chunk_bytes = kChunkBytes);
  ~HostRegistration() { undo(); }
  HostRegistration(HostRegistration&& other) noexcept { *this = std::move(other); }
  HostRegistration& operator=(HostRegistration&& other) noexcept;

  int64_t bytes() const { return bytes_; }

 private:
  void undo() noexcept;

  HostRegistrar registrar_{};
  pid_t process_ = 0;
  std::vector<void*> chunks_;
  int64_t bytes_ = 0;
};

}  // namespace engram_kernels
