// What the bindings of the ops share: the checks that keep a direct torch.ops call memory-safe, and tensors as the kernels see
// them.
//
// A caller may go to torch.ops.engram_kernels directly, so these checks alone must do; the public Python function checks the
// same with better words. Each binding is compiled twice: for _C, which runs the CPU kernels, and with EK_WITH_CUDA for
// _C_cuda, which launches the CUDA kernels on torch's current stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/huge_pages.h"
#include "common/output_pool.h"
#include "common/parallel.h"
#include "common/row_format.h"
#include "common/row_ids.h"
#include "kernels/gate/gate.h"

#ifdef EK_WITH_CUDA
#include "bindings/cuda_launch.h"
#define EK_DISPATCH_KEY CUDA
#else
#define EK_DISPATCH_KEY CPU
#endif

namespace engram_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

inline std::vector<int64_t> dense_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

inline int32_t dtype_number(ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  return to<int32_t>(from(dtype));
}

// A dense tensor on the device of `like`. torch::stable::new_empty would look the op up by its name, for half a microsecond.
inline Tensor new_dense(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), dense_strides(sizes).data(),
                                                  dtype_number(dtype), device_type, like.get_device_index(), &tensor));
  return Tensor(tensor);
}

#ifndef EK_WITH_CUDA
}  // namespace engram_kernels
// of torch's stable ABI from 2.11 on; null in an older one
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes,
                                                                const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                                                int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                                                                int64_t metadata_size, void (*deleter)(void* data, void* context),
                                                                void* context);
namespace engram_kernels {

// A dense tensor in the block, which goes back to the pool with it.
inline Tensor tensor_in(OutputBlock* block, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle tensor;
  const AOTITorchError error = torch_from_blob(
      block->data, static_cast<int64_t>(sizes.size()), sizes.data(), dense_strides(sizes).data(), 0, dtype_number(dtype),
      to<int32_t>(from(torch::headeronly::DeviceType::CPU)), -1, &tensor, to<int32_t>(from(torch::headeronly::Layout::Strided)),
      nullptr, 0, [](void*, void* context) { give_back_output_block(static_cast<OutputBlock*>(context)); }, block);
  if (error != AOTI_TORCH_SUCCESS) give_back_output_block(block);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(tensor);
}
#endif

// A new tensor, of the dtype of `like` unless another is given, that an op writes whole. On the host a large one lies in memory
// of the pool; where torch cannot take that (2.10), in fresh huge pages.
inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
#ifndef EK_WITH_CUDA
  const ScalarType type = dtype.value_or(like.scalar_type());
  int64_t bytes = type == ScalarType::Float || type == ScalarType::Int       ? 4
                  : type == ScalarType::BFloat16 || type == ScalarType::Half ? 2
                                                                             : 0;  // of no output
  for (const int64_t size : sizes) bytes *= size;
  if (bytes >= kLargeOutputBytes && torch_from_blob != nullptr) {
    if (OutputBlock* block = take_output_block(bytes)) return tensor_in(block, sizes, type);
  }
#endif
  Tensor out = new_dense(like, sizes, dtype.value_or(like.scalar_type()));
#ifndef EK_WITH_CUDA
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
#endif
  return out;
}

inline Parallel torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  }};
}

// "[2, any, 3]"
inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  Text text;
  for (const int64_t* size = sizes.begin(); size != sizes.end(); ++size) {
    text << (size == sizes.begin() ? "[" : ", ");
    *size == kAnySize ? text << "any" : text << *size;
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}
inline std::string shape_text(const Tensor& x) {
  Text text;
  for (int64_t d = 0; d < x.dim(); ++d) text << (d == 0 ? "[" : ", ") << x.size(d);
  text << (x.dim() == 0 ? "[]" : "]");
  return text.str();
}

// Throws unless `x` has these sizes (kAnySize: not checked) and, where `dense_dims` > 0, its last dims are dense.
inline void expect_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> sizes,
                         int dense_dims) {
  const auto found = x.sizes();  // once: each question to a tensor is a call
  const int64_t dims = static_cast<int64_t>(found.size());
  bool ok = found.size() == sizes.size(), empty = false;
  for (int64_t d = 0; ok && d < dims; ++d) {
    ok = sizes.begin()[d] == kAnySize || found[d] == sizes.begin()[d];
    empty = empty || found[d] == 0;
  }
  EK_CHECK(ok, op << ": " << name << " has shape " << shape_text(x) << ", expected " << shape_text(sizes));
  if (empty || dense_dims == 0) return;  // no element, no stride
  const auto strides = x.strides();
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= dims - dense_dims; --d) {
    EK_CHECK(found[d] <= 1 || strides[d] == stride, op << ": dimension " << d << " of " << name << " is not dense");
    stride *= found[d];
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

inline DType dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      EK_THROW_AS(std::invalid_argument,
                  op << ": " << name << " is " << torch::headeronly::toString(type) << ", expected Float, BFloat16 or Half");
  }
}

