// torch binding of gather_gate: tensors in, GatherGateParams out. No arithmetic here.
#include "bindings/tensors.h"

#include <tuple>

#include "kernels/gather_gate/gather_gate.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "gather_gate";
using OptionalTensor = std::optional<Tensor>;

GatherGateParams params(const Tensor& hidden, const RowSource& table, const Tensor& row_ids, const Tensor& w_hidden,
                        const Tensor& w_key, const OptionalTensor& mask, const GateOptions& options) {
  expect_one_device(
      kOp, {{"hidden", &hidden}, {"row_ids", &row_ids}, {"w_hidden", &w_hidden}, {"w_key", &w_key}, {"mask", or_null(mask)}});
  GatherGateParams p{};
  p.dtype = float_dtype(kOp, "hidden", hidden);
  expect_shape(kOp, "hidden", hidden, {kAnySize, kAnySize, kAnySize}, 1);
  p.num_tokens = hidden.size(0);
  p.branches = hidden.size(1);
  p.hidden_size = hidden.size(2);
  p.hidden = branch_rows(kOp, "hidden", hidden, hidden);
  p.table = table;
  expect_dtype(kOp, "row_ids", row_ids, {ScalarType::Int, ScalarType::Long});
  expect_shape(kOp, "row_ids", row_ids, {p.num_tokens, kAnySize}, 0);
  p.row_ids = row_ids.const_data_ptr();
  p.ids_are_int64 = row_ids.scalar_type() == ScalarType::Long;
  p.columns = row_ids.size(1);
  p.id_token_stride = row_ids.stride(0);
  p.id_column_stride = row_ids.stride(1);
  p.weights = gate_weights(kOp, w_hidden, w_key, hidden);
  p.mask = gate_mask(kOp, mask, p.num_tokens);
  p.options = options;
  check_params(p);
#ifndef EK_WITH_CUDA
  check_host_data(p);
#endif
  return p;
}

RowSource table_of(const Tensor& hidden, const Tensor& rows, const OptionalTensor& scales, const std::string& row_format,
                   int64_t row_dim, bool zero_scale_is_zero, double table_scale) {
  expect_table_readable(kOp, rows, scales, hidden);
  return row_source_of(kOp, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale);
}

void run(GatherGateParams p, const Tensor& hidden, const Tensor& out) {
  p.out = branch_rows(kOp, "out", out, hidden, 3);
  expect_one_device(kOp, {{"hidden", &hidden}, {"out", &out}});
  expect_apart_or_same(kOp, hidden, out);
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, hidden);
  p.error_count = launch.error_count();
  gather_gate_cuda(p, launch.stream());
#else
  gather_gate_cpu(p, torch_threads());
#endif
}

Tensor gather_gate(const Tensor& hidden, const Tensor& rows, OptionalTensor scales, const Tensor& row_ids, const Tensor& w_hidden,
                   const Tensor& w_key, OptionalTensor mask, std::string row_format, int64_t row_dim, bool zero_scale_is_zero,
                   double eps, double clamp, std::string zero_sign, bool add_residual, double table_scale) {
  const GatherGateParams p = params(hidden, table_of(hidden, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale),
                                    row_ids, w_hidden, w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual));
  Tensor out = new_output(hidden, {p.num_tokens, p.branches, p.hidden_size});
  run(p, hidden, out);
  return out;
}

void gather_gate_out(const Tensor& hidden, const Tensor& rows, OptionalTensor scales, const Tensor& row_ids,
                     const Tensor& w_hidden, const Tensor& w_key, OptionalTensor mask, std::string row_format, int64_t row_dim,
                     bool zero_scale_is_zero, double eps, double clamp, std::string zero_sign, bool add_residual,
                     double table_scale, const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"rows", &rows},
                     {"scales", or_null(scales)},
                     {"row_ids", &row_ids},
                     {"w_hidden", &w_hidden},
                     {"w_key", &w_key},
                     {"mask", or_null(mask)}});
  run(params(hidden, table_of(hidden, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale), row_ids, w_hidden,
             w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual)),
      hidden, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_gate_bwd(const Tensor& grad_out, const Tensor& hidden, const Tensor& rows,
                                                           OptionalTensor scales, const Tensor& row_ids, const Tensor& w_hidden,
                                                           const Tensor& w_key, OptionalTensor mask, std::string row_format,
                                                           int64_t row_dim, bool zero_scale_is_zero, double eps, double clamp,
                                                           std::string zero_sign, bool add_residual, double table_scale) {
  expect_one_device(kOp, {{"grad_out", &grad_out}, {"hidden", &hidden}});
  GatherGateBwdParams p{};
  p.forward = params(hidden, table_of(hidden, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale), row_ids,
                     w_hidden, w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual));
  p.grad_out = branch_rows(kOp, "grad_out", grad_out, hidden);
  const int64_t tokens = p.forward.num_tokens, branches = p.forward.branches, size = p.forward.hidden_size;
  Tensor grad_hidden = new_output(hidden, {tokens, branches, size});
  Tensor grad_rows = new_output(hidden, {tokens, p.forward.columns, row_dim});
  Tensor grad_w_hidden = new_output(w_hidden, {branches, size});
  Tensor grad_w_key = new_output(w_key, {branches, size});
  p.grad_hidden = branch_rows(kOp, "grad_hidden", grad_hidden, hidden, 3);
  p.grad_rows = grad_rows.mutable_data_ptr();
  p.grad_w_hidden = grad_w_hidden.mutable_data_ptr();
  p.grad_w_key = grad_w_key.mutable_data_ptr();
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, hidden);
  const Tensor scratch = launch.scratch(gather_gate_bwd_cuda_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  gather_gate_bwd_cuda(p, launch.stream());
#else
  gather_gate_bwd_cpu(p, torch_threads());
#endif
  return {grad_hidden, grad_rows, grad_w_hidden, grad_w_key};
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("gather_gate", TORCH_BOX(&engram_kernels::gather_gate));
  m.impl("gather_gate.out", TORCH_BOX(&engram_kernels::gather_gate_out));
  m.impl("gather_gate_bwd", TORCH_BOX(&engram_kernels::gather_gate_bwd));
}
