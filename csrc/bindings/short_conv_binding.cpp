// torch binding of short_conv, its backward and its stateful form: tensors in, params out. No arithmetic here.
#include <limits>

#include "bindings/tensors.h"
#include "kernels/short_conv/short_conv.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "short_conv";

ShortConvParams make_params(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& cu_seqlens,
                            int64_t dilation, double eps) {
  expect_one_device(kOp, {{"x", &x}, {"weight", &weight}, {"norm_weight", &norm_weight}, {"cu_seqlens", &cu_seqlens}});
  ShortConvParams p{};
  expect_shape(kOp, "x", x, {kAnySize, kAnySize, kAnySize}, 1);
  p.dtype = float_dtype(kOp, "x", x);
  p.num_tokens = x.size(0);
  p.branches = x.size(1);
  p.hidden_size = x.size(2);
  expect_dtype(kOp, "weight", weight, {x.scalar_type(), ScalarType::Float});
  p.weight_dtype = float_dtype(kOp, "weight", weight);
  expect_shape(kOp, "weight", weight, {p.branches, p.hidden_size, kAnySize}, 3);
  expect_dtype(kOp, "norm_weight", norm_weight, {weight.scalar_type()});
  expect_shape(kOp, "norm_weight", norm_weight, {p.branches, p.hidden_size}, 2);
  expect_dtype(kOp, "cu_seqlens", cu_seqlens, {ScalarType::Int});
  expect_shape(kOp, "cu_seqlens", cu_seqlens, {kAnySize}, 1);
  EK_CHECK(cu_seqlens.numel() >= 1, kOp << ": cu_seqlens is empty");
  EK_CHECK(dilation >= 1 && dilation <= INT32_MAX / kMaxTaps,
           kOp << ": dilation is " << dilation << ", expected 1.." << INT32_MAX / kMaxTaps);
  EK_CHECK(eps >= 0 && eps <= std::numeric_limits<float>::max(), kOp << ": eps is " << eps << ", expected a finite number >= 0");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.norm_weight = norm_weight.const_data_ptr();
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.num_sequences = cu_seqlens.numel() - 1;
  p.x_token_stride = x.stride(0);
  p.x_branch_stride = x.stride(1);
  p.width = static_cast<int>(weight.size(2));
  p.dilation = static_cast<int>(dilation);
  p.eps = static_cast<float>(eps);
  check_params(p);
  return p;
}

void run(ShortConvParams p, const Tensor& x, const Tensor& out) {
  expect_dtype(kOp, "out", out, {x.scalar_type()});
  expect_shape(kOp, "out", out, {p.num_tokens, p.branches, p.hidden_size}, 3);
  expect_one_device(kOp, {{"x", &x}, {"out", &out}});
  p.out = out.mutable_data_ptr();
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, x);
  p.error_count = launch.error_count();
  short_conv_cuda(p, launch.stream());
#else
  check_host_data(p);
  short_conv_cpu(p, torch_threads());
#endif
}

void short_conv_out(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& cu_seqlens, int64_t dilation,
                    double eps, const Tensor& out) {
  expect_apart_from(kOp, out, {{"x", &x}, {"weight", &weight}, {"norm_weight", &norm_weight}, {"cu_seqlens", &cu_seqlens}});
  run(make_params(x, weight, norm_weight, cu_seqlens, dilation, eps), x, out);
}

Tensor short_conv(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& cu_seqlens, int64_t dilation,
                  double eps) {
  expect_shape(kOp, "x", x, {kAnySize, kAnySize, kAnySize}, 1);
  Tensor out = new_output(x, {x.size(0), x.size(1), x.size(2)});
  short_conv_out(x, weight, norm_weight, cu_seqlens, dilation, eps, out);
  return out;
}

