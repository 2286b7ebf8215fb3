"""Reference of row_update: plain PyTorch, written to be read. Contract: `engram_kernels.row_update`."""
import math

import torch
from torch import Tensor

from .gather_rows import decode

_PARTS = 16  # of a sum of squares
_LOW = 0xFFFFFFFF
_E4M3_MAX, _INT8_MAX, _LEAST_SCALE = 448.0, 127.0, 2.0**-126  # a scale below the last would itself lose bits
_DRAW_BITS = 16  # of what is cut off from a value of eight bits


def row_update(weight: Tensor, scales: Tensor | None, row_ids: Tensor, grad_rows: Tensor, second: Tensor | None,
               first: Tensor | None, steps: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, rule: str,
               lr: float, beta1: float, beta2: float, eps: float, grad_scale: float, step: int, stochastic: bool, seed: int,
               first_row: int) -> Tensor:
    """Updates rows and moments in place; returns the sums of squares [n]. See `engram_kernels.row_update`; the same bits."""
    ids, grads = row_ids.flatten(), grad_rows.reshape(row_ids.numel(), row_dim).float()
    squares = grads.new_zeros(ids.numel())
    rows = torch.unique(ids[ids != -1]).long()
    if not rows.numel():
        return squares
    g, where = _summed(rows, ids, grads)
    g = g * torch.tensor(grad_scale, dtype=torch.float32, device="cpu")
    total = _sum_of_squares(g)
    squares[where] = total
    if rule == "none":
        return squares
    keys = torch.zeros(rows.numel(), dtype=torch.int64, device=rows.device)
    at = [step] * rows.numel()
    if steps is not None:
        steps[rows] += 1
        own = steps[rows].long()
        keys = row_keys(rows + first_row, own, seed)
        at = at if step else own.tolist()
    moment = g
    if first is not None:
        old = first[rows].float()
        moment = old + (g - old) * _f32(1 - beta1) if rule == "adam" else old * _f32(beta1) + g
        first[rows] = _rounded(moment, first.dtype, keys >> 32 & _LOW, stochastic)
    size = _f32([step_size(rule, t, lr, beta1, beta2, first is not None) for t in at]).to(g.device)[:, None]
    if second is None:
        change = size * moment
    elif second.dim() == 1:
        mean, old = total / _f32(g.shape[1]), second[rows]
        second[rows] = old + ((mean - old) * _f32(1 - beta2) if rule == "adam" else mean)
        change = size / (_root(second[rows]) + _f32(eps))[:, None] * moment
    else:
        square, old = g * g, second[rows]
        second[rows] = old + ((square - old) * _f32(1 - beta2) if rule == "adam" else square)
        change = size * (moment / (_root(second[rows]) + _f32(eps)))
    before = None if scales is None else scales[rows]
    values = decode(weight[rows], before, row_format, row_dim, zero_scale_is_zero).float() - change
    if weight.is_floating_point():
        weight[rows] = _rounded(values, weight.dtype, keys & _LOW, stochastic)
        return squares
    random = random_bits(keys & _LOW, row_dim) if stochastic else None
    block = 32 if scales is None else row_dim // scales.shape[1]
    codes, now = encode(values, weight.dtype, block, before, random)
    if scales is None:
        codes = torch.cat([codes, now], 1)
    else:
        scales[rows] = now
    weight[rows, :codes.shape[1]] = codes
    return squares


