"""Triton kernels of gather_gate, forward and backward. Contract: csrc/kernels/gather_gate/gather_gate.h.

Mapping  a program takes whole tokens, one after another. A token's rows are gathered as tiles of [COUNT columns, WIDTH elements]
         and stay in registers, dequantized, for all of its branches; where rows are wider than a tile, a tile is a piece of one.
         The backward sums the weights' gradients beside them where they fit, else in a kernel of their own; the programs' sums
         are added by `gate_weights_bwd_kernel`.
Traffic  forward: rows, hidden and out once. Backward: grad_out, hidden, rows and two gradients once (where the sums do not fit,
         hidden and rows twice); the weights for each token, from a cache.
Limits   C, D and M are constants, so a model compiles once.
"""
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.decode import BLOCK, decode_rows, round_to, row_args, to_float
from engram_kernels.triton_kernels.gate import (
    ELEMENTS_A_THREAD,
    ELEMENTS_A_THREAD_BWD,
    MAX_HELD,
    SUM_CHUNK,
    gate_weights_bwd_kernel,
    load_weights,
    row_of,
)
from engram_kernels.triton_kernels.gate_score import gate_score, gate_slopes, mask_slopes
from engram_kernels.triton_runtime.launch import ceil_div, empty_like, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class


@triton.jit
def place_of(c, COLUMNS: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Tile c: elements of the memory vector [COUNT, WIDTH], and which of them are there."""
    PIECES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    column = (c // PIECES) * COUNT + tl.arange(0, COUNT)
    element = (c % PIECES) * WIDTH + tl.arange(0, WIDTH)
    return column[:, None] * D + element[None, :], (column < COLUMNS)[:, None] & (element < D)[None, :]


@triton.jit
def memory_tile(rows, scales, row_ids, errors, t, alive, num_rows, row_units, scale_stride, table_scale, id_token, id_column, c,
                COLUMNS: tl.constexpr, CODE: tl.constexpr, D: tl.constexpr, ROW_UNIT: tl.constexpr, COUNT: tl.constexpr,
                WIDTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr):
    """Tile c of the memory vector of token t, in float32; bad ids give zeros and are counted where `errors` is given."""
    PIECES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    column = (c // PIECES) * COUNT + tl.arange(0, COUNT)
    start = (c % PIECES) * WIDTH
    ids = tl.load(row_ids + t * id_token + column * id_column, mask=(column < COLUMNS) & alive, other=-1).to(tl.int64)
    present = (ids >= 0) & (ids < num_rows)
    if errors is not None and c % PIECES == 0:
        tl.atomic_add(errors + tl.zeros([COUNT], tl.int32), 1, mask=(ids != -1) & ~present, sem="relaxed")
    return decode_rows(rows, scales, tl.where(present, ids, 0), present, row_units, scale_stride, table_scale, start, CODE, D,
                       ROW_UNIT, COUNT, WIDTH, ZERO_SCALE_IS_ZERO)


@triton.jit
def gather_gate_kernel(hidden, rows, scales, row_ids, w_hidden, w_key, mask, out, errors, num_tokens, hidden_token, hidden_branch,
                       num_rows, row_units, scale_stride, table_scale, id_token, id_column, eps, clamp, COLUMNS: tl.constexpr,
                       BRANCHES: tl.constexpr, UNIT: tl.constexpr, CODE: tl.constexpr, D: tl.constexpr, ROW_UNIT: tl.constexpr,
                       COUNT: tl.constexpr, WIDTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr, SIGN_AT_ZERO: tl.constexpr,
                       ADD_RESIDUAL: tl.constexpr, HOLD: tl.constexpr):
    CHUNKS: tl.constexpr = ((COLUMNS + COUNT - 1) // COUNT) * ((D + WIDTH - 1) // WIDTH)
    SIZE: tl.constexpr = COLUMNS * D
    held = ()
    if HOLD:
        for i in tl.static_range(BRANCHES * CHUNKS):
            at, inside = place_of(i % CHUNKS, COLUMNS, D, COUNT, WIDTH)
            held = held + (load_weights(w_hidden, w_key, (i // CHUNKS) * SIZE + at, inside),)
    for token in tl.range(tl.program_id(0), num_tokens.to(tl.int32), tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        alive = True
        if mask is not None:
            alive = tl.load(mask + t) == 0
        memory = ()
        ee = 0.0
        for c in tl.static_range(CHUNKS):
            e = memory_tile(rows, scales, row_ids, errors, t, alive, num_rows, row_units, scale_stride, table_scale, id_token,
                            id_column, c, COLUMNS, CODE, D, ROW_UNIT, COUNT, WIDTH, ZERO_SCALE_IS_ZERO)
            ee += tl.sum(e * e)
            memory = memory + (e,)
        for m in tl.static_range(BRANCHES):
            h_row = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT)
            dot, hh = tl.zeros([COUNT, WIDTH], tl.float32), tl.zeros([COUNT, WIDTH], tl.float32)
            stored = ()
            for c in tl.static_range(CHUNKS):
                at, inside = place_of(c, COLUMNS, D, COUNT, WIDTH)
                raw = tl.load(h_row + at, mask=inside, other=0.0)
                h = to_float(raw)
                if HOLD:
                    dot += h * memory[c] * held[m * CHUNKS + c]
                else:
                    dot += h * memory[c] * load_weights(w_hidden, w_key, m * SIZE + at, inside)
                hh += h * h
                stored = stored + (raw,)
            _, _, _, gate = gate_score(tl.sum(dot), tl.sum(hh), ee, eps, clamp, SIZE, SIGN_AT_ZERO)
            for c in tl.static_range(CHUNKS):
                at, inside = place_of(c, COLUMNS, D, COUNT, WIDTH)
                result = gate * memory[c]
                if ADD_RESIDUAL:
                    result += to_float(stored[c])
                result = round_to(result, out.dtype.element_ty)
                if mask is not None:  # bit for bit
                    result = tl.where(alive, result, stored[c] if ADD_RESIDUAL else tl.zeros_like(stored[c]))
                tl.store(out + (t * BRANCHES + m) * SIZE + at, result, mask=inside)


@triton.jit
def gather_gate_bwd_kernel(grad_out, hidden, rows, scales, row_ids, w_hidden, w_key, mask, grad_hidden, grad_rows, slopes,
                           partial_sums, num_tokens, grad_token, grad_branch, hidden_token, hidden_branch, num_rows, row_units,
                           scale_stride, table_scale, id_token, id_column, eps, clamp, COLUMNS: tl.constexpr,
                           BRANCHES: tl.constexpr, UNIT: tl.constexpr, CODE: tl.constexpr, D: tl.constexpr,
                           ROW_UNIT: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr,
                           SIGN_AT_ZERO: tl.constexpr, ADD_RESIDUAL: tl.constexpr, HOLD: tl.constexpr):
    CHUNKS: tl.constexpr = ((COLUMNS + COUNT - 1) // COUNT) * ((D + WIDTH - 1) // WIDTH)
    SIZE: tl.constexpr = COLUMNS * D
    dtype: tl.constexpr = grad_hidden.dtype.element_ty
    sums = ()
    if HOLD:
        for _zeroed in tl.static_range(BRANCHES * CHUNKS):
            sums = sums + (tl.zeros([COUNT, WIDTH], tl.float32),)
    for token in tl.range(tl.program_id(0), num_tokens.to(tl.int32), tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        alive = True
        if mask is not None:
            alive = tl.load(mask + t) == 0
        memory, row_grads, new_sums = (), (), ()
        ee = 0.0
        for chunk in tl.static_range(CHUNKS):
            e = memory_tile(rows, scales, row_ids, None, t, alive, num_rows, row_units, scale_stride, table_scale, id_token,
                            id_column, chunk, COLUMNS, CODE, D, ROW_UNIT, COUNT, WIDTH, ZERO_SCALE_IS_ZERO)
            ee += tl.sum(e * e)
            memory = memory + (e,)
            row_grads = row_grads + (tl.zeros([COUNT, WIDTH], tl.float32),)
        for m in tl.static_range(BRANCHES):
            d_row = row_of(grad_out, t, m, grad_token, grad_branch, UNIT)
            h_row = row_of(hidden, t, m, hidden_token, hidden_branch, UNIT)
            dot, hh, de = (tl.zeros([COUNT, WIDTH], tl.float32), tl.zeros([COUNT, WIDTH], tl.float32),
                           tl.zeros([COUNT, WIDTH], tl.float32))
            douts, hiddens = (), ()
            for chunk in tl.static_range(CHUNKS):
                at, inside = place_of(chunk, COLUMNS, D, COUNT, WIDTH)
                douts = douts + (tl.load(d_row + at, mask=inside, other=0.0),)
                hiddens = hiddens + (tl.load(h_row + at, mask=inside & alive, other=0.0),)
                h = to_float(hiddens[chunk])
                dot += h * memory[chunk] * load_weights(w_hidden, w_key, m * SIZE + at, inside)
                hh += h * h
                de += to_float(douts[chunk]) * memory[chunk]
            rh, rk, x, gate = gate_score(tl.sum(dot), tl.sum(hh), ee, eps, clamp, SIZE, SIGN_AT_ZERO)
            a, b, c = gate_slopes(rh, rk, x, gate, tl.sum(de), clamp, SIZE)
            if mask is not None:
                a, b, c, gate = mask_slopes(a, b, c, gate, alive)
            if not HOLD:
                tl.store(slopes + t * BRANCHES + m, a)
            new_row_grads = ()
            for chunk in tl.static_range(CHUNKS):
                at, inside = place_of(chunk, COLUMNS, D, COUNT, WIDTH)
                h, dout = to_float(hiddens[chunk]), to_float(douts[chunk])
                w = load_weights(w_hidden, w_key, m * SIZE + at, inside & alive)
                dh, drow = a * w * memory[chunk] - b * h, a * w * h - c * memory[chunk]
                if ADD_RESIDUAL:
                    dh += dout
                tl.store(grad_hidden + (t * BRANCHES + m) * SIZE + at, round_to(dh, dtype), mask=inside)
                if mask is not None:
                    dout = tl.where(gate != 0, dout, 0.0)
                new_row_grads = new_row_grads + (row_grads[chunk] + drow + gate * dout,)
                if HOLD:
                    new_sums = new_sums + (sums[m * CHUNKS + chunk] + a * h * memory[chunk],)
            row_grads = new_row_grads
        for chunk in tl.static_range(CHUNKS):
            at, inside = place_of(chunk, COLUMNS, D, COUNT, WIDTH)
            tl.store(grad_rows + t * SIZE + at, round_to(row_grads[chunk], dtype), mask=inside)
        if HOLD:
            sums = new_sums
    if HOLD:
        for i in tl.static_range(BRANCHES * CHUNKS):
            at, inside = place_of(i % CHUNKS, COLUMNS, D, COUNT, WIDTH)
            to = partial_sums + (tl.program_id(0).to(tl.int64) * BRANCHES + i // CHUNKS) * SIZE
            tl.store(to + at, sums[i], mask=inside)


@triton.jit
def gather_gate_products_bwd_kernel(hidden, rows, scales, row_ids, mask, slopes, partial_sums, num_tokens, hidden_token,
                                    hidden_branch, num_rows, row_units, scale_stride, table_scale, id_token, id_column,
                                    COLUMNS: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, CODE: tl.constexpr,
                                    D: tl.constexpr, ROW_UNIT: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
                                    ZERO_SCALE_IS_ZERO: tl.constexpr):
    SIZE: tl.constexpr = COLUMNS * D
    at, inside = place_of(tl.program_id(0), COLUMNS, D, COUNT, WIDTH)
    sums = ()
    for _zeroed in tl.static_range(BRANCHES):
        sums = sums + (tl.zeros([COUNT, WIDTH], tl.float32),)
    for token in tl.range(tl.program_id(1), num_tokens.to(tl.int32), tl.num_programs(1)):
        t = tl.cast(token, tl.int64)
        alive = True
        if mask is not None:
            alive = tl.load(mask + t) == 0
        e = memory_tile(rows, scales, row_ids, None, t, alive, num_rows, row_units, scale_stride, table_scale, id_token,
                        id_column, tl.program_id(0), COLUMNS, CODE, D, ROW_UNIT, COUNT, WIDTH, ZERO_SCALE_IS_ZERO)
        new_sums = ()
        for m in tl.static_range(BRANCHES):
            a = tl.load(slopes + t * BRANCHES + m)
            h = to_float(tl.load(row_of(hidden, t, m, hidden_token, hidden_branch, UNIT) + at, mask=inside & alive, other=0.0))
            new_sums = new_sums + (sums[m] + a * h * e,)
        sums = new_sums
    for m in tl.static_range(BRANCHES):
        tl.store(partial_sums + (tl.program_id(1).to(tl.int64) * BRANCHES + m) * SIZE + at, sums[m], mask=inside)


class Tiles(NamedTuple):
    """How a memory vector is cut: `number` tiles of `count` columns by `width` elements."""
    count: int
    width: int
    number: int


@functools.cache
def tiles_of(columns: int, row_dim: int, num_warps: int, elements_a_thread: int = ELEMENTS_A_THREAD) -> Tiles:
    """Tiles of so many elements per thread; a block of 32 elements is never cut."""
    most = elements_a_thread * 32 * num_warps
    width = min(max(power_of_two_from(row_dim), BLOCK.value if row_dim % BLOCK.value == 0 else 1), most)
    count = min(max(most // width, 1), power_of_two_from(columns))
    return Tiles(count, width, ceil_div(columns, count) * ceil_div(row_dim, width))


def gather_gate(hidden: Tensor, rows: Tensor, scales: Tensor | None, row_ids: Tensor, w_hidden: Tensor, w_key: Tensor,
                mask: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float, clamp: float,
                zero_sign: str, add_residual: bool, table_scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Gated hidden state [T, M, H]; see `engram_kernels.gather_gate`. Ids that are out of range give zeros and are counted."""
    if out is None:
        out = empty_like(hidden)
    num_tokens, branches, _ = hidden.shape
    if num_tokens == 0:
        return out
    columns, table = row_ids.shape[1], row_args(rows, scales, row_format, row_dim, table_scale)
    tuned = parameters("gather_gate", hidden.device, shape_class(num_tokens))
    tiles = tiles_of(columns, row_dim, tuned["num_warps"])
    strides = hidden.stride()[:2]
    unit = math.gcd(ELEMENTS_A_THREAD, *strides)
    hold = branches * tiles.number * ELEMENTS_A_THREAD <= MAX_HELD
    launch(gather_gate_kernel, (min(num_tokens, tuned["programs"]), 1, 1),
           (hidden, table.rows, table.scales, row_ids, w_hidden, w_key, mask, out, error_counter("gather_gate", hidden.device)),
           (num_tokens, *[s // unit for s in strides], table.num_rows, table.row_units, table.scale_stride, table.table_scale,
            *row_ids.stride(), float(eps), float(clamp)),
           (columns, branches, unit, table.code, row_dim, table.unit, *tiles[:2], zero_scale_is_zero, zero_sign == "sign",
            add_residual, hold), tuned["num_warps"])
    return out


def gather_gate_bwd(grad_out: Tensor, hidden: Tensor, rows: Tensor, scales: Tensor | None, row_ids: Tensor, w_hidden: Tensor,
                    w_key: Tensor, mask: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float,
                    clamp: float, zero_sign: str, add_residual: bool, table_scale: float = 1.0) -> tuple[Tensor, ...]:
    """Gradients of hidden, the gathered rows [T, C, D], w_hidden and w_key; the same bits every run."""
    num_tokens, branches, size = hidden.shape
    columns, table = row_ids.shape[1], row_args(rows, scales, row_format, row_dim, table_scale)
    grads = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape, like in (
        (hidden.shape, hidden), ((num_tokens, columns, row_dim), hidden), (w_hidden.shape, w_hidden), (w_key.shape, w_key))]
    tuned = parameters("gather_gate_bwd", hidden.device, shape_class(num_tokens))
    tiles = tiles_of(columns, row_dim, tuned["num_warps"], ELEMENTS_A_THREAD_BWD)
    # beside the sums a token's memory vector and its gradient, and a branch of hidden and grad_out: packed, or as much as 5 more
    kept = 1 if hidden.element_size() == 2 else 5
    hold = (branches + 2 + kept) * tiles.number * ELEMENTS_A_THREAD_BWD <= tuned["held"]
    tiles = tiles if hold else tiles_of(columns, row_dim, tuned["num_warps"])
    programs = min(num_tokens, tuned["programs"])
    parts = programs if hold else min(num_tokens, tuned["parts"])
    partial_sums = torch.empty((parts, branches, size), dtype=torch.float32, device=hidden.device)
    if num_tokens > 0:
        slopes = None if hold else torch.empty((num_tokens, branches), dtype=torch.float32, device=hidden.device)
        strides = (*grad_out.stride()[:2], *hidden.stride()[:2])
        unit = math.gcd(ELEMENTS_A_THREAD, *strides)
        units = tuple(s // unit for s in strides)
        source = (table.num_rows, table.row_units, table.scale_stride, table.table_scale, *row_ids.stride())
        constants = (columns, branches, unit, table.code, row_dim, table.unit, *tiles[:2], zero_scale_is_zero)
        launch(gather_gate_bwd_kernel, (programs, 1, 1),
               (grad_out, hidden, table.rows, table.scales, row_ids, w_hidden, w_key, mask, *grads[:2], slopes,
                partial_sums if hold else None), (num_tokens, *units, *source, float(eps), float(clamp)),
               (*constants, zero_sign == "sign", add_residual, hold), tuned["num_warps"])
        if not hold:
            small = tiles_of(columns, row_dim, 4)
            launch(gather_gate_products_bwd_kernel, (small.number, parts, 1),
                   (hidden, table.rows, table.scales, row_ids, mask, slopes, partial_sums), (num_tokens, *units[2:], *source),
                   (*constants[:6], *small[:2], zero_scale_is_zero), 4)
    launch(gate_weights_bwd_kernel, (ceil_div(branches * size, SUM_CHUNK), 1, 1),
           (partial_sums, w_hidden, w_key, grads[2], grads[3]), (parts,), (branches * size, SUM_CHUNK), 1)
    return tuple(grads)
