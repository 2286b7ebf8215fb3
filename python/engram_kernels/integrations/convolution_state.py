"""One step of a memory's convolution behind inputs that a cache holds."""
import torch
from torch import Tensor

from engram_kernels._checks import wants_grad
from engram_kernels.modules.engram import Engram


def packed_bounds(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens [B+1] int32 of `batch` sequences of `length` tokens each."""
    return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)


def convolve_behind(memory: Engram, gated: Tensor, past: Tensor | None, batch: int, dead: Tensor | None, backend: str) -> Tensor:
    """The convolution's output [B*n, M, H] for `gated`, of which earlier inputs are in `past`.

    Args:
        memory: a module with a convolution.
        gated: [B*n, M, H], what `Engram.gated` gave.
        past: [B, p, M, H] earlier inputs, oldest first, zeros before a sequence's start; None: there are none.
        batch: B.
        dead: [B*n] bool, True = the output is 0.
        backend: of the op.
    """
    length = gated.shape[0] // batch
    if past is None:
        return memory.convolved(gated, packed_bounds(batch, length, gated.device), dead, backend)
    reach = conv_reach(memory)
    ring = last_inputs(past, reach)
    if not wants_grad(gated, *memory.parameters()):  # in slot q of a new ring lies input q: the ring's order is that of time
        positions = torch.full((batch,), reach, dtype=torch.int64, device=gated.device)
        return memory.convolved(gated, packed_bounds(batch, length, gated.device), dead, backend,
                                state=ring.clone(memory_format=torch.contiguous_format), positions=positions)
    line = torch.cat([ring, gated.unflatten(0, (batch, length))], dim=1).flatten(0, 1)
    out = memory.convolved(line, packed_bounds(batch, reach + length, gated.device), None, backend)
    out = out.unflatten(0, (batch, reach + length))[:, reach:].flatten(0, 1)
    return out if dead is None else out.masked_fill(dead[:, None, None], 0)


def conv_reach(memory: Engram) -> int:
    """How many tokens before its own the convolution sees."""
    assert memory.spec.conv_width is not None and memory.spec.conv_dilation is not None
    return (memory.spec.conv_width - 1) * memory.spec.conv_dilation


def last_inputs(past: Tensor, count: int) -> Tensor:
    """The last `count` of `past` [B, p, ..], with zeros in front where it has fewer."""
    missing = count - past.shape[1]
    if missing <= 0:
        return past[:, -missing:]
    return torch.cat([past.new_zeros(past.shape[0], missing, *past.shape[2:]), past], dim=1)