// The rings, where they lie and how far they have come.
void set_state(ShortConvParams* p, const Tensor& x, const Tensor& positions, const Tensor& state,
               const std::optional<Tensor>& state_indices, const std::optional<Tensor>& state_ends) {
  expect_one_device(kOp, {{"x", &x},
                          {"positions", &positions},
                          {"state", &state},
                          {"state_indices", or_null(state_indices)},
                          {"state_ends", or_null(state_ends)}});
  expect_dtype(kOp, "positions", positions, {ScalarType::Int, ScalarType::Long});
  expect_shape(kOp, "positions", positions, {p->num_sequences}, 0);
  expect_dtype(kOp, "state", state, {x.scalar_type()});
  expect_shape(kOp, "state", state,
               {state_indices.has_value() ? kAnySize : p->num_sequences, kAnySize, p->branches, p->hidden_size}, 3);
  p->num_rings = state.size(0);
  p->slots = state.size(1);
  EK_CHECK(p->slots >= p->reach(),
           kOp << ": state has " << p->slots << " slots, expected at least " << p->reach() << ", (W-1) * dilation");
  EK_CHECK(p->num_rings <= 1 || state.stride(0) >= p->slots * p->branches * p->hidden_size,
           kOp << ": the rings of state share memory");
  if (state_indices.has_value()) {
    expect_dtype(kOp, "state_indices", *state_indices, {positions.scalar_type()});
    expect_shape(kOp, "state_indices", *state_indices, {p->num_sequences}, 0);
    p->state_indices = state_indices->const_data_ptr();
    p->index_stride = state_indices->stride(0);
  }
  if (state_ends.has_value()) {
    expect_dtype(kOp, "state_ends", *state_ends, {ScalarType::Long});
    expect_shape(kOp, "state_ends", *state_ends, {p->num_rings, 2}, 2);
    p->state_ends = state_ends->mutable_data_ptr<int64_t>();
  }
  p->positions = positions.const_data_ptr();
  p->position_stride = positions.stride(0);
  p->positions_are_64 = positions.scalar_type() == ScalarType::Long;
  p->state = state.mutable_data_ptr();
  p->state_ring_stride = state.stride(0);
}

void short_conv_update_out(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& cu_seqlens,
                           const Tensor& positions, int64_t dilation, double eps, const Tensor& state,
                           std::optional<Tensor> state_indices, std::optional<Tensor> state_ends, const Tensor& out) {
  ShortConvParams p = make_params(x, weight, norm_weight, cu_seqlens, dilation, eps);
  set_state(&p, x, positions, state, state_indices, state_ends);
  for (const Tensor* written : {&out, &state, or_null(state_ends)}) {
    if (written == nullptr) continue;
    expect_apart_from(kOp, *written,
                      {{"x", &x},
                       {"weight", &weight},
                       {"norm_weight", &norm_weight},
                       {"cu_seqlens", &cu_seqlens},
                       {"positions", &positions},
                       {"state_indices", or_null(state_indices)}});
  }
  expect_apart_from(kOp, out, {{"state", &state}, {"state_ends", or_null(state_ends)}});
  if (state_ends.has_value()) expect_apart(kOp, "state_ends", *state_ends, state);
  run(p, x, out);
}

Tensor short_conv_update(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& cu_seqlens,
                         const Tensor& positions, int64_t dilation, double eps, const Tensor& state,
                         std::optional<Tensor> state_indices, std::optional<Tensor> state_ends) {
  expect_shape(kOp, "x", x, {kAnySize, kAnySize, kAnySize}, 1);
  Tensor out = new_output(x, {x.size(0), x.size(1), x.size(2)});
  short_conv_update_out(x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices, state_ends, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> short_conv_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                  const Tensor& norm_weight, const Tensor& cu_seqlens, int64_t dilation,
                                                  double eps) {
  ShortConvBwdParams p{};
  p.forward = make_params(x, weight, norm_weight, cu_seqlens, dilation, eps);
  expect_one_device(kOp, {{"x", &x}, {"grad_out", &grad_out}});
#ifndef EK_WITH_CUDA
  check_host_data(p.forward);
#endif
  expect_dtype(kOp, "grad_out", grad_out, {x.scalar_type()});
  expect_shape(kOp, "grad_out", grad_out, {x.size(0), x.size(1), x.size(2)}, 1);
  Tensor grad_x = new_output(x, {x.size(0), x.size(1), x.size(2)});
  Tensor grad_weight = new_output(weight, {weight.size(0), weight.size(1), weight.size(2)});
  Tensor grad_norm_weight = new_output(norm_weight, {weight.size(0), weight.size(1)});
  p.grad_out = grad_out.const_data_ptr();
  p.grad_token_stride = grad_out.stride(0);
  p.grad_branch_stride = grad_out.stride(1);
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_norm_weight = grad_norm_weight.mutable_data_ptr();
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, x);
  const Tensor scratch = launch.scratch(short_conv_bwd_cuda_scratch_bytes(p));
  p.scratch = scratch.mutable_data_ptr();
  p.forward.error_count = launch.error_count();
  short_conv_bwd_cuda(p, launch.stream());
#else
  short_conv_bwd_cpu(p, torch_threads());
#endif
  return {grad_x, grad_weight, grad_norm_weight};
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("short_conv", TORCH_BOX(&engram_kernels::short_conv));
  m.impl("short_conv.out", TORCH_BOX(&engram_kernels::short_conv_out));
  m.impl("short_conv_update", TORCH_BOX(&engram_kernels::short_conv_update));
  m.impl("short_conv_update.out", TORCH_BOX(&engram_kernels::short_conv_update_out));
  m.impl("short_conv_bwd", TORCH_BOX(&engram_kernels::short_conv_bwd));
}