inline DType float_dtype(const char* op, const char* name, const Tensor& x) { return dtype_of(op, name, x.scalar_type()); }

struct ByteRange {
  uintptr_t begin, end;
};

inline ByteRange byte_range(const Tensor& x) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return {begin, begin};
    last += (sizes[d] - 1) * strides[d];
  }
  return {begin, begin + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(x.element_size()))};
}

// Throws where the bytes of `out` are those of an input that would be read after they are overwritten.
inline void expect_apart(const char* op, const char* name, ByteRange x, ByteRange out) {
  EK_CHECK(x.end <= out.begin || out.end <= x.begin || x.begin == x.end || out.begin == out.end,
           op << ": out shares memory with " << name);
}
inline void expect_apart(const char* op, const char* name, const Tensor& x, ByteRange out) {
  expect_apart(op, name, byte_range(x), out);
}
inline void expect_apart(const char* op, const char* name, const Tensor& x, const Tensor& out) {
  expect_apart(op, name, byte_range(x), byte_range(out));
}

using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

inline const Tensor* or_null(const std::optional<Tensor>& x) { return x.has_value() ? &*x : nullptr; }

// Throws where `out` shares memory with any of the inputs (null: not given): ids and offsets are checked, then read again while
// `out` is being written.
inline void expect_apart_from(const char* op, const Tensor& out, NamedTensors inputs) {
  const ByteRange range = byte_range(out);
  for (const auto& [name, x] : inputs) {
    if (x != nullptr) expect_apart(op, name, *x, range);
  }
}

// ---- devices --------------------------------------------------------------------------------------------------------

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

// ---- gate: branch rows, weights, options, and where `out` may lie ---------------------------------------------------

