// torch binding of gate: tensors in, GateParams out. No arithmetic here.
#include "bindings/tensors.h"

#include <tuple>

namespace engram_kernels {
namespace {

constexpr const char* kOp = "gate";
using OptionalTensor = std::optional<Tensor>;

GateParams params(const Tensor& hidden, const Tensor& key, const Tensor& value, const Tensor& w_hidden, const Tensor& w_key,
                  const OptionalTensor& mask, const GateOptions& options) {
  expect_one_device(kOp, {{"hidden", &hidden},
                          {"key", &key},
                          {"value", &value},
                          {"w_hidden", &w_hidden},
                          {"w_key", &w_key},
                          {"mask", or_null(mask)}});
  GateParams p{};
  p.dtype = float_dtype(kOp, "hidden", hidden);
  expect_shape(kOp, "hidden", hidden, {kAnySize, kAnySize, kAnySize}, 1);
  p.num_tokens = hidden.size(0);
  p.branches = hidden.size(1);
  p.hidden_size = hidden.size(2);
  p.hidden = branch_rows(kOp, "hidden", hidden, hidden);
  p.key = branch_rows(kOp, "key", key, hidden);
  expect_dtype(kOp, "value", value, {hidden.scalar_type()});
  expect_shape(kOp, "value", value, {p.num_tokens, p.hidden_size}, 1);
  p.value = value.const_data_ptr();
  p.value_stride = value.stride(0);
  p.weights = gate_weights(kOp, w_hidden, w_key, hidden);
  p.mask = gate_mask(kOp, mask, p.num_tokens);
  p.options = options;
  check_params(p);
  return p;
}

void run(GateParams p, const Tensor& hidden, const Tensor& out) {
  p.out = branch_rows(kOp, "out", out, hidden, 3);
  expect_one_device(kOp, {{"hidden", &hidden}, {"out", &out}});
  expect_apart_or_same(kOp, hidden, out);
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, hidden);
  gate_cuda(p, launch.stream());
#else
  gate_cpu(p, torch_threads());
#endif
}

Tensor gate(const Tensor& hidden, const Tensor& key, const Tensor& value, const Tensor& w_hidden, const Tensor& w_key,
            OptionalTensor mask, double eps, double clamp, std::string zero_sign, bool add_residual) {
  const GateParams p = params(hidden, key, value, w_hidden, w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual));
  Tensor out = new_output(hidden, {p.num_tokens, p.branches, p.hidden_size});
  run(p, hidden, out);
  return out;
}

void gate_out(const Tensor& hidden, const Tensor& key, const Tensor& value, const Tensor& w_hidden, const Tensor& w_key,
              OptionalTensor mask, double eps, double clamp, std::string zero_sign, bool add_residual, const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"key", &key}, {"value", &value}, {"w_hidden", &w_hidden}, {"w_key", &w_key}, {"mask", or_null(mask)}});
  run(params(hidden, key, value, w_hidden, w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual)), hidden, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_bwd(const Tensor& grad_out, const Tensor& hidden, const Tensor& key,
                                                            const Tensor& value, const Tensor& w_hidden, const Tensor& w_key,
                                                            OptionalTensor mask, double eps, double clamp, std::string zero_sign,
                                                            bool add_residual) {
  expect_one_device(kOp, {{"grad_out", &grad_out}, {"hidden", &hidden}});
  GateBwdParams p{};
  p.forward = params(hidden, key, value, w_hidden, w_key, mask, gate_options(kOp, eps, clamp, zero_sign, add_residual));
  p.grad_out = branch_rows(kOp, "grad_out", grad_out, hidden);
  const int64_t tokens = p.forward.num_tokens, branches = p.forward.branches, size = p.forward.hidden_size;
  Tensor grad_hidden = new_output(hidden, {tokens, branches, size});
  Tensor grad_key = new_output(hidden, {tokens, branches, size});
  Tensor grad_value = new_output(hidden, {tokens, size});
  Tensor grad_w_hidden = new_output(w_hidden, {branches, size});
  Tensor grad_w_key = new_output(w_key, {branches, size});
  p.grad_hidden = branch_rows(kOp, "grad_hidden", grad_hidden, hidden, 3);
  p.grad_key = branch_rows(kOp, "grad_key", grad_key, hidden, 3);
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_w_hidden = grad_w_hidden.mutable_data_ptr();
  p.grad_w_key = grad_w_key.mutable_data_ptr();
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, hidden);
  const Tensor scratch = launch.scratch(gate_bwd_cuda_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  gate_bwd_cuda(p, launch.stream());
#else
  gate_bwd_cpu(p, torch_threads());
#endif
  return {grad_hidden, grad_key, grad_value, grad_w_hidden, grad_w_key};
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("gate", TORCH_BOX(&engram_kernels::gate));
  m.impl("gate.out", TORCH_BOX(&engram_kernels::gate_out));
  m.impl("gate_bwd", TORCH_BOX(&engram_kernels::gate_bwd));
}