def encode(values: Tensor, dtype: torch.dtype, block: int, before: Tensor | None,
           random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of eight bits: each value the nearest one, ties to even, or up in magnitude with the probability of what is cut off.

    The quotient of value and scale is that of float32. A block that holds a value which is not finite gets a scale that is NaN.

    Args:
        values: float32 [n, D].
        dtype: int8: integers; uint8: e4m3.
        block: elements that share a scale.
        before: scales [n, D / block] that the rows had. float32: one stays where the largest value fits it and fills half of it.
            uint8, or None: scales are ue8m0.
        random: 32 bits for each element, as int64 [n, D]; None: to the nearest.

    Returns:
        codes [n, D] of `dtype`, and scales [n, D / block].
    """
    blocks = values.unflatten(1, (-1, block))
    largest = blocks.abs().amax(-1)
    finite, most = largest.isfinite(), torch.full_like(largest, _INT8_MAX if dtype == torch.int8 else _E4M3_MAX)
    if before is not None and before.dtype == torch.float32:
        scales = torch.where(finite, float_scales(largest, most, before), torch.nan)
        quotients = blocks.abs() / scales.unsqueeze(-1)
    else:
        exponents = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8  # of the least power that holds it: 448 is 1.75 * 2^8
        exponents = torch.where(largest == 0, 127, exponents.clamp(min=1))
        scales = torch.where(finite, exponents, 255).to(torch.uint8)
        quotients = blocks.abs() * ((254 - exponents) << 23).view(torch.float32).unsqueeze(-1)
        most = torch.where(exponents == 247, 240.0, most)  # one step below what would be decoded as 2^128
    quotients = torch.where(finite.unsqueeze(-1), quotients.minimum(most.unsqueeze(-1)), 0.0).flatten(1)
    negative = values.signbit() & finite.repeat_interleave(block, 1)
    if dtype == torch.int8:
        steps = _steps(quotients, torch.zeros_like(quotients, dtype=torch.int32), random)
        return torch.where(negative, -steps, steps).to(torch.int8), scales
    exponents = ((quotients.view(torch.int32) >> 23) - 121).clamp(min=0)  # 2^-6 and what is below have steps of 2^-9
    codes = _steps(quotients, 9 - exponents, random) + exponents * 8
    return (codes | negative.long() << 7).to(torch.uint8), scales


def _steps(size: Tensor, exponents: Tensor, random: Tensor | None) -> Tensor:
    """int64: size * 2^exponents as a whole number. What is cut off at random is first rounded to _DRAW_BITS bits."""
    bits = 0 if random is None else _DRAW_BITS
    whole = (size * ((127 + bits + exponents) << 23).view(torch.float32)).round().long()
    return whole if random is None else (whole + (random >> 32 - _DRAW_BITS)) >> _DRAW_BITS


def float_scales(largest: Tensor, most: Tensor, before: Tensor | None = None) -> Tensor:
    """float32 scales that bring the largest value to `most`; 1 for zeros. Those of `before` where they still serve."""
    scales = torch.where(largest == 0, 1.0, (largest / most).clamp(min=_LEAST_SCALE))
    scales = torch.where((scales * most).isinf(), torch.nextafter(scales, torch.zeros_like(scales)), scales)
    if before is None:
        return scales
    reach = before * most  # what its largest value is decoded to
    return torch.where((before > 0) & (largest <= reach) & (largest >= 0.5 * reach) & reach.isfinite(), before, scales)


def _f32(x: float | list[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float32, device="cpu")


def _root(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # torch's own root of a float32 is not always the nearest


def step_size(rule: str, t: int, lr: float, beta1: float, beta2: float, has_first: bool) -> float:
    """The factor of an update at step `t`, before it is rounded to float32."""
    if rule != "adam":
        return lr
    rate = lr * math.sqrt(1 - _power(beta2, t))
    return rate / (1 - _power(beta1, t)) if has_first else rate


def _power(base: float, n: int) -> float:
    """base**n by squaring, since no two libraries round pow alike."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= base
        base, n = base * base, n >> 1
    return result


def _summed(rows: Tensor, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [n, D] of the distinct rows, summed in the order of the positions, and the first position of each."""
    summed, where = grads.new_zeros(rows.numel(), grads.shape[1]), rows.new_full((rows.numel(),), -1)
    place = {row: i for i, row in enumerate(rows.tolist())}
    for position, row in enumerate(ids.tolist()):
        if row != -1:
            i = place[row]
            summed[i] += grads[position]
            where[i] = position if where[i] < 0 else where[i]
    return summed, where


def _sum_of_squares(g: Tensor) -> Tensor:
    """[n]: sums of squares over the last dimension, in _PARTS parts that are added at the end."""
    padded = torch.nn.functional.pad(g, (0, -g.shape[1] % _PARTS)).unflatten(1, (-1, _PARTS))
    parts = padded.new_zeros(g.shape[0], _PARTS)
    for block in (padded * padded).unbind(1):
        parts = parts + block
    while parts.shape[1] > 1:
        low, high = parts.chunk(2, 1)
        parts = low + high
    return parts[:, 0]


def _shifted(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << 64 - bits) - 1  # as unsigned


def _mixed(x: Tensor) -> Tensor:
    """splitmix64 of each element; arithmetic wraps."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def row_keys(names: Tensor, steps: Tensor, seed: int) -> Tensor:
    """64 bits, as int64, of each row [n] at its step; the lower half is for the row, the upper for its first moment."""
    return _mixed(_mixed(_mixed(torch.tensor(seed, device=names.device)) ^ names) ^ steps)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """32 bits [n, count] of each row's key and each element, as int64."""
    x = (torch.arange(count, device=keys.device) * 0x9E3779B9 + keys[:, None]) & _LOW
    x = (x ^ x >> 16) * 0x7FEB352D & _LOW
    x = (x ^ x >> 15) * 0x846CA68B & _LOW
    return x ^ x >> 16


def _rounded(values: Tensor, dtype: torch.dtype, keys: Tensor, stochastic: bool) -> Tensor:
    """float32 [n, D] in `dtype`: to nearest, or up in magnitude with the probability of what is cut off."""
    if dtype == torch.float32 or not stochastic:
        return values.to(dtype)
    random, bits = random_bits(keys, values.shape[1]), values.view(torch.int32).long() & _LOW
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 16 & 0x8000
    if dtype == torch.bfloat16:
        rounded = torch.where(magnitude > 0x7F800000, 0x7FC0, bits + (random >> 16) >> 16)
    else:
        scaled = torch.where(magnitude < 0x38800000, values.abs() * 2.0**24, 0.0)  # in steps of a subnormal half
        whole = scaled.floor()
        small = whole.long() + ((random >> 8).float() * 2.0**-24 < scaled - whole)
        large = torch.where(magnitude >= 0x47800000, 0x7C00, magnitude + (random >> 19) - (112 << 23) >> 13)
        large = torch.where(magnitude > 0x7F800000, 0x7E00, large)
        rounded = sign | torch.where(magnitude < 0x38800000, small, large)
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)
