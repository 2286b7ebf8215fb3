"""Triton kernels of engram_forward. Contract: `engram_kernels.engram_forward`, csrc/kernels/engram_forward/engram_forward.h.

Mapping  two launches. Scores: a program has TOKENS tokens and a part of one branch's key, COLUMNS_OF elements at a time; it
         gathers and decodes the rows piece by piece as it multiplies with w_kv, and keeps three sums per token of the product:
         of the squares of the key and of hidden, and of their weighted product. Values: a program adds the sums of a token's
         parts in order, then has the same product for the value, whose epilogue is the gate and the residual of every branch.
         Programs go through w_kv in groups of GROUP blocks of tokens, so that a block of w_kv is read from memory once a group
         and from L2 otherwise; a branch has as many parts as give the GPU enough programs.
Traffic  hidden and the rows twice, w_kv and out once; 24 B per token, branch and part. Keys and values are never written.
Limits   C, D, H and M are constants, so a model compiles once. Sums in float32.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.decode import _EMULATE_BF16, BLOCK, decode_rows, round_to, row_args, to_float
from engram_kernels.triton_kernels.gate import ELEMENTS_A_THREAD, load_weights, row_of
from engram_kernels.triton_kernels.gate_score import gate_score
from engram_kernels.triton_runtime.launch import ceil_div, empty_like, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

GROUP = tl.constexpr(8)
MIN_DEPTH = 16  # of tl.dot, in every dimension
SUMS_AT_A_TIME = tl.constexpr(512)  # of a branch and kind


@triton.jit
def multiply_add(e, w, acc):
    """acc + e @ w.T in float32; the interpreter knows no bfloat16."""
    if _EMULATE_BF16:
        return tl.dot(to_float(e), tl.trans(to_float(w)), acc, input_precision="ieee")
    else:
        return tl.dot(e, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def block_of(num_tokens, blocks, TOKENS: tl.constexpr):
    """(first token, block of w_kv) of a program, of `blocks` blocks."""
    rows_of_blocks = (num_tokens.to(tl.int32) + TOKENS - 1) // TOKENS
    group = tl.program_id(0) // (GROUP * blocks)
    size = tl.minimum(rows_of_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * blocks)
    return ((group * GROUP + within % size) * TOKENS).to(tl.int64), within // size


@triton.jit
def alive_of(mask, t, num_tokens):
    inside = t < num_tokens
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask + t, mask=inside, other=1) == 0)


@triton.jit
def project(rows, scales, row_ids, w_kv, errors, t, alive, counts, first, element, num_rows, row_units, scale_stride, id_token,
            id_column, COLUMNS: tl.constexpr, SIZE: tl.constexpr, CODE: tl.constexpr, D: tl.constexpr, ROW_UNIT: tl.constexpr,
            TOKENS: tl.constexpr, COLUMNS_OF: tl.constexpr, DEPTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr):
    """float32 [TOKENS, COLUMNS_OF]: the memory vectors of tokens t times rows first + element of w_kv."""
    PIECES: tl.constexpr = (D + DEPTH - 1) // DEPTH
    acc = tl.zeros([TOKENS, COLUMNS_OF], tl.float32)
    for i in tl.range(0, COLUMNS * PIECES):
        column, start = i // PIECES, (i % PIECES) * DEPTH
        ids = tl.load(row_ids + t * id_token + column * id_column, mask=alive, other=-1).to(tl.int64)
        present = (ids >= 0) & (ids < num_rows)
        bad = (ids != -1) & ~present & counts & (start == 0)
        tl.atomic_add(errors + tl.zeros([TOKENS], tl.int32), 1, mask=bad, sem="relaxed")
        e = decode_rows(rows, scales, tl.where(present, ids, 0), present, row_units, scale_stride, start, CODE, D, ROW_UNIT,
                        TOKENS, DEPTH, ZERO_SCALE_IS_ZERO)
        k = start + tl.arange(0, DEPTH)
        at = w_kv + (first + element)[:, None] * (COLUMNS * D) + column * D + k[None, :]
        w = tl.load(at, mask=(element < SIZE)[:, None] & (k < D)[None, :], other=0.0)
        acc = multiply_add(round_to(e, w_kv.dtype.element_ty), w, acc)
    return acc


@triton.jit
def engram_forward_scores_kernel(hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask, sums, errors, num_tokens, num_parts,
                                 hidden_token, hidden_branch, num_rows, row_units, scale_stride, id_token, id_column,
                                 COLUMNS: tl.constexpr, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr,
                                 CODE: tl.constexpr, D: tl.constexpr, ROW_UNIT: tl.constexpr, TOKENS: tl.constexpr,
                                 COLUMNS_OF: tl.constexpr, DEPTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr):
    BLOCKS: tl.constexpr = (SIZE + COLUMNS_OF - 1) // COLUMNS_OF
    parts = num_parts.to(tl.int32)
    first_token, place = block_of(num_tokens, BRANCHES * parts, TOKENS)
    m, part = place // parts, place % parts
    t = first_token + tl.arange(0, TOKENS)
    alive = alive_of(mask, t, num_tokens)
    h_row = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT)
    dot, hh, kk = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    for block in tl.range(part, BLOCKS, parts):
        element = block * COLUMNS_OF + tl.arange(0, COLUMNS_OF)
        key = project(rows, scales, row_ids, w_kv, errors, t, alive, m + block == 0, m.to(tl.int64) * SIZE, element, num_rows,
                      row_units, scale_stride, id_token, id_column, COLUMNS, SIZE, CODE, D, ROW_UNIT, TOKENS, COLUMNS_OF, DEPTH,
                      ZERO_SCALE_IS_ZERO)
        inside = alive[:, None] & (element < SIZE)[None, :]
        h = to_float(tl.load(h_row[:, None] + element[None, :], mask=inside, other=0.0))
        w = load_weights(w_hidden, w_key, m * SIZE + element, element < SIZE)
        dot += tl.sum(h * w[None, :] * key, 1)
        hh += tl.sum(h * h, 1)
        kk += tl.sum(key * key, 1)
    to = sums + (place * 3).to(tl.int64) * num_tokens + t  # [branch, part, sum, token]
    tl.store(to, dot, mask=t < num_tokens)
    tl.store(to + num_tokens, hh, mask=t < num_tokens)
    tl.store(to + 2 * num_tokens, kk, mask=t < num_tokens)


@triton.jit
def gates_of(sums, t, num_tokens, num_parts, eps, clamp, SIZE: tl.constexpr, BRANCHES: tl.constexpr, TOKENS: tl.constexpr,
             SIGN_AT_ZERO: tl.constexpr):
    """The gates [TOKENS] of each branch: its parts' sums, added in order."""
    PARTS: tl.constexpr = (SUMS_AT_A_TIME + TOKENS - 1) // TOKENS
    totals = ()
    for _zeroed in tl.static_range(BRANCHES * 3):
        totals = totals + (tl.zeros([TOKENS], tl.float32),)
    for first in tl.range(0, num_parts.to(tl.int32), PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (t < num_tokens)[:, None] & (part < num_parts)[None, :]
        new_totals = ()
        for i in tl.static_range(BRANCHES * 3):  # all branches at once, so that no load waits for another
            place = ((i // 3) * num_parts + part) * 3 + i % 3
            more = tl.load(sums + (place * num_tokens)[None, :] + t[:, None], mask=inside, other=0.0)
            new_totals = new_totals + (totals[i] + tl.sum(more, 1),)
        totals = new_totals
    gates = ()
    for m in tl.static_range(BRANCHES):
        _, _, _, gate = gate_score(totals[3 * m], totals[3 * m + 1], totals[3 * m + 2], eps, clamp, SIZE, SIGN_AT_ZERO)
        gates = gates + (gate,)
    return gates


@triton.jit
def engram_forward_values_kernel(hidden, rows, scales, row_ids, w_kv, sums, mask, out, errors, num_tokens, num_parts,
                                 hidden_token, hidden_branch, num_rows, row_units, scale_stride, id_token, id_column, eps, clamp,
                                 COLUMNS: tl.constexpr, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr,
                                 CODE: tl.constexpr, D: tl.constexpr, ROW_UNIT: tl.constexpr, TOKENS: tl.constexpr,
                                 COLUMNS_OF: tl.constexpr, DEPTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr,
                                 SIGN_AT_ZERO: tl.constexpr, ADD_RESIDUAL: tl.constexpr):
    first_token, block = block_of(num_tokens, (SIZE + COLUMNS_OF - 1) // COLUMNS_OF, TOKENS)
    t = first_token + tl.arange(0, TOKENS)
    alive = alive_of(mask, t, num_tokens)
    gates = gates_of(sums, t, num_tokens, num_parts, eps, clamp, SIZE, BRANCHES, TOKENS, SIGN_AT_ZERO)
    element = block * COLUMNS_OF + tl.arange(0, COLUMNS_OF)
    value = project(rows, scales, row_ids, w_kv, errors, t, alive, False, tl.cast(BRANCHES * SIZE, tl.int64), element, num_rows,
                    row_units, scale_stride, id_token, id_column, COLUMNS, SIZE, CODE, D, ROW_UNIT, TOKENS, COLUMNS_OF, DEPTH,
                    ZERO_SCALE_IS_ZERO)
    inside = (t < num_tokens)[:, None] & (element < SIZE)[None, :]
    for m in tl.static_range(BRANCHES):
        result = gates[m][:, None] * value
        if ADD_RESIDUAL:
            at = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT)
            raw = tl.load(at[:, None] + element[None, :], mask=inside, other=0.0)
            result += to_float(raw)
        result = round_to(result, out.dtype.element_ty)
        if mask is not None:  # bit for bit
            result = tl.where(alive[:, None], result, raw if ADD_RESIDUAL else tl.zeros_like(result))
        tl.store(out + (t * BRANCHES + m)[:, None] * SIZE + element[None, :], result, mask=inside)


def engram_forward(hidden: Tensor, rows: Tensor, scales: Tensor | None, row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor,
                   w_key: Tensor, mask: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float,
                   clamp: float, zero_sign: str, add_residual: bool, out: Tensor | None = None) -> Tensor:
    """Gated hidden state [T, M, H]; see `engram_kernels.engram_forward`. Ids that are out of range give zeros, counted."""
    if out is None:
        out = empty_like(hidden)
    num_tokens, branches, size = hidden.shape
    if num_tokens == 0:
        return out
    tuned = parameters("engram_forward", hidden.device, shape_class(num_tokens))
    narrow = hidden.element_size() // 2  # float32 takes more room
    block, num_warps = max(tuned["columns"] // narrow**2, MIN_DEPTH), tuned["num_warps"]
    tokens = max(tuned["tokens"] // narrow, MIN_DEPTH)
    blocks, rows_of_blocks = ceil_div(size, block), ceil_div(num_tokens, tokens)
    parts = min(blocks, ceil_div(tuned["programs"], rows_of_blocks * branches))
    table, strides = row_args(rows, scales, row_format, row_dim), hidden.stride()[:2]
    unit = math.gcd(ELEMENTS_A_THREAD, *strides)
    sums = torch.empty((branches, parts, 3, num_tokens), dtype=torch.float32, device=hidden.device)
    errors = error_counter("engram_forward", hidden.device)
    source = (table.rows, table.scales, row_ids, w_kv)
    numbers = (num_tokens, parts, *(s // unit for s in strides), table.num_rows, table.row_units, table.scale_stride,
               *row_ids.stride())
    constants = (row_ids.shape[1], size, branches, unit, table.code, row_dim, table.unit, tokens, block,
                 depth_of(row_dim, max(tuned["depth"] // narrow, MIN_DEPTH)), zero_scale_is_zero)
    launch(engram_forward_scores_kernel, (rows_of_blocks * branches * parts, 1, 1),
           (hidden, *source, w_hidden, w_key, mask, sums, errors), numbers, constants, num_warps)
    launch(engram_forward_values_kernel, (rows_of_blocks * blocks, 1, 1),
           (hidden, *source, sums, mask, out, errors), (*numbers, float(eps), float(clamp)),
           (*constants, zero_sign == "sign", add_residual), num_warps)
    return out


def depth_of(row_dim: int, most: int) -> int:
    """Elements of a row that are multiplied at a time, in whole scale blocks: a divisor of it where one is large enough."""
    depth = math.gcd(row_dim, most)
    least = BLOCK.value if row_dim % BLOCK.value == 0 else MIN_DEPTH
    return depth if depth >= least else max(least, min(power_of_two_from(row_dim), most))
