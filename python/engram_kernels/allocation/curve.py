"""The published law: loss against rho, the share of the sparse parameters that experts have. All of it measured elsewhere."""
from __future__ import annotations

import itertools

from engram_kernels.allocation.moe_model import MoeModel
from engram_kernels.allocation.number import ELSEWHERE, Number

PAPER = "arXiv 2601.07372"
# validation loss of the sweep at 6e20 FLOPs: 9.9B parameters, 993M active, 99 experts at rho 1 and 43 at rho 0.4
POINTS = ((0.4, 1.7248), (0.8, 1.7109), (1.0, 1.7248))
BEST = (0.75, 0.80)
DEFAULT_RHO = 0.75  # the end of BEST that frees more of the accelerator; the paper's own 27B has 0.743
SOURCE = (f"{PAPER}: 1.7248 at rho 1, 1.7109 near rho 0.8, rho 0.4 as good as rho 1; 9.9B parameters, 993M active; straight "
          "lines between the three points lie on or above a curve that is convex")
# what the sweeps had: parameters without embedding and head, and their ratio to the active ones
TOTALS, RATIO = (5.7e9, 9.9e9), 10.0


def loss(rho: float) -> Number | None:
    """The paper's loss at this rho, by straight lines between its points; None outside the range it measured."""
    for (low, a), (high, b) in itertools.pairwise(POINTS):
        if low - 1e-9 <= rho <= high + 1e-9:
            share = min(max((rho - low) / (high - low), 0.0), 1.0)
            return Number(a + (b - a) * share, "1", ELSEWHERE, SOURCE)
    return None


def place(rho: float) -> str:
    """Where a rho lies on the curve, in a word or two."""
    if BEST[0] <= round(rho, 2) <= BEST[1]:
        return "best"
    return "measured" if POINTS[0][0] - 5e-3 <= rho <= 1 else "outside"


def outside(model: MoeModel, total: float, active: float, orders: tuple[int, ...]) -> list[str]:
    """What of this configuration the paper's curve was not measured for, a sentence each.

    Args:
        model: the model.
        total, active: parameters, the memory included.
        orders: of the memory.
    """
    kernel, used = total - model.embeddings, active - model.embeddings
    found = []
    if not TOTALS[0] * 0.95 <= kernel <= TOTALS[1] * 1.05:
        found.append(f"size: {kernel / 1e9:.3g}B parameters without embedding and head; measured at {TOTALS[0] / 1e9:g}B and "
                     f"{TOTALS[1] / 1e9:g}B, and one point, rho 0.743, at 26.7B")
    if used > 0 and not 0.85 * RATIO <= kernel / used <= 1.15 * RATIO:
        found.append(f"sparsity: total / active is {kernel / used:.3g}; measured at about {RATIO:g}")
    if orders != (2, 3):
        found.append(f"orders {','.join(map(str, orders))}: measured with 2,3 (4-grams were slightly worse at 1.6B of memory)")
    if model.branches != 4:
        found.append(f"branches: {model.branches}; measured with 4 hyper-connection streams")
    return found
