// What every launcher does around a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string_view>
#include <type_traits>
#include <utility>

#include "common/error.h"
#include "common/row_format.h"

#define EK_CUDA_CHECK(expr)                                                                                      \
  do {                                                                                                           \
    const cudaError_t ek_error = (expr);                                                                         \
    if (ek_error != cudaSuccess) EK_THROW_AS(std::runtime_error, #expr << ": " << cudaGetErrorString(ek_error)); \
  } while (0)

namespace engram_kernels {

constexpr int64_t kMaxGridX = 2147483647;  // CUDA limits of gridDim
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxSharedBytes = 48 * 1024;  // what a block may have without asking

// Multiprocessors of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  EK_CUDA_CHECK(cudaGetDevice(&device));
  EK_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Shared memory that a block of the current device may ask for.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  EK_CUDA_CHECK(cudaGetDevice(&device));
  EK_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Lets `kernel` use as much dynamic shared memory as a block of the current device can have, once per kernel and device.
// A launcher that set its own size each time would lower the limit between the setting and the launch of another thread.
inline void allow_max_shared_bytes(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;  // with the device
  int device = 0;
  EK_CUDA_CHECK(cudaGetDevice(&device));
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (done.count({kernel, device}) > 0) return;
  }
  cudaFuncAttributes attributes{};
  EK_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int bytes = max_shared_bytes() - static_cast<int>(attributes.sharedSizeBytes);
  EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const std::lock_guard<std::mutex> lock(mutex);
  done.insert({kernel, device});
}

// Whether a kernel of few tokens may be launched while the one before it on the stream still runs (programmatic dependent
// launch): asked for by ENGRAM_KERNELS_PDL=1, since no GPU has confirmed it, and on sm_90 and sm_100 alone.
inline bool overlaps_launches() {
  const char* asked = std::getenv("ENGRAM_KERNELS_PDL");
  if (asked == nullptr || std::string_view(asked) != "1") return false;
  int device = 0, major = 0;
  EK_CUDA_CHECK(cudaGetDevice(&device));
  EK_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9 || major == 10;
}

// Launches a kernel that begins with wait_for_predecessor. What lies before it on the stream need not be ours.
template <class... Params, class... Args>
void launch_overlapping(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps_launches() ? 1 : 0;
  EK_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

// Calls f with the dtype as a constant: a type whose `value` it is.
template <class Function>
void dispatch_dtype(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::kF32:
      return f(std::integral_constant<DType, DType::kF32>());
    case DType::kBf16:
      return f(std::integral_constant<DType, DType::kBf16>());
    case DType::kF16:
      return f(std::integral_constant<DType, DType::kF16>());
  }
}

#ifdef __CUDACC__
// First in a kernel of launch_overlapping, for every thread: nothing of memory is touched before, since whatever comes first
// on the stream may have written or may read it. From here on the next such kernel may be launched; it waits for this one.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A data error found on the device; raised later by whoever owns the counter.
__device__ inline void count_error(uint32_t* error_count) {
  if (error_count != nullptr) atomicAdd(error_count, 1U);
}
#endif

}  // namespace engram_kernels
