"""Compiles, before serving or training, every variant that a model needs. `calls` has one entry per op."""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.triton_kernels.gate import gate, gate_bwd
from engram_kernels.triton_kernels.gather_gate import gather_gate, gather_gate_bwd
from engram_kernels.triton_kernels.gather_rows import gather_rows, gather_rows_bwd
from engram_kernels.triton_kernels.ngram_hash import ngram_hash, ngram_hash_update
from engram_kernels.triton_kernels.row_update import row_update
from engram_kernels.triton_kernels.short_conv import short_conv, short_conv_bwd
from engram_kernels.triton_runtime import launch
from engram_kernels.triton_runtime.tuning import SMALL_BATCH, target_name

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer

Calls = Iterator[Callable[[], Any]]


def warmup(spec: EngramSpec, device: torch.device | str = "cuda", *, dtype: torch.dtype = torch.bfloat16,
           weight_dtype: torch.dtype | None = None, backward: bool = False,
           row_optimizers: Sequence[RowOptimizer] = ()) -> int:
    """Compiles and loads what a model of `spec` launches for any number of tokens, so that serving never compiles.

    Args:
        spec: the model's descriptor.
        device: a GPU.
        dtype: of hidden states and gathered rows.
        weight_dtype: of the gate's weights; None: `dtype`.
        backward: also the gradients.
        row_optimizers: whose steps and norms are compiled, too, for gradients of `dtype`, of the table's dtype and float32.

    Returns:
        How many variants there are. Not among them: the model's row ids in int64 (`ngram_hash` gives int32),
        `ngram_hash_and_commit` of one layer alone or without a pool, tensors that are not 16-byte aligned and strides other
        than those of contiguous tensors; the first launch of such a variant compiles it.

    Raises:
        RuntimeError: `device` is no GPU that the kernels support.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"warmup: {device} is no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    target = target_name(torch.device("cuda", index))
    variants = spec_variants(spec, target, dtype, weight_dtype or dtype, backward, row_optimizers)
    with torch.cuda.device(index):
        for variant in variants:
            launch.compiled_for(variant, index)[(1, 1, 1)]  # a subscript loads it, a call would launch it
    # so that a graph capture allocates none
    for op in ("ngram_hash", "gather_rows", "gather_gate", "short_conv", *(["row_update"] if row_optimizers else [])):
        launch.error_counter(op, torch.device("cuda", index))
    return len(variants)


def spec_variants(spec: EngramSpec, target: str, dtype: torch.dtype = torch.bfloat16, weight_dtype: torch.dtype = torch.bfloat16,
                  backward: bool = False, row_optimizers: Sequence[RowOptimizer] = ()) -> list[launch.Variant]:
    """Every variant of `spec` on `target`, each once; compiles nothing and needs no GPU."""
    found: dict[launch.Variant, None] = {}
    for num_tokens in (1, SMALL_BATCH + 1):
        steps = (row_update_calls(optimizer, num_tokens, dtype) for optimizer in row_optimizers)
        for call in itertools.chain(calls(spec, num_tokens, dtype, weight_dtype, backward), *steps):
            found.update(dict.fromkeys(launch.variants_of(call, target)))
    return list(found)


def calls(spec: EngramSpec, num_tokens: int, dtype: torch.dtype, weight_dtype: torch.dtype, backward: bool) -> Calls:
    """Calls of the launch functions as a model of `spec` makes them, on tensors without data."""
    make = functools.partial(torch.empty, device="meta")
    layout = spec.layout()
    bounds, id_dtypes = make(2, dtype=torch.int32), (torch.int32, torch.int64)
    moduli, offsets, multipliers, reciprocals = (x.to("meta") for x in (layout.moduli, layout.offsets, layout.multipliers,
                                                                        layout.reciprocals))
    constants = moduli, offsets, multipliers, reciprocals
    token_maps = [None] if spec.num_classes is None else [None, make(spec.vocab_size, dtype=torch.int32)]
    dead = make(num_tokens, dtype=torch.bool)
    # all layers at once, or one as `Engram` does
    for of_layers in (constants, (moduli[:1], offsets[:1], multipliers[:1], reciprocals[:1])):
        for token_map, id_dtype, chunked, mask in itertools.product(token_maps, id_dtypes, (False, True), (None, dead)):
            tokens, history = make(num_tokens, dtype=id_dtype), make(1, spec.max_order - 1, dtype=id_dtype) if chunked else None
            yield functools.partial(ngram_hash, tokens, bounds, *of_layers, token_map, history, mask,
                                    layout.num_ids, layout.boundary_id, layout.eos_id)
    for token_map, id_dtype, mask in itertools.product(token_maps, id_dtypes, (None, dead)):  # as `MemoryState` does
        history, index = make(1, spec.max_order + 3, dtype=id_dtype), make(1, dtype=torch.int64)
        yield functools.partial(ngram_hash_update, make(num_tokens, dtype=id_dtype), bounds, *constants, history, token_map, mask,
                                index, index, layout.num_ids, layout.boundary_id, layout.eos_id)

    stored = ROW_FORMATS[spec.row_format]
    width = (spec.row_stride_bytes or stored.row_bytes(spec.head_dim)) if stored.is_packed else stored.width(spec.head_dim)
    rows = make(64, width, dtype=stored.dtype)
    scale_shape = stored.scale_shape(64, spec.head_dim)
    scales = None if scale_shape is None else make(scale_shape, dtype=stored.scale_dtype)
    ids = make(num_tokens, layout.num_columns, dtype=torch.int32)
    yield functools.partial(gather_rows, rows, scales, ids, spec.row_format, spec.head_dim, spec.zero_scale_is_zero, dtype)
    if backward and stored.is_float:
        yield functools.partial(gather_rows_bwd, make(*ids.shape, spec.head_dim, dtype=dtype), ids, 64, stored.dtype)

    hidden = make(num_tokens, spec.branches, spec.hidden_size, dtype=dtype)
    value = make(num_tokens, spec.hidden_size, dtype=dtype)
    weight = make(spec.branches, spec.hidden_size, dtype=weight_dtype)
    source = (spec.row_format, spec.head_dim, spec.zero_scale_is_zero)
    memory_size = layout.num_columns * spec.head_dim
    for mask in (None, dead):
        options = (mask, spec.gate_eps, spec.gate_clamp, spec.zero_sign, spec.add_residual)
        yield functools.partial(gate, hidden, hidden, value, weight, weight, *options)
        if backward:
            yield functools.partial(gate_bwd, hidden, hidden, hidden, value, weight, weight, *options)
        both: tuple[Any, ...] = (mask, *source, *options[1:])
        if memory_size == spec.hidden_size:
            args = (hidden, rows, scales, ids, weight, weight, *both)
            yield functools.partial(gather_gate, *args)
            if backward:
                yield functools.partial(gather_gate_bwd, hidden, *args)
    if spec.conv_width is not None and spec.conv_dilation is not None:
        state = make(1, (spec.conv_width - 1) * spec.conv_dilation, spec.branches, spec.hidden_size, dtype=dtype)
        taps = make(*weight.shape, spec.conv_width, dtype=weight_dtype)
        conv = (hidden, taps, weight, bounds, spec.conv_dilation, spec.conv_eps)
        yield functools.partial(short_conv, *conv)
        ends = make(1, 2, dtype=torch.int64)
        for id_dtype, pooled, kept in itertools.product(id_dtypes, (False, True), (None, ends)):
            positions = make(1, dtype=id_dtype)
            yield functools.partial(short_conv, *conv, positions, state, positions if pooled else None, kept)
        if backward:
            yield functools.partial(short_conv_bwd, hidden, *conv)


def row_update_calls(optimizer: RowOptimizer, num_ids: int, dtype: torch.dtype) -> Calls:
    """Calls of `row_update` as `step` and `norm` of an optimizer make them, on tensors without data."""
    settings, make = optimizer.settings, functools.partial(torch.empty, device="meta")
    row_format, row_dim, rule = settings["row_format"], settings["row_dim"], settings["rule"]
    rows = torch.empty_like(optimizer.table.rows.detach(), device="meta")
    moments = {name: torch.empty_like(x, device="meta") for name, x in optimizer.moments().items()}
    kept = tuple(moments.get(name) for name in ("second", "first", "steps"))
    step, stochastic = int(settings["bias_correction"] == "step"), settings["rounding"] == "stochastic"
    grad_dtypes = dict.fromkeys((dtype, rows.dtype, torch.float32))
    for id_dtype, grad_dtype, norm in itertools.product((torch.int32, torch.int64), grad_dtypes, (False, True)):
        call = rows, None, make(num_ids, dtype=id_dtype), make(num_ids, row_dim, dtype=grad_dtype)
        numbers = (0.0, 0.9, 0.999, 1e-8, 1.0)  # lr, betas, eps, grad_scale: none is compiled in
        given: tuple[Any, ...] = (*call, *((None,) * 3 if norm else kept), row_format, row_dim, False, "none" if norm else rule,
                                  *numbers, *((0, False) if norm else (step, stochastic)), 0, 0)
        yield functools.partial(row_update, *given)
