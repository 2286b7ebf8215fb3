#include "bindings/cuda_launch.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>

#include "bindings/tensors.h"
#include "common/cuda_check.h"

namespace engram_kernels {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// Found in the libtorch_cuda that torch has loaded, so that this library links without one.
GetStream find_get_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  if (found == nullptr) {
    EK_THROW_AS(std::runtime_error, "engram_kernels: this torch has no CUDA streams; expected a CUDA build of torch >= 2.10");
  }
  return reinterpret_cast<GetStream>(found);
}

constexpr const char* kCountingOps[] = {"ngram_hash", "gather_rows", "gather_gate", "short_conv", "row_update"};
constexpr size_t kNumCountingOps = sizeof(kCountingOps) / sizeof(*kCountingOps);

// Device memory [kNumCountingOps], kept for the life of the process. Kernels only ever add, and the host only reads, so that no
// count is lost between a read and a clear; what was reported is remembered here.
struct Counters {
  uint32_t* memory = nullptr;
  uint32_t reported[kNumCountingOps] = {};
};

std::mutex counters_mutex;
std::map<int, Counters> counters;  // by device

// Zeros, there when this returns: on a stream of its own, since no other stream waits for a memset of the default one.
cudaError_t clear_counters(void* memory) {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(memory, 0, sizeof(uint32_t) * kNumCountingOps, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error;
}

// The one allocation of this library; legal while a graph is being captured, since it is no part of the graph.
uint32_t* make_counters() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  EK_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  const cudaError_t allocated = cudaMalloc(&memory, sizeof(uint32_t) * kNumCountingOps);
  const cudaError_t cleared = allocated == cudaSuccess ? clear_counters(memory) : allocated;
  EK_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  EK_CUDA_CHECK(cleared);
  return static_cast<uint32_t*>(memory);
}

}  // namespace

CudaLaunch::CudaLaunch(const char* op, const Tensor& like)
    : op_(op), like_(like), device_(like.get_device_index()), guard_(device_) {
  static const GetStream get_stream = find_get_stream();
  TORCH_ERROR_CODE_CHECK(get_stream(device_, &stream_));
}

uint32_t* CudaLaunch::error_count() const {
  const std::lock_guard<std::mutex> lock(counters_mutex);
  auto of_device = counters.find(device_);
  // only what was made is entered: an allocation that failed leaves nothing for take_cuda_errors to read
  if (of_device == counters.end()) of_device = counters.emplace(device_, Counters{make_counters()}).first;
  for (size_t i = 0; i < kNumCountingOps; ++i) {
    if (std::strcmp(kCountingOps[i], op_) == 0) return of_device->second.memory + i;
  }
  EK_THROW_AS(std::logic_error, op_ << ": counts no errors");
}

std::pair<Tensor, Tensor> sorted_ids(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(torch::stable::flatten(ids)), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

void expect_readable(const char* op, const char* name, const Tensor& x, int32_t device_index) {
  if (x.is_cuda()) {
    EK_CHECK(x.get_device_index() == device_index,
             op << ": " << name << " is on cuda:" << x.get_device_index() << ", the other tensors on cuda:" << device_index);
    return;
  }
  if (x.numel() == 0) return;
  EK_CHECK(x.is_cpu(), op << ": " << name << " is neither on a CUDA device nor in host memory");
  const auto readable = [](uintptr_t at) {
    cudaPointerAttributes attributes{};
    const cudaError_t found = cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(at));
    if (found != cudaSuccess) cudaGetLastError();  // clears it
    return found == cudaSuccess && reinterpret_cast<uintptr_t>(attributes.devicePointer) == at;
  };
  // its end too: a view may begin in memory that is pinned and go on in memory that is not
  const ByteRange range = byte_range(x);
  EK_CHECK(readable(range.begin) && readable(range.end - 1), op << ": " << name << " is in host memory that cuda:" << device_index
                                                                << " cannot read; pin it, or copy it to the device");
}

std::vector<CudaErrors> take_cuda_errors() {
  const std::lock_guard<std::mutex> lock(counters_mutex);
  std::vector<CudaErrors> errors;
  for (auto& [device, of_device] : counters) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    EK_CUDA_CHECK(cudaDeviceSynchronize());
    uint32_t counts[kNumCountingOps];
    EK_CUDA_CHECK(cudaMemcpy(counts, of_device.memory, sizeof(counts), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < kNumCountingOps; ++i) {
      const uint32_t fresh = counts[i] - of_device.reported[i];  // also where it has wrapped
      of_device.reported[i] = counts[i];
      if (fresh != 0) errors.push_back({kCountingOps[i], device, fresh});
    }
  }
  return errors;
}

}  // namespace engram_kernels
