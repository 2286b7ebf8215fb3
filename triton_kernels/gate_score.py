"""The scalar part of gate and gather_gate, in float32: csrc/kernels/gate/gate.h has the formula."""
import triton
import triton.language as tl


@triton.jit
def gate_score(dot, sum_hh, sum_kk, eps, clamp, SIZE: tl.constexpr, SIGN_AT_ZERO: tl.constexpr):
    """(rh, rk, x, gate) of a token and branch; NaN in gives NaN out."""
    rh = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_hh, SIZE * 1.0) + eps))
    rk = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_kk, SIZE * 1.0) + eps))
    x = dot * rh * rk * (1.0 / SIZE**0.5)
    magnitude = tl.abs(x)
    root = tl.sqrt_rn(tl.where(magnitude < clamp, clamp, magnitude))
    negative = (x.to(tl.uint32, bitcast=True) >> 31) != 0
    score = tl.where(negative, -root, root)
    if SIGN_AT_ZERO:
        score = tl.where(x == 0, 0.0, score)
    return rh, rk, x, tl.div_rn(1.0, 1.0 + tl.exp(-score))


@triton.jit
def gate_slopes(rh, rk, x, gate, dout_v, clamp, SIZE: tl.constexpr):
    """(a, b, c) of the backward formula; dout_v is dout . v. Inside the clamp they are 0."""
    magnitude = tl.abs(x)
    ds = dout_v * gate * (1.0 - gate)
    dx = tl.where(magnitude < clamp, 0.0, tl.div_rn(ds, 2.0 * tl.sqrt_rn(magnitude)))
    along = dx * x * (1.0 / SIZE)
    return dx * rh * rk * (1.0 / SIZE**0.5), along * rh * rh, along * rk * rk


@triton.jit
def mask_slopes(a, b, c, gate, alive):
    """Zeros where not `alive`, such that a * w * k - b * h is -0.0 for w, k and h of 0: added to grad_out, it changes no bit."""
    minus_zero = tl.cast(-2147483648, tl.int32).to(tl.float32, bitcast=True)  # Triton makes 0.0 of a literal
    return tl.where(alive, a, minus_zero), tl.where(alive, b, 0.0), tl.where(alive, c, 0.0), tl.where(alive, gate, 0.0)
