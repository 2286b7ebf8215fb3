"""The ops under the transforms of `torch.func` (grad, vmap, jacrev and what is made of them).

What `torch.library.register_autograd` makes of a derivative those transforms refuse, so each op that has one has a
`torch.autograd.Function` of the same formula here, which they take. Under vmap the op runs once per element of the batch.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels._checks import are_transforms_active

_FUNCTIONS: dict[str, Any] = {}  # by the name of the op with its namespace


def active() -> bool:
    """Whether the caller is inside a transform."""
    return not is_compiling() and bool(are_transforms_active())


def call(overload: Any, *args: Any) -> Any:
    """The op inside a transform.

    Args:
        overload: of a functional op, such as ``torch.ops.engram_kernels.gate.default``.
        args: its arguments.

    Returns:
        What the op returns.
    """
    function = _FUNCTIONS.get(overload._schema.name)
    return overload(*args) if function is None else function.apply(*args)


def define(namespace: str, op: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None) -> None:
    """Makes the Function of `op`. Arguments: `triton_runtime.dispatch.register_autograd`."""
    ops = _Ops(namespace)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return getattr(getattr(torch.ops, namespace), op).default(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ops, ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            each = [Function.apply(*(x if dim is None else x.select(dim, i).contiguous()
                                     for x, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
            if isinstance(each[0], Tensor):
                return torch.stack(each), 0
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])

    Function.__name__ = op
    _FUNCTIONS[f"{namespace}::{op}"] = Function


class _Ops:
    """Stands for `torch.ops.<namespace>` in a backward: its ops may be differentiated or batched again."""

    def __init__(self, namespace: str):
        self._namespace = namespace

    def __getattr__(self, op: str) -> Any:
        return _Packet(getattr(getattr(torch.ops, self._namespace), op).default)


class _Packet:
    def __init__(self, overload: Any):
        self._overload = overload

    def default(self, *args: Any) -> Any:
        """The op, wherever the backward runs."""
        return call(self._overload, *args)
