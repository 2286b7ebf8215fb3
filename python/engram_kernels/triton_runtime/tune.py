"""Tries launch parameters on a GPU and keeps the fastest in the user's table: `engram-kernels bench --tune`. Not for serving."""
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from engram_kernels.spec import EngramSpec
from engram_kernels.testing.inputs import random_rows
from engram_kernels.triton_kernels.gate import gate, gate_bwd
from engram_kernels.triton_kernels.gather_gate import gather_gate, gather_gate_bwd
from engram_kernels.triton_kernels.gather_rows import gather_rows
from engram_kernels.triton_kernels.ngram_hash import ngram_hash
from engram_kernels.triton_kernels.short_conv import short_conv, short_conv_bwd
from engram_kernels.triton_runtime.tuning import CANDIDATES, tune

TOKENS = {"small": 8, "large": 4096}  # of a shape class, what is timed
NUM_ROWS = 1 << 20
ROUNDS = 21


def tune_ops(spec: EngramSpec, ops: Sequence[str] = (), device: torch.device | str = "cuda", *, num_rows: int = NUM_ROWS,
             time_us: Callable[[Callable[[], Any]], float] | None = None) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Tunes each op for `spec` and yields (op, shape class, parameters) as they are written to the user's table.

    Args:
        spec: whose sizes are timed.
        ops: names in `CANDIDATES`; none: all that `spec` has.
        device: a GPU.
        num_rows: of the table that rows are read from.
        time_us: how a call is timed; None: median of events on the current stream.

    Raises:
        ValueError: an op has no launch parameters, or no candidate runs.
    """
    unknown = [op for op in ops if op not in CANDIDATES]
    if unknown:
        raise ValueError(f"tune: no launch parameters for {', '.join(unknown)}; there are those of {', '.join(CANDIDATES)}")
    device = torch.device(device)
    for size, tokens in TOKENS.items():
        for op, call in typical_calls(spec, tokens, device, num_rows).items():
            if not ops or op in ops:
                yield op, size, tune(op, device, size, lambda: (time_us or time_on_gpu)(call))  # noqa: B023


def time_on_gpu(call: Callable[[], Any]) -> float:
    """Microseconds of `call` on the GPU, the median of ROUNDS after one that compiles.

    Raises:
        RuntimeError: the launch parameters do not fit the GPU.
    """
    try:
        call()
    except TritonError as err:
        raise RuntimeError(str(err)) from err
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times)


def typical_calls(spec: EngramSpec, tokens: int, device: torch.device, num_rows: int) -> dict[str, Callable[[], Any]]:
    """A call of each op that `spec` has, on random data; bfloat16, one sequence."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    layout, branches, size = spec.layout(), spec.branches, spec.hidden_size
    layout = layout.to(device)
    constants = layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    token_ids = torch.randint(0, layout.num_ids, (tokens,), generator=generator).to(device, torch.int32)
    block, scales = random_rows(spec.row_format, min(num_rows, 4096), spec.head_dim, generator)
    copies = -(-num_rows // block.shape[0])
    rows = block.to(device).repeat(copies, 1)
    if scales is not None:
        scales = scales.to(device)
        scales = scales.repeat(copies, 1) if scales.dim() == 2 else scales
    ids = torch.randint(0, rows.shape[0], (tokens, layout.num_columns), generator=generator).to(device, torch.int32)
    source = (spec.row_format, spec.head_dim, spec.zero_scale_is_zero)
    hidden, value, weight = rand(tokens, branches, size), rand(tokens, size), rand(branches, size)
    options = (spec.gate_eps, spec.gate_clamp, spec.zero_sign, spec.add_residual)
    both: tuple[Any, ...] = (*source, *options)
    found: dict[str, Callable[[], Any]] = {
        "ngram_hash": lambda: ngram_hash(token_ids, bounds, *constants, None, None, None, layout.num_ids, layout.boundary_id,
                                         layout.eos_id),
        "gather_rows": lambda: gather_rows(rows, scales, ids, *source, torch.bfloat16),
        "gate": lambda: gate(hidden, hidden, value, weight, weight, None, *options),
        "gate_bwd": lambda: gate_bwd(hidden, hidden, hidden, value, weight, weight, None, *options)}
    if size % spec.head_dim == 0:  # as many rows as make the hidden size
        columns = torch.randint(0, rows.shape[0], (tokens, size // spec.head_dim), generator=generator).to(device, torch.int32)
        fused = (hidden, rows, scales, columns, weight, weight, None, *both)
        found["gather_gate"] = lambda: gather_gate(*fused)
        found["gather_gate_bwd"] = lambda: gather_gate_bwd(hidden, *fused)
    if spec.conv_width is not None and spec.conv_dilation is not None:
        conv = (hidden, rand(branches, size, spec.conv_width), weight, bounds, spec.conv_dilation, spec.conv_eps)
        found["short_conv"] = lambda: short_conv(*conv)
        found["short_conv_bwd"] = lambda: short_conv_bwd(hidden, *conv)
    return found
