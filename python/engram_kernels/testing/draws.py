"""How far plain PyTorch may be off in a row, over several draws of its rounding errors."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def worst_draw(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """What `function` returns, each row from that draw of its rounding errors which is the farthest from `exact`.

    In float32 the error of plain PyTorch in one row is a draw from the same distribution as a kernel's, at times a lucky one,
    which says nothing (and where a formula has a square root near 0, errors differ between rows by orders of magnitude). So the
    function is also run with the elements of every row in other orders and, in float32, moved by one unit in the last place.

    Args:
        function: takes `inputs`, returns tensors; its last dimension is that of the inputs, whose order does not matter.
        inputs: [..., dim], all of one dim.
        exact: what it returns in float64.

    Returns:
        Tensors of the shapes and dtypes that `function` returns, to be given to `assert_as_accurate_as_torch` as `plain`.
    """
    worst = [x.clone() for x in function(*inputs)]
    is_float32 = inputs[0].dtype == torch.float32
    for draw in range(16 if is_float32 else 2):
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(inputs[0].shape[-1], generator=generator).to(inputs[0].device)
        moved = [x[..., order] for x in inputs]
        if is_float32:
            eps = torch.finfo(torch.float32).eps
            moved = [x * (1 + eps * torch.randint(-1, 2, x.shape, generator=generator).to(x.device)) for x in moved]
        for kept, x, want in zip(worst, function(*moved), exact, strict=True):
            x = x[..., order.argsort()]
            farther = (x - want).abs().amax(-1) > (kept - want).abs().amax(-1)
            kept[farther] = x[farther]
    return worst
