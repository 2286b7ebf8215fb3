// torch binding of gather_rows and its backward: tensors in, params out. No arithmetic here.
#include <vector>

#include "bindings/tensors.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "gather_rows";
constexpr const char* kBwdOp = "gather_rows_bwd";

std::vector<int64_t> with_row_dim(const Tensor& row_ids, int64_t row_dim) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < row_ids.dim(); ++d) sizes.push_back(row_ids.size(d));
  sizes.push_back(row_dim);
  return sizes;
}

// Throws unless `x` is [*row_ids.shape, any], dense.
void expect_one_row_an_id(const char* op, const char* name, const Tensor& x, const Tensor& row_ids) {
  bool ok = x.dim() == row_ids.dim() + 1 && x.is_contiguous();
  for (int64_t d = 0; ok && d < row_ids.dim(); ++d) ok = x.size(d) == row_ids.size(d);
  EK_CHECK(ok, op << ": " << name << " must be contiguous and have the shape of row_ids and one more dimension");
}

void run(const Tensor& rows, const std::optional<Tensor>& scales, const Tensor& row_ids, const std::string& row_format,
         int64_t row_dim, bool zero_scale_is_zero, ScalarType out_dtype, double table_scale, const Tensor& out) {
  expect_one_device(kOp, {{"row_ids", &row_ids}, {"out", &out}});
  expect_table_readable(kOp, rows, scales, row_ids);
  GatherRowsParams p{};
  p.source = row_source_of(kOp, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale);
  p.row_ids = row_ids_of(kOp, row_ids);
  p.out_dtype = dtype_of(kOp, "out_dtype", out_dtype);
  expect_dtype(kOp, "out", out, {out_dtype});
  expect_one_row_an_id(kOp, "out", out, row_ids);
  EK_CHECK(out.size(out.dim() - 1) == row_dim,
           kOp << ": the last dimension of out is " << out.size(out.dim() - 1) << ", expected row_dim, " << row_dim);
  p.out = static_cast<std::byte*>(out.mutable_data_ptr());
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, row_ids);
  p.error_count = launch.error_count();
  gather_rows_cuda(p, launch.stream());
#else
  check_params(p);
  check_row_ids_of(kOp, row_ids, p.row_ids, p.source.num_rows);
  gather_rows_cpu(p, torch_threads());
#endif
}

Tensor gather_rows(const Tensor& rows, std::optional<Tensor> scales, const Tensor& row_ids, std::string row_format,
                   int64_t row_dim, bool zero_scale_is_zero, ScalarType out_dtype, double table_scale) {
  EK_CHECK(row_dim >= 1 && row_dim <= std::numeric_limits<int>::max(), kOp << ": row_dim is " << row_dim);
  dtype_of(kOp, "out_dtype", out_dtype);
  Tensor out = new_output(row_ids, with_row_dim(row_ids, row_dim), out_dtype);
  run(rows, scales, row_ids, row_format, row_dim, zero_scale_is_zero, out_dtype, table_scale, out);
  return out;
}

void gather_rows_out(const Tensor& rows, std::optional<Tensor> scales, const Tensor& row_ids, std::string row_format,
                     int64_t row_dim, bool zero_scale_is_zero, ScalarType out_dtype, double table_scale, const Tensor& out) {
  expect_apart_from(kOp, out, {{"rows", &rows}, {"scales", or_null(scales)}, {"row_ids", &row_ids}});
  run(rows, scales, row_ids, row_format, row_dim, zero_scale_is_zero, out_dtype, table_scale, out);
}

Tensor gather_rows_bwd(const Tensor& grad, const Tensor& row_ids, int64_t num_rows, ScalarType dtype) {
  expect_one_device(kBwdOp, {{"grad", &grad}, {"row_ids", &row_ids}});
  GatherRowsBwdParams p{};
  p.row_ids = row_ids_of(kBwdOp, row_ids);
  p.grad_dtype = dtype_of(kBwdOp, "grad", grad.scalar_type());
  p.out_dtype = dtype_of(kBwdOp, "dtype", dtype);
  expect_one_row_an_id(kBwdOp, "grad", grad, row_ids);
  const int64_t row_dim = grad.size(grad.dim() - 1);
  EK_CHECK(row_dim >= 1 && row_dim <= std::numeric_limits<int>::max() && num_rows >= 0,
           kBwdOp << ": row_dim is " << row_dim << " and num_rows " << num_rows);
  p.row_dim = static_cast<int>(row_dim);
  p.num_rows = num_rows;
  check_params(p);
#ifndef EK_WITH_CUDA
  check_row_ids_of(kBwdOp, row_ids, p.row_ids, num_rows);
#endif
  Tensor grad_rows = new_output(grad, {num_rows, row_dim}, dtype);
  p.grad = static_cast<const std::byte*>(grad.const_data_ptr());
  p.grad_rows = static_cast<std::byte*>(grad_rows.mutable_data_ptr());
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kBwdOp, grad);
  torch::stable::zero_(grad_rows);
  const auto [ids, positions] = sorted_ids(row_ids);
  p.row_ids.data = ids.const_data_ptr();
  p.positions = positions.const_data_ptr<int64_t>();
  gather_rows_bwd_cuda(p, launch.stream());
#else
  gather_rows_bwd_cpu(p, RowOrder(p.row_ids, num_rows, torch_threads()), torch_threads());
#endif
  return grad_rows;
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("gather_rows", TORCH_BOX(&engram_kernels::gather_rows));
  m.impl("gather_rows.out", TORCH_BOX(&engram_kernels::gather_rows_out));
  m.impl("gather_rows_bwd", TORCH_BOX(&engram_kernels::gather_rows_bwd));
}
