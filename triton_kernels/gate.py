"""Triton kernels of gate, forward and backward. Contract and formulas: `engram_kernels.gate`, csrc/kernels/gate/gate.h.

Mapping  a program takes whole tokens, one after another, and all branches of each, so that a value is read once; a row of hidden
         and key is kept in registers between its sums and its output, and the product of the weights from token to token where
         it fits. The backward sums the weights' gradients from token to token where that fits (M 4, H 5120 in bfloat16 on
         sm_80 and sm_90), else in a kernel of their own, part of the tokens by part; another kernel adds the programs' or parts'
         sums in order.
Traffic  forward: hidden, key, value and out once. Backward: grad_out, hidden, key, value and three gradients once (where the
         sums do not fit, hidden and key twice, and a float32 per token and branch); the weights for each token, from a cache.
Limits   hidden_size and branches are constants, so a model compiles once.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.decode import round_to, to_float
from engram_kernels.triton_kernels.gate_score import gate_score, gate_slopes, mask_slopes
from engram_kernels.triton_runtime.launch import ceil_div, empty_like, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

ELEMENTS_A_THREAD = 8  # of a chunk: 16 bytes of bfloat16
MAX_HELD = 96  # registers per thread for what stays from token to token
ELEMENTS_A_THREAD_BWD = 4  # 5120 in five chunks, none in vain
SUM_CHUNK = 256


@triton.jit
def load_weights(w_hidden, w_key, at, inside):
    return to_float(tl.load(w_hidden + at, mask=inside, other=0.0)) * to_float(tl.load(w_key + at, mask=inside, other=0.0))


@triton.jit
def row_of(base, t, m, token_stride, branch_stride, UNIT: tl.constexpr):
    """Strides are in units of UNIT elements, so that the compiler knows how rows are aligned."""
    return base + (t * token_stride + m * branch_stride.to(tl.int64)) * UNIT


@triton.jit
def gate_kernel(hidden, key, value, w_hidden, w_key, mask, out, num_tokens, hidden_token, hidden_branch, key_token, key_branch,
                value_token, eps, clamp, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
                SIGN_AT_ZERO: tl.constexpr, ADD_RESIDUAL: tl.constexpr, HOLD: tl.constexpr):
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    lane = tl.arange(0, CHUNK)
    held = ()
    if HOLD:
        for i in tl.static_range(BRANCHES * CHUNKS):
            element = (i % CHUNKS) * CHUNK + lane
            held = held + (load_weights(w_hidden, w_key, (i // CHUNKS) * SIZE + element, element < SIZE),)
    for token in tl.range(tl.program_id(0), num_tokens.to(tl.int32), tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        alive = True
        if mask is not None:
            alive = tl.load(mask + t) == 0
        values = ()
        for c in tl.static_range(CHUNKS):
            element = c * CHUNK + lane
            values = values + (tl.load(value + t * value_token * UNIT + element, mask=(element < SIZE) & alive, other=0.0),)
        for m in tl.static_range(BRANCHES):
            h_row = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT)
            k_row = row_of(key, t, m, key_token, key_branch, UNIT)
            dot, hh, kk = (tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32))
            stored = ()
            for c in tl.static_range(CHUNKS):
                element = c * CHUNK + lane
                raw = tl.load(h_row + element, mask=element < SIZE, other=0.0)
                h, k = to_float(raw), to_float(tl.load(k_row + element, mask=(element < SIZE) & alive, other=0.0))
                if HOLD:
                    dot += h * k * held[m * CHUNKS + c]
                else:
                    dot += h * k * load_weights(w_hidden, w_key, m * SIZE + element, element < SIZE)
                hh += h * h
                kk += k * k
                stored = stored + (raw,)
            _, _, _, gate = gate_score(tl.sum(dot, 0), tl.sum(hh, 0), tl.sum(kk, 0), eps, clamp, SIZE, SIGN_AT_ZERO)
            for c in tl.static_range(CHUNKS):
                element = c * CHUNK + lane
                result = gate * to_float(values[c])
                if ADD_RESIDUAL:
                    result += to_float(stored[c])
                result = round_to(result, out.dtype.element_ty)
                if mask is not None:  # bit for bit
                    result = tl.where(alive, result, stored[c] if ADD_RESIDUAL else tl.zeros_like(stored[c]))
                tl.store(out + (t * BRANCHES + m) * SIZE + element, result, mask=element < SIZE)


@triton.jit
def gate_bwd_kernel(grad_out, hidden, key, value, w_hidden, w_key, mask, grad_hidden, grad_key, grad_value, slopes, partial_sums,
                    num_tokens, grad_token, grad_branch, hidden_token, hidden_branch, key_token, key_branch, value_token, eps,
                    clamp, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
                    SIGN_AT_ZERO: tl.constexpr, ADD_RESIDUAL: tl.constexpr, HOLD: tl.constexpr):
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    lane = tl.arange(0, CHUNK)
    dtype: tl.constexpr = grad_hidden.dtype.element_ty
    products = ()
    if HOLD:
        for _zeroed in tl.static_range(BRANCHES * CHUNKS):
            products = products + (tl.zeros([CHUNK], tl.float32),)
    for token in tl.range(tl.program_id(0), num_tokens.to(tl.int32), tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        alive = True
        if mask is not None:
            alive = tl.load(mask + t) == 0
        values, value_grads, new_products = (), (), ()
        for chunk in tl.static_range(CHUNKS):
            element = chunk * CHUNK + lane
            at = value + t * value_token * UNIT + lane
            values = values + (tl.load(at + chunk * CHUNK, mask=(element < SIZE) & alive, other=0.0),)
            value_grads = value_grads + (tl.zeros([CHUNK], tl.float32),)
        for m in tl.static_range(BRANCHES):
            d_row = row_of(grad_out, t, m, grad_token, grad_branch, UNIT) + lane
            h_row = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT) + lane
            k_row = row_of(key, t, m, key_token, key_branch, UNIT) + lane
            dot, hh, kk, dv = (tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32),
                               tl.zeros([CHUNK], tl.float32))
            douts, hiddens, keys = (), (), ()
            for chunk in tl.static_range(CHUNKS):
                element = chunk * CHUNK + lane
                douts = douts + (tl.load(d_row + chunk * CHUNK, mask=element < SIZE, other=0.0),)
                hiddens = hiddens + (tl.load(h_row + chunk * CHUNK, mask=(element < SIZE) & alive, other=0.0),)
                keys = keys + (tl.load(k_row + chunk * CHUNK, mask=(element < SIZE) & alive, other=0.0),)
                h, k = to_float(hiddens[chunk]), to_float(keys[chunk])
                dot += h * k * load_weights(w_hidden + lane, w_key + lane, m * SIZE + chunk * CHUNK, element < SIZE)
                hh += h * h
                kk += k * k
                dv += to_float(douts[chunk]) * to_float(values[chunk])
            rh, rk, x, gate = gate_score(tl.sum(dot, 0), tl.sum(hh, 0), tl.sum(kk, 0), eps, clamp, SIZE, SIGN_AT_ZERO)
            a, b, c = gate_slopes(rh, rk, x, gate, tl.sum(dv, 0), clamp, SIZE)
            if mask is not None:
                a, b, c, gate = mask_slopes(a, b, c, gate, alive)
            if not HOLD:
                tl.store(slopes + t * BRANCHES + m, a)
            new_value_grads = ()
            for chunk in tl.static_range(CHUNKS):
                element = chunk * CHUNK + lane
                inside = element < SIZE
                h, k, dout = to_float(hiddens[chunk]), to_float(keys[chunk]), to_float(douts[chunk])
                w = load_weights(w_hidden + lane, w_key + lane, m * SIZE + chunk * CHUNK, inside & alive)
                dh, dk = a * w * k - b * h, a * w * h - c * k
                if ADD_RESIDUAL:
                    dh += dout
                row = t * (BRANCHES * SIZE)
                tl.store((grad_hidden + row + lane) + (m * SIZE + chunk * CHUNK), round_to(dh, dtype), mask=inside)
                tl.store((grad_key + row + lane) + (m * SIZE + chunk * CHUNK), round_to(dk, dtype), mask=inside)
                if HOLD:
                    new_products = new_products + (products[m * CHUNKS + chunk] + a * h * k,)
                dvalue = gate * dout
                if mask is not None:
                    dvalue = tl.where(gate != 0, dvalue, 0.0)
                new_value_grads = new_value_grads + (value_grads[chunk] + dvalue,)
            value_grads = new_value_grads
        for chunk in tl.static_range(CHUNKS):
            element = chunk * CHUNK + lane
            tl.store((grad_value + t * SIZE + lane) + chunk * CHUNK, round_to(value_grads[chunk], dtype), mask=element < SIZE)
        if HOLD:
            products = new_products
    if HOLD:
        for i in tl.static_range(BRANCHES * CHUNKS):
            element = (i % CHUNKS) * CHUNK + lane
            to = partial_sums + (tl.program_id(0).to(tl.int64) * BRANCHES + i // CHUNKS) * SIZE
            tl.store(to + element, products[i], mask=element < SIZE)


@triton.jit
def gate_products_bwd_kernel(hidden, key, slopes, partial_sums, num_tokens, hidden_token, hidden_branch, key_token, key_branch,
                             SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    m, part = tl.program_id(1), tl.program_id(2)
    element = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for token in tl.range(part, num_tokens.to(tl.int32), tl.num_programs(2)):
        t = tl.cast(token, tl.int64)
        a = tl.load(slopes + t * BRANCHES + m)
        inside = element < tl.where(a != 0, SIZE, 0)  # what hides under a mask is not read
        h = to_float(tl.load(row_of(hidden, t, m, hidden_token, hidden_branch, UNIT) + element, mask=inside, other=0.0))
        k = to_float(tl.load(row_of(key, t, m, key_token, key_branch, UNIT) + element, mask=inside, other=0.0))
        total += a * h * k
    tl.store(partial_sums + (part * BRANCHES + m) * SIZE + element, total, mask=element < SIZE)


@triton.jit
def gate_weights_bwd_kernel(partial_sums, w_hidden, w_key, grad_w_hidden, grad_w_key, num_parts, TOTAL: tl.constexpr,
                            CHUNK: tl.constexpr):
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for part in tl.range(0, num_parts.to(tl.int32)):
        total += tl.load(partial_sums + tl.cast(part, tl.int64) * TOTAL + at, mask=at < TOTAL, other=0.0)
    dtype: tl.constexpr = grad_w_hidden.dtype.element_ty
    w_h = to_float(tl.load(w_hidden + at, mask=at < TOTAL, other=0.0))
    w_k = to_float(tl.load(w_key + at, mask=at < TOTAL, other=0.0))
    tl.store(grad_w_hidden + at, round_to(w_k * total, dtype), mask=at < TOTAL)
    tl.store(grad_w_key + at, round_to(w_h * total, dtype), mask=at < TOTAL)


def gate(hidden: Tensor, key: Tensor, value: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None, eps: float,
         clamp: float, zero_sign: str, add_residual: bool, out: Tensor | None = None) -> Tensor:
    """Gated hidden state [T, M, H]; see `engram_kernels.gate`."""
    if out is None:
        out = empty_like(hidden)
    num_tokens, branches, size = hidden.shape
    if num_tokens == 0:
        return out
    tuned = parameters("gate", hidden.device, shape_class(num_tokens))
    strides = (*hidden.stride()[:2], *key.stride()[:2], value.stride(0))
    unit, chunk = math.gcd(ELEMENTS_A_THREAD, *strides), chunk_of(size, tuned["num_warps"])
    hold = branches * ceil_div(size, chunk) * ELEMENTS_A_THREAD <= MAX_HELD
    launch(gate_kernel, (min(num_tokens, tuned["programs"]), 1, 1),
           (hidden, key, value, w_hidden, w_key, mask, out),
           (num_tokens, *[s // unit for s in strides], float(eps), float(clamp)),
           (size, branches, unit, chunk, zero_sign == "sign", add_residual, hold), tuned["num_warps"])
    return out


def gate_bwd(grad_out: Tensor, hidden: Tensor, key: Tensor, value: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None,
             eps: float, clamp: float, zero_sign: str, add_residual: bool) -> tuple[Tensor, ...]:
    """Gradients of hidden, key, value, w_hidden and w_key; the same bits every run."""
    num_tokens, branches, size = hidden.shape
    grads = tuple(empty_like(x) for x in (hidden, key, value, w_hidden, w_key))
    tuned = parameters("gate_bwd", hidden.device, shape_class(num_tokens))
    chunk = chunk_of(size, tuned["num_warps"], ELEMENTS_A_THREAD_BWD)
    # bfloat16 stays packed in registers; the others are kept as they are computed with. With float32 weights and no residual
    # ptxas spills a register
    packed = hidden.dtype == torch.bfloat16 and (add_residual or w_hidden.dtype == torch.bfloat16)
    held = tuned["held"] if packed else tuned["held"] // 2
    hold = branches * ceil_div(size, chunk) * ELEMENTS_A_THREAD_BWD <= held
    programs = min(num_tokens, tuned["programs"])
    parts = programs if hold else min(num_tokens, tuned["parts"])
    partial_sums = torch.empty((parts, branches, size), dtype=torch.float32, device=hidden.device)
    if num_tokens > 0:
        slopes = None if hold else torch.empty((num_tokens, branches), dtype=torch.float32, device=hidden.device)
        strides = (*grad_out.stride()[:2], *hidden.stride()[:2], *key.stride()[:2], value.stride(0))
        unit = math.gcd(ELEMENTS_A_THREAD, *strides)
        units = tuple(s // unit for s in strides)
        launch(gate_bwd_kernel, (programs, 1, 1),
               (grad_out, hidden, key, value, w_hidden, w_key, mask, *grads[:3], slopes, partial_sums if hold else None),
               (num_tokens, *units, float(eps), float(clamp)),
               (size, branches, unit, chunk, zero_sign == "sign", add_residual, hold), tuned["num_warps"])
        if not hold:
            chunk = chunk_of(size, 4)
            launch(gate_products_bwd_kernel, (ceil_div(size, chunk), branches, parts),
                   (hidden, key, slopes, partial_sums), (num_tokens, *units[2:6]), (size, branches, unit, chunk), 4)
    launch(gate_weights_bwd_kernel, (ceil_div(branches * size, SUM_CHUNK), 1, 1),
           (partial_sums, w_hidden, w_key, grads[3], grads[4]), (parts,), (branches * size, SUM_CHUNK), 1)
    return grads


def chunk_of(size: int, num_warps: int, elements_a_thread: int = ELEMENTS_A_THREAD) -> int:
    """Elements of a row that a program takes at a time."""
    return min(power_of_two_from(size), elements_a_thread * 32 * num_warps)
