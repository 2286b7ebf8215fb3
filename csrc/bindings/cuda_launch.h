// Where a CUDA kernel runs: device, stream, scratch memory and the counters of data errors. Part of _C_cuda only.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace engram_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor current while it lives.
class CudaLaunch {
 public:
  CudaLaunch(const char* op, const Tensor& like);

  void* stream() const { return stream_; }  // torch's current one
  uint32_t* error_count() const;            // device memory, of this op on this device
  // Device memory, valid for the work that is queued on the stream before the tensor goes.
  Tensor scratch(int64_t bytes) const { return torch::stable::new_empty(like_, {bytes}, ScalarType::Byte); }

 private:
  const char* op_;
  const Tensor& like_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The ids in order, and where each stood (int64); equal ids in the order of their positions.
std::pair<Tensor, Tensor> sorted_ids(const Tensor& ids);

// Throws unless `x` is on the device, or in host memory that the device can read (pinned): then its address there is the same.
void expect_readable(const char* op, const char* name, const Tensor& x, int32_t device_index);

struct CudaErrors {
  std::string op;
  int device;
  uint32_t count;
};

// What the kernels counted since the last call, on every device; waits for the devices.
std::vector<CudaErrors> take_cuda_errors();

}  // namespace engram_kernels
