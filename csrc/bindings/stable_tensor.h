// What the bindings share: shape checks that keep a direct torch.ops call memory-safe, and torch's thread pool.
//
// The public Python function has already checked everything with better words; these checks are for a caller that
// goes to torch.ops.engram_kernels directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/error.h"
#include "common/parallel.h"

namespace engram_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

inline Parallel torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  }};
}

// Throws unless `x` has these sizes (kAnySize: not checked) and, where `dense_dims` > 0, its last dims are dense.
inline void expect_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> sizes,
                         int dense_dims) {
  bool ok = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    ok = ok && (size == kAnySize || x.size(dim) == size);
    ++dim;
  }
  EK_CHECK(ok, op << ": " << name << " has the wrong shape");
  if (x.numel() == 0) return;  // no element, no stride
  int64_t stride = 1;
  for (int64_t d = x.dim() - 1; d >= x.dim() - dense_dims; --d) {
    EK_CHECK(x.size(d) <= 1 || x.stride(d) == stride, op << ": dimension " << d << " of " << name << " is not dense");
    stride *= x.size(d);
  }
}

inline void expect_dtype(const char* op, const char* name, const Tensor& x, std::initializer_list<ScalarType> dtypes) {
  for (const ScalarType dtype : dtypes) {
    if (x.scalar_type() == dtype) return;
  }
  EK_THROW_AS(std::invalid_argument, op << ": " << name << " is " << torch::headeronly::toString(x.scalar_type())
                                        << ", expected " << torch::headeronly::toString(*dtypes.begin()));
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

}  // namespace engram_kernels
