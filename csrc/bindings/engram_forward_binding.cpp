// torch binding of engram_forward: tensors in, EngramForwardParams out. No arithmetic here. The CUDA library has no kernel of it.
#ifndef EK_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <vector>

#include "bindings/tensors.h"
#include "kernels/engram_forward/engram_forward.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "engram_forward";
constexpr int64_t kTileTokens = 256;  // keys and values of V4.1: 13 MB, which a last-level cache holds
using OptionalTensor = std::optional<Tensor>;

EngramForwardParams params(const Tensor& hidden, const Tensor& rows, const OptionalTensor& scales, const Tensor& row_ids,
                           const Tensor& w_kv, const Tensor& w_hidden, const Tensor& w_key, const OptionalTensor& mask,
                           const RowSource& table) {
  expect_one_device(kOp, {{"hidden", &hidden},
                          {"row_ids", &row_ids},
                          {"w_kv", &w_kv},
                          {"w_hidden", &w_hidden},
                          {"w_key", &w_key},
                          {"mask", or_null(mask)}});
  expect_table_readable(kOp, rows, scales, hidden);
  EngramForwardParams p{};
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
  expect_dtype(kOp, "w_kv", w_kv, {hidden.scalar_type()});
  expect_shape(kOp, "w_kv", w_kv, {(p.branches + 1) * p.hidden_size, p.memory_size()}, 2);
  p.w_kv = w_kv.const_data_ptr();
  p.weights = gate_weights(kOp, w_hidden, w_key, hidden);
  p.mask = gate_mask(kOp, mask, p.num_tokens);
  return p;
}

// torch's matrix product. Past the dispatcher: nothing is to be recorded.
struct TorchProduct {
  Tensor memory, kv, w_kv;

  static Tensor as_matrix(const Tensor& x, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle view = nullptr;  // from where x begins: the offset is added to x's own
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &view));
    return Tensor(view);
  }
  static void run(int64_t count, void* context) {
    const auto& self = *static_cast<const TorchProduct*>(context);
    const int64_t size = self.memory.size(1), kv_size = self.kv.size(1);
    const Tensor memory = as_matrix(self.memory, count, size, size, 1), kv = as_matrix(self.kv, count, kv_size, kv_size, 1),
                 w = as_matrix(self.w_kv, size, kv_size, 1, size);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(kv.get(), memory.get(), w.get()));
  }
};

void run(EngramForwardParams p, const GateOptions& options, const Tensor& hidden, const Tensor& w_kv, const Tensor& out) {
  p.options = options;
  check_params(p);
  check_host_data(p);
  p.out = branch_rows(kOp, "out", out, hidden, 3);
  expect_one_device(kOp, {{"hidden", &hidden}, {"out", &out}});
  expect_apart_or_same(kOp, hidden, out);
  if (p.num_tokens == 0) return;
  const int64_t tile = std::min(p.num_tokens, kTileTokens);
  TorchProduct torch_product{new_output(hidden, {tile, p.memory_size()}), new_output(hidden, {tile, w_kv.size(0)}), w_kv};
  std::vector<int64_t> row_ids(static_cast<size_t>(tile * p.columns));
  const TileProduct product{TorchProduct::run,
                            &torch_product,
                            torch_product.memory.mutable_data_ptr(),
                            torch_product.kv.mutable_data_ptr(),
                            row_ids.data(),
                            tile};
  engram_forward_cpu(p, product, torch_threads());
}

Tensor engram_forward(const Tensor& hidden, const Tensor& rows, OptionalTensor scales, const Tensor& row_ids, const Tensor& w_kv,
                      const Tensor& w_hidden, const Tensor& w_key, OptionalTensor mask, std::string row_format, int64_t row_dim,
                      bool zero_scale_is_zero, double eps, double clamp, std::string zero_sign, bool add_residual,
                      double table_scale) {
  const EngramForwardParams p = params(hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask,
                                       row_source_of(kOp, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale));
  Tensor out = new_output(hidden, {p.num_tokens, p.branches, p.hidden_size});
  run(p, gate_options(kOp, eps, clamp, zero_sign, add_residual), hidden, w_kv, out);
  return out;
}

void engram_forward_out(const Tensor& hidden, const Tensor& rows, OptionalTensor scales, const Tensor& row_ids,
                        const Tensor& w_kv, const Tensor& w_hidden, const Tensor& w_key, OptionalTensor mask,
                        std::string row_format, int64_t row_dim, bool zero_scale_is_zero, double eps, double clamp,
                        std::string zero_sign, bool add_residual, double table_scale, const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"rows", &rows},
                     {"scales", or_null(scales)},
                     {"row_ids", &row_ids},
                     {"w_kv", &w_kv},
                     {"w_hidden", &w_hidden},
                     {"w_key", &w_key},
                     {"mask", or_null(mask)}});
  run(params(hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask,
             row_source_of(kOp, rows, scales, row_format, row_dim, zero_scale_is_zero, table_scale)),
      gate_options(kOp, eps, clamp, zero_sign, add_residual), hidden, w_kv, out);
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("engram_forward", TORCH_BOX(&engram_kernels::engram_forward));
  m.impl("engram_forward.out", TORCH_BOX(&engram_kernels::engram_forward_out));
}
#endif  // EK_WITH_CUDA
