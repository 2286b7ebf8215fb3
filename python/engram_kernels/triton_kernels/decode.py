"""Stored rows to float32 and float32 to outputs, shared by the kernels that read rows. Semantics 5."""
import triton
import triton.language as tl

from engram_kernels import _triton

BLOCK = tl.constexpr(32)  # elements that share a scale
# the interpreter truncates where a GPU rounds to nearest even, and is wrong about subnormals
_EMULATE_BF16 = tl.constexpr(_triton.INTERPRETED)


@triton.jit
def fp8_e4m3_to_float(byte):
    """By bit manipulation, the same on every target: exponent and mantissa move into float32's, 2^120 mends the bias."""
    bits = byte.to(tl.uint32)
    magnitude = bits & 0x7F
    value = (((bits & 0x80) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def ue8m0_to_float(byte, ZERO_IS_ZERO: tl.constexpr):
    """2^(byte - 127): 0 is 2^-127, a subnormal, or 0.0; 255 is NaN."""
    bits = byte.to(tl.uint32)
    low = 0 if ZERO_IS_ZERO else 0x00400000
    return tl.where(bits == 0, low, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.float32, bitcast=True)


@triton.jit
def to_float(x):
    if x.dtype == tl.bfloat16 and _EMULATE_BF16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even."""
    if dtype == tl.bfloat16 and _EMULATE_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