// `x` must be [T, M, H] of the dtype of `like`, its last dimension dense.
inline BranchRows branch_rows(const char* op, const char* name, const Tensor& x, const Tensor& like, int dense_dims = 1) {
  expect_dtype(op, name, x, {like.scalar_type()});
  expect_shape(op, name, x, {like.size(0), like.size(1), like.size(2)}, dense_dims);
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

inline GateWeights gate_weights(const char* op, const Tensor& w_hidden, const Tensor& w_key, const Tensor& hidden) {
  expect_dtype(op, "w_hidden", w_hidden, {hidden.scalar_type(), ScalarType::Float});
  expect_dtype(op, "w_key", w_key, {w_hidden.scalar_type()});
  expect_shape(op, "w_hidden", w_hidden, {hidden.size(1), hidden.size(2)}, 2);
  expect_shape(op, "w_key", w_key, {hidden.size(1), hidden.size(2)}, 2);
  return {w_hidden.const_data_ptr(), w_key.const_data_ptr(), float_dtype(op, "w_hidden", w_hidden)};
}

inline const uint8_t* gate_mask(const char* op, const std::optional<Tensor>& mask, int64_t num_tokens) {
  if (!mask.has_value()) return nullptr;
  expect_dtype(op, "mask", *mask, {ScalarType::Bool});
  expect_shape(op, "mask", *mask, {num_tokens}, 1);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

inline GateOptions gate_options(const char* op, double eps, double clamp, const std::string& zero_sign, bool add_residual) {
  EK_CHECK(zero_sign == "copysign" || zero_sign == "sign",
           op << ": zero_sign is '" << zero_sign << "', expected 'copysign' or 'sign'");
  check_gate_options(op, eps, clamp);
  return {static_cast<float>(eps), static_cast<float>(clamp), zero_sign == "sign", add_residual};
}

// `out` may be `hidden` itself: a row is written where it was read. A shifted view is no such case.
inline void expect_apart_or_same(const char* op, const Tensor& hidden, const Tensor& out) {
  bool same = hidden.const_data_ptr() == out.const_data_ptr();
  for (int64_t d = 0; d < hidden.dim(); ++d) same = same && (hidden.size(d) <= 1 || hidden.stride(d) == out.stride(d));
  if (!same) expect_apart(op, "hidden, without being it", hidden, out);
}

// ---- tables and row ids ---------------------------------------------------------------------------------------------

// Throws unless the kernels can read the table from the device of `like`. A GPU also reads pinned host memory.
inline void expect_table_readable(const char* op, const Tensor& rows, const std::optional<Tensor>& scales, const Tensor& like) {
  for (const auto& [name, x] : {std::pair{"rows", &rows}, std::pair{"scales", or_null(scales)}}) {
    if (x == nullptr) continue;
#ifdef EK_WITH_CUDA
    expect_readable(op, name, *x, like.get_device_index());
#else
    expect_on_device(op, name, *x, like.get_device_index());
#endif
  }
}

inline ScalarType element_type(RowFormat format) {
  switch (traits_of(format).element) {
    case RowElement::kF32:
      return ScalarType::Float;
    case RowElement::kBf16:
      return ScalarType::BFloat16;
    case RowElement::kF16:
      return ScalarType::Half;
    case RowElement::kInt8:
      return ScalarType::Char;
    case RowElement::kFp8E4m3:
    case RowElement::kE2m1:
      break;
  }
  return ScalarType::Byte;
}

// Dtype and width of the tensors are checked here, sizes against the format by check_row_source.
inline RowSource row_source_of(const char* op, const Tensor& rows, const std::optional<Tensor>& scales,
                               const std::string& row_format, int64_t row_dim, bool zero_scale_is_zero, double table_scale) {
  RowSource s{};
  s.format = row_format_from_name(op, row_format.c_str());
  EK_CHECK(row_dim >= 1 && row_dim <= std::numeric_limits<int>::max(), op << ": row_dim is " << row_dim);
  expect_dtype(op, "rows", rows, {element_type(s.format)});
  const int64_t element = static_cast<int64_t>(rows.element_size());
  const bool packed = traits_of(s.format).packed;
  expect_shape(op, "rows", rows, {kAnySize, packed ? kAnySize : value_bytes(s.format, row_dim) / element}, 1);
  EK_CHECK(!packed || rows.size(1) >= row_value_bytes(s.format, row_dim),
           op << ": rows are " << rows.size(1) << " bytes wide, expected at least " << row_value_bytes(s.format, row_dim));
  s.rows = static_cast<const std::byte*>(rows.const_data_ptr());
  s.num_rows = rows.size(0);
  // the stride of a single row means nothing
  s.row_stride_bytes = s.num_rows > 1 ? rows.stride(0) * element : rows.size(1) * element;
  s.row_dim = static_cast<int>(row_dim);
  s.zero_scale_is_zero = zero_scale_is_zero;
  s.table_scale = static_cast<float>(table_scale);
  const bool wants_scales = has_scales(s.format);
  EK_CHECK(scales.has_value() == wants_scales,
           op << ": row format " << row_format << (wants_scales ? " needs" : " has no") << " scales");
  if (!wants_scales) return s;
  expect_dtype(op, "scales", *scales, {scale_bytes(s.format) == 1 ? ScalarType::Byte : ScalarType::Float});
  s.scales = static_cast<const std::byte*>(scales->const_data_ptr());
  if (!has_row_scales(s.format)) {
    expect_shape(op, "scales", *scales, {1}, 0);
    return s;
  }
  expect_shape(op, "scales", *scales, {s.num_rows, scales_per_row(s.format, row_dim)}, 1);
  s.scale_stride_bytes = (s.num_rows > 1 ? scales->stride(0) : scales->size(1)) * scale_bytes(s.format);
  return s;
}

// Row ids of any shape, dense.
inline RowIds row_ids_of(const char* op, const Tensor& row_ids) {
  expect_dtype(op, "row_ids", row_ids, {ScalarType::Int, ScalarType::Long});
  EK_CHECK(row_ids.is_contiguous(), op << ": row_ids is not contiguous");
  return {row_ids.const_data_ptr(), row_ids.numel(), row_ids.scalar_type() == ScalarType::Long};
}

// Throws IndexError unless every id names a row or is -1.
inline void check_row_ids_of(const char* op, const Tensor& row_ids, const RowIds& ids, int64_t num_rows) {
  std::vector<int64_t> sizes(static_cast<size_t>(row_ids.dim()));
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = row_ids.size(static_cast<int64_t>(d));
  check_row_ids(op, ids, num_rows, sizes.data(), static_cast<int>(sizes.size()));
}

}  // namespace engram_kernels
