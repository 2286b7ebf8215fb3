"""What the placement planner predicts of the memories of a budget, on a machine that was profiled."""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from engram_kernels.allocation.moe_model import InputError
from engram_kernels.plan.inputs import machine_of, workload_of
from engram_kernels.plan.model import evaluate, winner_of
from engram_kernels.plan.profile_input import load_profile
from engram_kernels.plan.quantity import Quantity
from engram_kernels.spec import EngramSpec


def exposed_of(specs: Sequence[EngramSpec], profile: str | os.PathLike[str], num_layers: int, tokens_per_step: int | None,
               step_ms: float | None) -> list[tuple[str | None, Quantity | None]]:
    """Where `plan` puts each memory's tables, and the seconds per step that a model waits for their rows; None: nothing fits.

    Args:
        specs: the memories.
        profile: a report of ``engram-kernels profile --json``, of the machine that is planned for.
        num_layers: of the model.
        tokens_per_step, step_ms: of the workload; None: the planner's defaults.

    Raises:
        ValueError: the file is no such report, or a number makes no sense.
        OSError: the file cannot be read.
    """
    path = Path(profile)
    try:
        node = machine_of(None, [(path, load_profile(path))])
    except ValueError as error:
        raise InputError(f"budget: {str(error).removeprefix('plan: ')}") from None
    try:
        asked = argparse.Namespace(
            layers=num_layers, tokens_per_step=tokens_per_step, step_ms=step_ms, ahead_ms=0.0, copies=1, gpus=1, nodes=1,
            cache_gib=None, text=None, zipf=None, like="prose", phase="decode", unique_ratio=None, hit_rate=None)
        found: list[tuple[str | None, Quantity | None]] = []
        for spec in specs:
            work = workload_of(asked, spec, node)
            placement = winner_of(work, node)
            found.append((None, None) if placement is None else
                         (placement, evaluate(placement, work, node, with_largest=False).exposed_s))
        return found
    except ValueError as error:
        raise ValueError(f"budget: {str(error).removeprefix('plan: ')}") from None
