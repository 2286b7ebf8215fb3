// gate: the contract that the CPU and CUDA kernels share. Edge cases: docs/ops.md, gate.
//
// For token t and branch m, in float32, with one rounding at the end:
//   dot = sum_i h*w_h * k*w_k       rh = rsqrt(mean h^2 + eps)      rk = rsqrt(mean k^2 + eps)
//   x   = dot * rh * rk / sqrt(H)   s  = copysign(sqrt(max(|x|, clamp)), x)       g = sigmoid(s)
//   out = h + g * v                 (without the residual: g * v)
// A masked token has g = 0: h passes bit for bit, its key and value are not read. Without the residual it is zeros.
//
// Backward, with dx = ds / (2 sqrt|x|) outside the clamp and 0 inside, ds = (dout . v) g (1 - g):
//   a = dx * rh * rk / sqrt(H)      b = dx * x * rh^2 / H           c = dx * x * rk^2 / H
//   dh = dout + a w_h w_k k - b h   dk = a w_h w_k h - c k          dv = sum_m g dout
//   dw_h = w_k sum_t a h k          dw_k = w_h sum_t a h k
#pragma once

#include <cmath>
#include <cstdint>

#include "common/error.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/row_format.h"

namespace engram_kernels {

// What gate and gather_gate share beside their rows.
struct GateOptions {
  float eps;
  float clamp;
  bool sign_at_zero;  // zero_sign "sign": s = 0 at x = 0; otherwise "copysign"
  bool add_residual;
};

// A [num_tokens, branches, hidden_size] array whose last dimension is dense; strides in elements, 0 allowed on inputs.
struct BranchRows {
  void* data;
  int64_t token_stride;
  int64_t branch_stride;

  template <class T>
  EK_INLINE T* row(int64_t t, int64_t m) const {
    return static_cast<T*>(data) + t * token_stride + m * branch_stride;
  }
};

struct GateWeights {
  const void* w_hidden;  // [branches, hidden_size], dense
  const void* w_key;
  DType dtype;  // of both: float32 or the dtype of hidden
};

struct GateParams {
  BranchRows hidden;
  BranchRows key;
  const void* value;  // [num_tokens, hidden_size], last dimension dense
  GateWeights weights;
  const uint8_t* mask;  // [num_tokens], nonzero = masked; or null
  BranchRows out;       // written; may be `hidden` itself
  int64_t value_stride;
  int64_t num_tokens;
  int64_t branches;
  int64_t hidden_size;
  DType dtype;  // of hidden, key, value, out
  GateOptions options;

  EK_INLINE bool masked(int64_t t) const { return mask != nullptr && mask[t] != 0; }
};

struct GateBwdParams {
  GateParams forward;   // its `out` is not used
  BranchRows grad_out;  // dtype of hidden
  BranchRows grad_hidden;
  BranchRows grad_key;
  void* grad_value;     // [num_tokens, hidden_size] dense
  void* grad_w_hidden;  // [branches, hidden_size] dense, dtype of the weights
  void* grad_w_key;
  void* scratch = nullptr;  // CUDA only: device memory of gate_bwd_cuda_scratch_bytes, 16-byte aligned
};

// On a GPU approximations to two units in the last place, which need no call.
#ifdef __CUDA_ARCH__
EK_INLINE float inverse_sqrt(float x) { return rsqrtf(x); }
EK_INLINE float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_INLINE float exponential(float x) { return __expf(x); }
EK_INLINE float divided(float x, float by) { return __fdividef(x, by); }
#else
EK_INLINE float inverse_sqrt(float x) { return 1.0F / sqrtf(x); }
EK_INLINE float square_root(float x) { return sqrtf(x); }
EK_INLINE float exponential(float x) { return expf(x); }
EK_INLINE float divided(float x, float by) { return x / by; }
#endif

struct GateScore {
  float rh, rk, x, gate;
};

// The scalar part of the formula, the one definition in C++. NaN in gives NaN out.
EK_INLINE GateScore gate_score(const GateOptions& o, int64_t hidden_size, float dot, float sum_hh, float sum_kk) {
  const float size = static_cast<float>(hidden_size);
  GateScore r;
  r.rh = inverse_sqrt(divided(sum_hh, size) + o.eps);
  r.rk = inverse_sqrt(divided(sum_kk, size) + o.eps);
  r.x = divided(dot * r.rh * r.rk, square_root(size));
  const float magnitude = fabsf(r.x);
  float s = copysignf(square_root(magnitude < o.clamp ? o.clamp : magnitude), r.x);
  if (o.sign_at_zero && r.x == 0.0F) s = 0.0F;
  r.gate = divided(1.0F, 1.0F + exponential(-s));
  return r;
}

struct GateSlopes {
  float a, b, c, gate;
};

// The factors of the backward formula; dout_v is dout . v.
EK_INLINE GateSlopes gate_slopes(const GateOptions& o, int64_t hidden_size, const GateScore& r, float dout_v) {
  const float size = static_cast<float>(hidden_size), magnitude = fabsf(r.x);
  const float ds = dout_v * r.gate * (1.0F - r.gate);
  const float dx = magnitude < o.clamp ? 0.0F : divided(ds, 2.0F * square_root(magnitude));
  const float along = divided(dx * r.x, size);
  return {divided(dx * r.rh * r.rk, square_root(size)), along * r.rh * r.rh, along * r.rk * r.rk, r.gate};
}

EK_INLINE GateSlopes gate_slopes(const GateOptions& o, int64_t hidden_size, float dot, float sum_hh, float sum_kk, float dout_v) {
  return gate_slopes(o, hidden_size, gate_score(o, hidden_size, dot, sum_hh, sum_kk), dout_v);
}

// Throws unless the numbers are in the ranges of the public functions: before they are rounded to float. `op` names the caller.
void check_gate_options(const char* op, double eps, double clamp);
// Throws unless sizes and constants are in range.
void check_params(const GateParams& p);

void gate_cpu(const GateParams& p, const Parallel& parallel);
void gate_bwd_cpu(const GateBwdParams& p, const Parallel& parallel);
#ifdef EK_WITH_CUDA
// Every pointer is device memory.
void gate_cuda(const GateParams& p, void* stream);
int64_t gate_bwd_cuda_scratch_bytes(const GateBwdParams& p);  // on the current device
void gate_bwd_cuda(const GateBwdParams& p, void* stream);
#endif

}  // namespace engram_kernels
