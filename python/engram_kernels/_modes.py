"""Modes of torch that change what a new tensor is: constants that outlive them are made outside of them."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Within it a new tensor is an ordinary one, whatever mode the caller is in; name its device, since a default may be set.

    A tensor that is cached for the process must be made here: under FakeTensorMode, inference mode or a transform of
    `torch.func` it would be a tensor that nobody else can use.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.inference_mode(False):
        yield


def fake_mode() -> Any:
    """The FakeTensorMode that the caller is in and that takes no real tensors; None: there is none."""
    if not torch._C._len_torch_dispatch_stack():
        return None
    mode = torch._guards.active_fake_mode()
    return None if mode is None or mode.allow_non_fake_inputs else mode


def fake_mode_of(x: Tensor) -> Any:
    """The FakeTensorMode that the tensor belongs to; None for a tensor with data, and under torch.compile."""
    return None if is_compiling() or type(x) is Tensor else getattr(x, "fake_mode", None)


def is_on(x: Tensor, device: torch.device | str) -> bool:
    """Whether the tensor is on `device`; "cuda" is the current GPU."""
    device = torch.device(device)
    if device.index is None and device.type == "cuda" and x.is_cuda and not is_compiling():
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else x.device
    return x.device == device
