// What the bindings of gate and gather_gate share: branch rows, weights, options, and where `out` may lie.
#pragma once

#include "bindings/backend.h"
#include "kernels/gate/gate.h"

namespace engram_kernels {

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
  return {static_cast<float>(eps), static_cast<float>(clamp), zero_sign == "sign", add_residual};
}

// `out` may be `hidden` itself: a row is written where it was read. A shifted view is no such case.
inline void expect_apart_or_same(const char* op, const Tensor& hidden, const Tensor& out) {
  bool same = hidden.const_data_ptr() == out.const_data_ptr();
  for (int64_t d = 0; d < hidden.dim(); ++d) same = same && (hidden.size(d) <= 1 || hidden.stride(d) == out.stride(d));
  if (!same) expect_apart(op, "hidden, without being it", hidden, out);
}

}  // namespace engram_kernels
