"""Lets a test that makes its tensors on the CPU run an op on the device of the backend under test."""
import dataclasses
import functools

import pytest
import torch

from engram_kernels import check_errors
from engram_kernels.table.row_table import RowTable

HAS_GPU = torch.cuda.is_available()


def device_of(backend):
    """Where the tensors of a backend lie."""
    return "cuda" if HAS_GPU and backend in ("cuda", "triton") else "cpu"


def on_device(op):
    """`op` with its tensors and tables moved to the device of its `backend`, and what it gives moved back.

    Strides, offsets and what lies between the elements are kept. A bad id that the device counted is raised at once.
    """
    @functools.wraps(op)
    def run(*args, backend="auto", **options):
        if device_of(backend) == "cpu":
            return op(*args, backend=backend, **options)
        moved = {}  # one tensor given twice stays one tensor
        result = op(*(_move(x, moved) for x in args), backend=backend, **{k: _move(x, moved) for k, x in options.items()})
        check_errors()
        out = options.get("out")
        return result.cpu() if out is None else out.copy_(result)
    return run


def raises_bad_ids(op, backend, message):
    """One bad id: `message` on the CPU, a count on a GPU."""
    return pytest.raises(IndexError, match=message if device_of(backend) == "cpu" else f"{op}: 1 bad values")


def _move(x, moved):
    if isinstance(x, RowTable):
        if x.tier == "file":
            pytest.skip("rows of a file come out on the CPU")
        return dataclasses.replace(x, rows=_move(x.rows, moved), scales=_move(x.scales, moved), tier="device")
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return x
    if id(x) not in moved:
        moved[id(x)] = x.cuda() if x.requires_grad else _same_layout(x)
    return moved[id(x)]


def _same_layout(x):
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).cuda().untyped_storage()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())
