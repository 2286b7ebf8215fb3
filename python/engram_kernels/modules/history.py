"""The history of sequences whose caller gives none."""
import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels import _modes, _transforms
from engram_kernels._checks import expect_tensor

_REFUSED, _BEFORE_START = -3, -1  # the first is what `ngram_hash` refuses on every backend


def history_of_new_sequences(token_ids: Tensor, positions: Tensor, num_sequences: int, max_order: int) -> Tensor | None:
    """What `ngram_hash` takes as the history of sequences that start here; refuses `positions` that say they do not.

    Args:
        token_ids: [T], the ids that are hashed.
        positions: [B] int32 or int64, how many tokens came before each chunk.
        num_sequences: B.
        max_order: N.

    Returns:
        None where the positions can be looked at and are 0. Elsewhere [B, N-1] of the dtype of `token_ids`, with entries that
        the op refuses (on a GPU: counts, so that `check_errors` raises) where a position is above 0.

    Raises:
        ValueError: a position is above 0, on the CPU.
    """
    expect_tensor("Engram", "positions", positions, (torch.int32, torch.int64), (num_sequences,), token_ids.device)
    if positions.is_cpu and not is_compiling() and not _transforms.active() and _modes.fake_mode_of(positions) is None:
        later = (positions > 0).nonzero()
        if len(later) > 0:
            b = int(later[0])
            raise ValueError(f"Engram: history is None, but positions[{b}] is {int(positions[b])}: earlier tokens belong to the "
                             f"hash; pass history [B, {max_order - 1}] as ngram_hash takes it")
        return None
    column = torch.where(positions > 0, _REFUSED, _BEFORE_START).to(token_ids.dtype)
    return column[:, None].repeat(1, max_order - 1)
