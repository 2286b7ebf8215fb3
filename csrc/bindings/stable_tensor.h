// What the bindings share: shape checks that keep a direct torch.ops call memory-safe, and torch's thread pool.
//
// A caller may go to torch.ops.engram_kernels directly, so these checks alone must do; the public Python function checks the same
// with better words.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "common/error.h"
#include "common/parallel.h"
#include "common/row_format.h"

namespace engram_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

inline Parallel torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
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
  EK_THROW_AS(std::invalid_argument, op << ": " << name << " is " << torch::headeronly::toString(x.scalar_type()) << ", expected "
                                        << torch::headeronly::toString(*dtypes.begin()));
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

inline DType float_dtype(const char* op, const char* name, const Tensor& x) {
  expect_dtype(op, name, x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  return x.scalar_type() == ScalarType::Float      ? DType::kF32
         : x.scalar_type() == ScalarType::BFloat16 ? DType::kBf16
                                                   : DType::kF16;
}

struct ByteRange {
  uintptr_t begin, end;
};

inline ByteRange byte_range(const Tensor& x) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 0) return {begin, begin};
    last += (x.size(d) - 1) * x.stride(d);
  }
  return {begin, begin + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(x.element_size()))};
}

// Throws where `out` shares memory with an input that would be read after it is overwritten.
inline void expect_apart(const char* op, const char* name, const Tensor& x, const Tensor& out) {
  const ByteRange a = byte_range(x), b = byte_range(out);
  EK_CHECK(a.end <= b.begin || b.end <= a.begin || a.begin == a.end || b.begin == b.end,
           op << ": out shares memory with " << name);
}

using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

inline const Tensor* or_null(const std::optional<Tensor>& x) { return x.has_value() ? &*x : nullptr; }

// Throws where `out` shares memory with any of the inputs (null: not given): ids and offsets are checked, then read again while
// `out` is being written.
inline void expect_apart_from(const char* op, const Tensor& out, NamedTensors inputs) {
  for (const auto& [name, x] : inputs) {
    if (x != nullptr) expect_apart(op, name, *x, out);
  }
}

}  // namespace engram_kernels
